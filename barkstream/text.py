"""Text to sentences that Bark says well, and sentences to text tokens."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from barkstream.options import BadRequest
from barkstream.tokens import SemanticLayout

MAX_CHARACTERS = 50_000  # about an hour of speech
MAX_SENTENCE_S = 13.0  # Bark falls apart beyond 13 to 14 s of speech
MIN_SENTENCE_S = 1.5  # shorter ones ("No.") are said together with the next

# Estimates for splitting only. English runs at about 15 characters a second; an ideograph is about a syllable.
CHARACTERS_PER_S = 15.0
IDEOGRAPHS_PER_S = 4.5

SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?![a-z])|(?<=[。！？])|\n\s*\n")  # not before 'e.g. this'
CLAUSE_END = re.compile(r"(?<=[,;:—])\s+|(?<=[，、；：])")
WORD_END = re.compile(r"\s+")
IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


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


def split_sentences(text: str, max_seconds: float = MAX_SENTENCE_S) -> list[str]:
    """A text as pieces that Bark says well: sentences; clauses, then words, of an over-long one; short ones joined."""
    sentences = [_one_line(piece) for piece in _split_after(SENTENCE_END, text)]
    pieces = [piece for sentence in sentences if sentence for piece in _shorten(sentence, max_seconds)]
    return _join_short(pieces, max_seconds)


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

    def split(self, text: str) -> list[str]:
        """Sentences that are short enough to say and whose tokens fit in the prompt, so that no word is lost."""
        fitting: list[str] = []
        for sentence in split_sentences(text):
            limit = MAX_SENTENCE_S
            pieces = [sentence]
            while not all(map(self.fits, pieces)) and limit > 1:
                limit /= 2
                pieces = split_sentences(sentence, limit)
            fitting += pieces
        return fitting


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
        joined = f"{packed[-1]} {part}"
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


def _join_short(pieces: list[str], max_seconds: float) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        whole = f"{joined[-1]} {piece}" if joined else piece
        if joined and estimated_seconds(joined[-1]) < MIN_SENTENCE_S and estimated_seconds(whole) <= max_seconds:
            joined[-1] = whole
        else:
            joined.append(piece)
    return joined
