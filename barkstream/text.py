"""Text to sentences that Bark says well, one by one, and sentences to text tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencex
from numpy.typing import NDArray
from tokenizers import Tokenizer

from barkstream.normalize import normalize
from barkstream.options import BadRequest
from barkstream.tokens import SemanticLayout

MAX_CHARACTERS = 1_000_000  # a long novel, about 18 hours of speech
MAX_SENTENCE_S = 13.0  # Bark falls apart beyond 13 to 14 s of speech
MIN_SENTENCE_S = 1.5  # shorter ones ("No.") are said together with the next

# Estimates for splitting only. English runs at about 15 characters a second; an ideograph is about a syllable.
CHARACTERS_PER_S = 15.0
IDEOGRAPHS_PER_S = 4.5

# Pauses, as multiples of the schedule's sentence_pause_s (.25 s).
WORD_PAUSE, COMMA_PAUSE, CLAUSE_PAUSE = 0.0, 0.4, 0.6  # inside a sentence that was too long to be said in one go
SENTENCE_PAUSE, ELLIPSIS_PAUSE, TURN_PAUSE, PARAGRAPH_PAUSE = 1.0, 1.6, 1.6, 2.4

PARAGRAPH_END = re.compile(r"\n\s*\n")
CLAUSE_END = re.compile(r"(?<=[,;:!?…—–])[\"'”’»)\]]*\s+|(?<=[，、；：！？])")
WORD_END = re.compile(r"\s+")
CLOSERS = "\"'”’»)]」』"
IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")  # Chinese and Japanese, not Korean
SHORT_WORD = re.compile(r"(?:^|\s)\w{1,3}\.$")  # an abbreviation, if what follows is no beginning
OPENER = re.compile(r"\s([“«])$")  # of a quotation whose end the library has not seen, which it takes for a closer
INITIAL = re.compile(r"(?:^|\s)[^\W\d_]\.$")  # "M. Dupont", "A. S. Puschkin"


@dataclass(frozen=True)
class Sentence:
    """What Bark says in one go: a sentence, some short ones, or a part of a long one."""

    text: str
    pause: float = SENTENCE_PAUSE  # after it, as a multiple of the schedule's sentence_pause_s
    speaker: str = ""  # whose turn it is; "": nobody's

    def joined(self, following: Sentence) -> Sentence:
        """This one and the following in one go."""
        return replace(following, text=_join(self.text, following.text, self.pause))


def check_text(text: str) -> str:
    """The text without needless white space. Raises BadRequest for a blank or an over-long one."""
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(f"text must have at most {MAX_CHARACTERS:,} characters, got {len(text):,}; send it in parts")
    stripped = text.strip()
    if not stripped:
        raise BadRequest("text is blank; send some words to say")
    return stripped


def estimated_seconds(text: str) -> float:
    """How long the text will take to say, roughly."""
    n_ideographs = len(IDEOGRAPH.findall(text))
    return n_ideographs / IDEOGRAPHS_PER_S + (len(text) - n_ideographs) / CHARACTERS_PER_S


def split_sentences(
    text: str, language: str = "en", normalized: bool = False, speakers: Sequence[str] = ()
) -> Iterator[Sentence]:
    """A text as pieces that Bark says well, each made when it is asked for.

    Sentences; clauses, then words, of an over-long one; short ones joined with the next of the same speaker. normalized:
    numbers, dates and the like become words. speakers: names whose turns `A:` or `[A]` mark. Raises BadRequest if there is
    nothing but such marks.
    """
    n_pieces = 0
    for piece in _join_short(_split_turns(text, language, normalized, speakers)):
        n_pieces += 1
        yield piece
    if not n_pieces:
        raise BadRequest("text holds no words to say")


def split_turns(text: str, speakers: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(speaker, what they say): a turn begins with `A:` at the start of a line or `[A]` anywhere, A being a given name.

    Upper and lower case are the same. What comes before the first turn is nobody's, that is "".
    """
    if not speakers:
        yield "", text
        return
    names = "|".join(f"({re.escape(name)})" for name in speakers)
    mark = re.compile(rf"^[ \t]*(?:{names})[ \t]*[:：]|\[(?:{names})\][:：]?", re.IGNORECASE | re.MULTILINE)
    speaker, begin = "", 0
    for match in mark.finditer(text):
        yield speaker, text[begin : match.start()]
        group = match.lastindex or 1  # each name is two groups of its own
        speaker, begin = speakers[(group - 1) % len(speakers)], match.end()
    yield speaker, text[begin:]


