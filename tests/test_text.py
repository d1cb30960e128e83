"""Text to sentences, and sentences to text tokens."""

import pytest

from barkstream.options import BadRequest
from barkstream.text import MAX_CHARACTERS, MAX_SENTENCE_S, check_text, estimated_seconds, split_sentences

LONG = (
    "First, this is a rather long sentence that goes on, and on, and on, with many clauses; indeed it has so many that "
    "nobody would say it in one breath: not even a trained speaker, who breathes deep, and slowly, and whose voice carries."
)


def test_sentences_end_at_their_marks():
    assert split_sentences("The first one of them is here. And the second one is there! Is a third one anywhere?") == [
        "The first one of them is here.",
        "And the second one is there!",
        "Is a third one anywhere?",
    ]


def test_quotes_stay_with_their_sentence():
    assert (
        split_sentences('He said "go away, all of you!" Then everybody left the room.')[0]
        == 'He said "go away, all of you!"'
    )


def test_very_short_sentences_are_said_together():
    assert split_sentences("No. Yes. Well, who can say what tomorrow brings?") == [
        "No. Yes. Well, who can say what tomorrow brings?"
    ]


@pytest.mark.parametrize("text", [LONG, "word " * 200, "x" * 1000, "今日は。いい天気ですね！" * 20, "a, " * 300])
def test_no_piece_is_too_long_and_nothing_is_lost(text):
    pieces = split_sentences(text)
    assert max(map(estimated_seconds, pieces)) <= MAX_SENTENCE_S
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_an_over_long_sentence_is_cut_at_clauses():
    assert all(piece[-1] in ".,;:" for piece in split_sentences(LONG))


@pytest.mark.parametrize("text", ["", "   \n\t "])
def test_a_blank_text_is_refused(text):
    with pytest.raises(BadRequest, match="blank"):
        check_text(text)


def test_an_over_long_text_is_refused_with_the_limit():
    with pytest.raises(BadRequest, match="at most 50,000 characters, got 100,000"):
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
    pieces = pipeline.tokenizer.split(text)
    assert all(map(pipeline.tokenizer.fits, pieces))
    assert " ".join(pieces) == text.strip()
