"""Text that is still being written, as sentences to say."""

from __future__ import annotations

from collections.abc import Callable

from barkstream.text import Sentence, split_sentences


class SentenceBuffer:
    """Takes text piece by piece and gives the sentences of the whole, each as soon as it is complete.

    A sentence is complete when the next one has begun: only then is a full stop known to be one ("e.g. this", "3.14"), and
    the pause after it. A very short one waits for the next; one that grows longer than Bark says well is cut at a clause.
    """

    def __init__(self, language_of: Callable[[str], str]) -> None:
        """language_of: the language to read a text in."""
        self._language_of = language_of
        self._text = ""

    def __len__(self) -> int:
        """Characters not yet given out."""
        return len(self._text)

    def push(self, piece: str) -> list[Sentence]:
        """Add a piece of text; returns the sentences that it completes."""
        self._text += piece
        complete = self._split()[:-1]
        self._text = self._text[_length_in(self._text, complete) :]
        return complete

    def flush(self) -> list[Sentence]:
        """The rest, complete or not."""
        rest, self._text = self._split(), ""
        return rest

    def _split(self) -> list[Sentence]:
        return list(split_sentences(self._text, self._language_of(self._text))) if self._text.strip() else []


def _length_in(text: str, sentences: list[Sentence]) -> int:
    """How much of the text its first sentences are; they have other white space and perhaps more full stops."""
    n = 0
    for mark in "".join("".join(sentence.text.split()) for sentence in sentences):
        while text[n].isspace():
            n += 1
        n += text[n] == mark  # else one that was added
    return n
