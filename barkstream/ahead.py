"""Work that goes on while its result is not yet needed: the stages of one stream overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")


def ahead(
    pieces: Iterator[Piece], worker: Executor, n_ahead: int, has_begun: Callable[[], bool] = lambda: True
) -> Iterator[Piece]:
    """The same pieces; the next n_ahead are made by `worker` while one is in use.

    worker: an executor of one thread, since an iterator cannot be asked by two at once. n_ahead 0: nothing is made early;
    nor until has_begun.
    """
    while n_ahead == 0 or not has_begun():
        piece = next(pieces, None)
        if piece is None:
            return
        yield piece
    coming = deque(worker.submit(next, pieces, None) for _ in range(n_ahead))
    while (piece := coming.popleft().result()) is not None:
        coming.append(worker.submit(next, pieces, None))
        yield piece


class Workers:
    """One thread a stage that works ahead, for one stream. As a context manager; its end drops what has not begun."""

    def __init__(self) -> None:
        self.coarse = ThreadPoolExecutor(1, thread_name_prefix="coarse")
        self.semantic = ThreadPoolExecutor(1, thread_name_prefix="semantic")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.coarse.shutdown(wait=True, cancel_futures=True)  # first: it may be waiting for the other
        self.semantic.shutdown(wait=True, cancel_futures=True)
