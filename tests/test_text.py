"""Text to sentences, and sentences to text tokens."""

import pytest

from barkstream import text as text_module
from barkstream.options import BadRequest
from barkstream.text import (
    CLAUSE_PAUSE,
    COMMA_PAUSE,
    ELLIPSIS_PAUSE,
    MAX_CHARACTERS,
    MAX_SENTENCE_S,
    PARAGRAPH_PAUSE,
    TURN_PAUSE,
    check_text,
    estimated_seconds,
    split_sentences,
)

LONG = (
    "First, this is a rather long sentence that goes on, and on, and on, with many clauses; indeed it has so many that "
    "nobody would say it in one breath: not even a trained speaker, who breathes deep, and slowly, and whose voice carries."
)


def texts(text, **reading):
    return [sentence.text for sentence in split_sentences(text, **reading)]


def test_sentences_end_at_their_marks():
    assert texts("The first one of them is here. And the second one is there! Is a third one anywhere?") == [
        "The first one of them is here.",
        "And the second one is there!",
        "Is a third one anywhere?",
    ]


def test_quotes_stay_with_their_sentence():
    assert texts('He said "go away, all of you!" Then everybody left the room.')[0] == 'He said "go away, all of you!"'


@pytest.mark.parametrize("quote", ["“Now go", "« Now go"])
def test_a_quote_that_is_not_closed_goes_with_what_it_opens(quote):
    assert "".join(texts(f"That is what I have to say. {quote}")[1].split()) == "".join(quote.split())


def test_very_short_sentences_are_said_together():
    assert texts("No. Yes. Well, who can say what tomorrow brings?") == [
        "No. Yes. Well, who can say what tomorrow brings?"
    ]


@pytest.mark.parametrize(
    ("language", "first", "second"),
    [
        ("en", "Dr. J. R. Smith paid $3.50 at 5 p.m. on Main St. in Paris.", "Then, e.g. on a Sunday, he went home."),
        ("de", "Das war z. B. am 3. Oktober 1990 bei Dr. Müller.", "Danach ging er nach Hause, d. h. ins Bett."),
        ("es", "El Sr. López vive en EE. UU. desde hace años.", "¿Cómo está Ud. después de tanto tiempo?"),
        ("fr", "M. Dupont est arrivé avec Mme Curie ce matin.", "« Bonjour ! » dit-il à tout le monde ici."),
        ("hi", "यह पहला वाक्य है और यह काफी लंबा है।", "क्या यह दूसरा वाक्य भी लंबा है?"),
        ("it", "Il sig. Rossi è arrivato a casa alle 5.", "Il dott. Bianchi invece non è venuto."),
        ("ja", "今日はとてもいい天気ですね。", "明日も晴れるでしょうか？"),
        ("ko", "안녕하세요, 저는 학생입니다.", "오늘은 날씨가 정말 좋네요!"),
        ("pl", "Prof. Kowalski ur. w 1950 r. w Warszawie mieszka np. tutaj.", "Czy to jest na pewno prawda?"),
        ("pt", "O Sr. Silva e a Dra. Ana moram aqui perto.", "Eles chegaram ontem à noite, às cinco."),
        ("ru", "А. С. Пушкин родился в 1799 г. в Москве.", "Правда ли, что он любил зиму?"),
        ("tr", "Prof. Yılmaz ve Dr. Ahmet Bey dün buraya geldi.", "Gerçekten çok mu geç kaldılar?"),
        ("zh", "今天天气很好，我们去公园走走。", "你明天还会再来这里吗？"),
    ],
)
def test_abbreviations_and_numbers_end_no_sentence(language, first, second):
    gap = "" if language in ("ja", "zh") else " "
    assert texts(f"{first}{gap}{second}", language=language) == [first, second]


@pytest.mark.parametrize("text", [LONG, "word " * 200, "x" * 1000, "今日は。いい天気ですね！" * 20, "a, " * 300])
def test_no_piece_is_too_long_and_nothing_is_lost(text):
    pieces = texts(text)
    assert max(map(estimated_seconds, pieces)) <= MAX_SENTENCE_S
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_an_over_long_sentence_is_cut_at_clauses():
    assert all(piece[-1] in ".,;:" for piece in texts(LONG))