class TextTokenizer:
    """A checkpoint's tokenizer with Bark's offsets and padding."""

    def __init__(self, path: Path, layout: SemanticLayout):
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._layout = layout

    def encode(self, sentence: str) -> NDArray[np.int32]:
        """Text ids [n_text], offset and padded; what exceeds n_text is cut, as in the reference."""
        layout = self._layout
        ids = self._tokenizer.encode(sentence, add_special_tokens=False).ids[: layout.n_text]
        padded = np.full(layout.n_text, layout.text_pad, np.int32)
        padded[: len(ids)] = np.array(ids, np.int32) + layout.text_offset
        return padded

    def fits(self, sentence: str) -> bool:
        return len(self._tokenizer.encode(sentence, add_special_tokens=False).ids) <= self._layout.n_text

    def split(
        self, text: str, language: str = "en", normalized: bool = False, speakers: Sequence[str] = ()
    ) -> Iterator[Sentence]:
        """`split_sentences`, with the tokens of each piece fitting in the prompt, so that no word is lost."""
        for sentence in split_sentences(text, language, normalized, speakers):
            limit, pieces = MAX_SENTENCE_S, [sentence.text]
            while not all(map(self.fits, pieces)) and limit > 1:
                limit /= 2
                pieces = _shorten(sentence.text, limit)
            yield from _parts(pieces, sentence.pause, sentence.speaker)


def _split_turns(text: str, language: str, normalized: bool, speakers: Sequence[str]) -> Iterator[Sentence]:
    for speaker, turn in split_turns(text, speakers):
        yield from _with_last_pause(_split_turn(turn, language, normalized, speaker), TURN_PAUSE)


def _split_turn(turn: str, language: str, normalized: bool, speaker: str) -> Iterator[Sentence]:
    for paragraph in _paragraphs(turn):
        yield from _with_last_pause(_split_paragraph(paragraph, language, normalized, speaker), PARAGRAPH_PAUSE)


def _paragraphs(text: str) -> Iterator[str]:
    begin = 0
    for match in PARAGRAPH_END.finditer(text):
        yield text[begin : match.start()]
        begin = match.end()
    yield text[begin:]


def _split_paragraph(paragraph: str, language: str, normalized: bool, speaker: str) -> Iterator[Sentence]:
    found = (_one_line(sentence) for sentence in _segment(language, paragraph))
    for sentence in _mend(sentence for sentence in found if sentence):
        said = normalize(sentence, language) if normalized else sentence
        pause = ELLIPSIS_PAUSE if said.rstrip(CLOSERS).endswith(("...", "…")) else SENTENCE_PAUSE
        yield from _parts(_shorten(said, MAX_SENTENCE_S), pause, speaker)


def _segment(language: str, paragraph: str) -> list[str]:
    plain = "\n".join(_one_line(line) for line in paragraph.splitlines())  # sentencex panics on some separators
    try:
        return sentencex.segment(language, plain)
    except BaseException as panic:  # Rust's panics are no Exceptions; one sentence, which clauses will part, is no harm
        if type(panic).__name__ != "PanicException":
            raise
        return [plain]


