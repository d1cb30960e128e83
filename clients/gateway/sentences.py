"""Text that is still being written, as sentences to say."""

from __future__ import annotations

from barkstream.text import MAX_SENTENCE_S, SENTENCE_END, estimated_seconds, split_sentences


class SentenceBuffer:
    """Takes text piece by piece and gives sentences as soon as they are complete.

    A sentence is complete when the next one has begun: only then is a full stop known to be one ("e.g. this", "3.14").
    One that grows longer than Bark says well is cut at a clause.
    """

    def __init__(self) -> None:
        self._text = ""

    def __len__(self) -> int:
        """Characters not yet given out."""
        return len(self._text)

    def push(self, piece: str) -> list[str]:
        """Add a piece of text; returns the sentences that it completes."""
        self._text += piece
        ends = [end.end() for end in SENTENCE_END.finditer(self._text) if end.end() < len(self._text)]
        complete, self._text = self._text[: max(ends, default=0)], self._text[max(ends, default=0) :]
        sentences = split_sentences(complete)
        if estimated_seconds(self._text) > MAX_SENTENCE_S:
            *clauses, rest = split_sentences(self._text)
            sentences += clauses
            self._text = rest + (" " if self._text[-1].isspace() else "")
        return sentences

    def flush(self) -> list[str]:
        """The rest, complete or not."""
        rest, self._text = self._text, ""
        return split_sentences(rest)
