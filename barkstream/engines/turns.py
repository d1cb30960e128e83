"""Whose turn it is on a GPU: one stage works at a time, the most urgent of those that wait goes next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """A lock that the most urgent of those who wait for it gets. Threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Callable[[], int]] = []
        self._is_taken = False

    @contextmanager
    def turn(self, urgency: Callable[[], int]) -> Iterator[None]:
        """The block runs alone. urgency: asked whenever a turn ends; the lowest goes first, of equal ones who came first."""
        with self._changed:
            self._waiting.append(urgency)
            self._changed.wait_for(lambda: not self._is_taken and min(self._waiting, key=lambda ask: ask()) is urgency)
            self._waiting.remove(urgency)
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()