def _mend(sentences: Iterable[str]) -> Iterator[str]:
    """The same sentences; one that was parted at an abbreviation is whole again, and an opening quote with what it opens."""
    held = ""
    for sentence in sentences:
        if opener := OPENER.search(held):
            held, sentence = held[: opener.start()], opener[1] + sentence
        parted = INITIAL.search(held) or (SHORT_WORD.search(held) and sentence[0].islower())
        if held and not parted:
            yield held
            held = ""
        held = f"{held} {sentence}".strip()
    if held:
        yield held


def _parts(pieces: list[str], pause: float, speaker: str) -> Iterator[Sentence]:
    """Pieces of one sentence, each with the pause that its closing mark asks for; the last one with the sentence's."""
    for piece in pieces[:-1]:
        yield Sentence(piece, _clause_pause(piece), speaker)
    yield Sentence(pieces[-1], pause, speaker)


def _clause_pause(piece: str) -> float:
    mark = piece.rstrip(CLOSERS)[-1:]
    if mark in ",，、":
        return COMMA_PAUSE
    return CLAUSE_PAUSE if mark in ";:!?…—–；：！？" else WORD_PAUSE


def _with_last_pause(sentences: Iterable[Sentence], pause: float) -> Iterator[Sentence]:
    """The same sentences; after the last one comes the given pause."""
    held = None
    for sentence in sentences:
        if held:
            yield held
        held = sentence
    if held:
        yield replace(held, pause=pause)


def _join_short(sentences: Iterable[Sentence]) -> Iterator[Sentence]:
    """The same sentences; one that is short is joined with the next of the same speaker, if both fit in one go."""
    held = None
    for sentence in sentences:
        if held and held.speaker == sentence.speaker and _fit_together(held, sentence):
            sentence = held.joined(sentence)
        elif held:
            yield held
        held = sentence
        if estimated_seconds(held.text) >= MIN_SENTENCE_S:
            yield held
            held = None
    if held:
        yield held


def _fit_together(first: Sentence, second: Sentence) -> bool:
    return estimated_seconds(_join(first.text, second.text, first.pause)) <= MAX_SENTENCE_S


def _join(first: str, second: str, pause: float) -> str:
    """Two pieces as one; a heading or a list's item gets the full stop that it lacks."""
    if UNSPACED.match(first[-1]) and UNSPACED.match(second[0]):
        return first + second
    lacks_stop = pause >= SENTENCE_PAUSE and first[-1].isalnum()
    return f"{first}{'.' if lacks_stop else ''} {second}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _split_after(end: re.Pattern[str], text: str) -> list[str]:
    """Pieces of a text, each with its closing mark."""
    cuts = [0, *(match.end() for match in end.finditer(text)), len(text)]
    return [text[a:b].strip() for a, b in zip(cuts, cuts[1:], strict=False) if text[a:b].strip()]


def _shorten(sentence: str, max_seconds: float) -> list[str]:
    if estimated_seconds(sentence) <= max_seconds:
        return [sentence]
    for end in (CLAUSE_END, WORD_END):
        parts = _split_after(end, sentence)
        if len(parts) > 1:
            packed = _pack(parts, max_seconds)
            return [piece for part in packed for piece in (_shorten(part, max_seconds) if len(packed) > 1 else [part])]
    return _cut(sentence, max_seconds)


def _pack(parts: list[str], max_seconds: float) -> list[str]:
    """Neighbouring parts joined while they stay within max_seconds."""
    packed = [parts[0]]
    for part in parts[1:]:
        joined = _join(packed[-1], part, WORD_PAUSE)
        if estimated_seconds(joined) <= max_seconds:
            packed[-1] = joined
        else:
            packed.append(part)
    return packed


def _cut(word: str, max_seconds: float) -> list[str]:
    """A text with neither clause nor space, in equal parts."""
    n_parts = int(estimated_seconds(word) / max_seconds) + 1
    size = -(-len(word) // n_parts)
    return [word[i : i + size] for i in range(0, len(word), size)]