def test_pauses_follow_the_punctuation():
    text = f"Chapter one of the whole long story\n\nIt began... or so they said, all of them... {LONG}"
    pauses = {sentence.text[-3:]: sentence.pause for sentence in split_sentences(text)}
    assert pauses["ory"] == PARAGRAPH_PAUSE
    assert pauses["..."] == ELLIPSIS_PAUSE
    assert COMMA_PAUSE in pauses.values() or CLAUSE_PAUSE in pauses.values()


def test_a_short_heading_is_said_with_what_follows_and_gets_a_full_stop():
    assert texts("Chapter 1\n\nIt was a dark and stormy night.") == ["Chapter 1. It was a dark and stormy night."]


def test_turns_are_their_speakers_and_their_marks_are_not_said():
    text = (
        "A play in one act, with two people.\nANN: Good morning to you, Bob!\n\n[Bob] Good morning. Note: it is late."
    )
    turns = [(s.speaker, s.text, s.pause) for s in split_sentences(text, speakers=["Ann", "Bob"])]
    assert turns == [
        ("", "A play in one act, with two people.", TURN_PAUSE),
        ("Ann", "Good morning to you, Bob!", TURN_PAUSE),
        ("Bob", "Good morning. Note: it is late.", TURN_PAUSE),
    ]


def test_without_speakers_a_mark_is_text():
    assert texts("A: this is only a text.") == ["A: this is only a text."]


def test_a_text_of_nothing_but_marks_is_refused():
    with pytest.raises(BadRequest, match="no words"):
        texts("A:\n[B]", speakers=["A", "B"])


def test_a_short_turn_is_not_joined_with_another_speakers():
    assert texts("A: No.\nB: Yes.\nA: No!", speakers=["A", "B"]) == ["No.", "Yes.", "No!"]


def test_odd_separators_are_white_space():
    assert texts("It is late\u2028. And now\x85 we\u2029go home.") == ["It is late . And now we go home."]


def test_a_splitter_that_panics_costs_no_text(monkeypatch):
    class PanicException(BaseException):
        """As pyo3 raises it: no Exception."""

    def panic(language, paragraph):
        raise PanicException

    monkeypatch.setattr(text_module.sentencex, "segment", panic)
    assert " ".join(texts(LONG)) == LONG


def test_a_book_is_split_as_it_is_read():
    asked = []

    def read(language, paragraph, split=text_module.sentencex.segment):
        asked.append(paragraph)
        return split(language, paragraph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module.sentencex, "segment", read)
        pieces = split_sentences("A paragraph of a book, as good as any. And its second sentence.\n\n" * 10_000)
        next(pieces)
        assert len(asked) <= 2
        assert sum(1 for _ in pieces) == 2 * 10_000 - 1


def test_numbers_become_words_only_where_asked():
    assert texts("It costs $3.50 for each of them.") == ["It costs $3.50 for each of them."]
    assert texts("It costs $3.50 for each of them.", normalized=True) == [
        "It costs three dollars fifty for each of them."
    ]


@pytest.mark.parametrize("text", ["", "   \n\t "])
def test_a_blank_text_is_refused(text):
    with pytest.raises(BadRequest, match="blank"):
        check_text(text)


def test_an_over_long_text_is_refused_with_the_limit():
    with pytest.raises(BadRequest, match="at most 1,000,000 characters, got 2,000,000"):
        check_text("a" * 2 * MAX_CHARACTERS)


def test_text_ids_are_offset_padded_and_cut(pipeline):
    layout = pipeline.checkpoint.semantic
    ids = pipeline.tokenizer.encode("hello")
    assert len(ids) == layout.n_text
    assert (ids[:5] >= layout.text_offset).all()
    assert (ids[5:] == layout.text_pad).all()
    assert len(pipeline.tokenizer.encode("hello " * 200)) == layout.n_text


def test_words_that_do_not_fit_in_a_prompt_go_to_the_next_sentence(pipeline):
    text = "antidisestablishmentarianism " * 12  # nano-bark's tokens are characters: 336 of them, the prompt takes 256
    pieces = [sentence.text for sentence in pipeline.tokenizer.split(text)]
    assert all(map(pipeline.tokenizer.fits, pieces))
    assert " ".join(pieces) == text.strip()
