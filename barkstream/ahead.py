"""Work that goes on while its result is not yet needed: the stages of one stream overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")


class Ahead(Iterator[Piece]):
    """The same pieces; the next n_ahead are made by `worker` while one is in use."""

    def __init__(
        self, pieces: Iterator[Piece], worker: Executor, n_ahead: int, has_begun: Callable[[], bool] = lambda: True
    ):
        """worker: an executor of one thread, since an iterator cannot be asked by two at once. n_ahead 0: nothing is made early; nor
        before has_begun, or `begin`."""
        self._pieces, self._worker, self._n_ahead, self._has_begun = pieces, worker, n_ahead, has_begun
        self._coming = deque[Future[Piece | None]]()

    def __next__(self) -> Piece:
        if not self._coming and not (self._n_ahead and self._has_begun()):
            return next(self._pieces)
        self.begin()
        if (piece := self._coming.popleft().result()) is None:
            raise StopIteration
        self.begin()
        return piece

    def begin(self) -> None:
        """The next ones are made from now on, before anybody asks: the piece in use may be for long. Not while one is being asked for."""
        while len(self._coming) < self._n_ahead:
            self._coming.append(self._worker.submit(next, self._pieces, None))


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
