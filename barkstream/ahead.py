"""Work that goes on while its result is not yet needed: the stages of one stream overlap."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TypeVar

Piece = TypeVar("Piece")


def ahead(pieces: Iterator[Piece], background: Executor) -> Iterator[Piece]:
    """The same pieces; each is made in the background while the one before it is in use."""
    coming = background.submit(next, pieces, None)
    while (piece := coming.result()) is not None:
        coming = background.submit(next, pieces, None)
        yield piece
