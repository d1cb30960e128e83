"""Whose turn it is on a GPU: one stage works at a time, the most urgent of those that wait goes next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that the most urgent of those who wait for it gets. Threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._is_taken = False

    @contextmanager
    def turn(self, urgency: int) -> Iterator[None]:
        """The block runs alone. urgency: the lowest goes first."""
        with self._changed:
            self._waiting.append(urgency)
            self._changed.wait_for(lambda: not self._is_taken and urgency == min(self._waiting))
            self._waiting.remove(urgency)
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()
