"""Whose turn it is on a GPU: one stage works at a time, the most urgent of those that wait goes next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Urgency = Callable[[], int]  # the lowest goes first


class Turns:
    """A lock that is handed to the most urgent of those who wait for it. Threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._owner: _Ticket | None = None

    @contextmanager
    def turn(self, urgency: Urgency) -> Iterator[None]:
        """The block runs alone. urgency: asked when a turn is given away; of equal ones, who came first has it."""
        ticket = _Ticket(urgency)
        with self._changed:
            self._waiting.append(ticket)
            if self._owner is None:
                self._give_away()
            self._changed.wait_for(lambda: self._owner is ticket)
        try:
            yield
        finally:
            with self._changed:
                self._owner = None
                if self._waiting:
                    self._give_away()

    def _give_away(self) -> None:
        """One chooses, for all: urgencies change with time, so those who wait could each find that it is another's turn."""
        self._owner = min(self._waiting, key=lambda ticket: ticket.urgency())
        self._waiting.remove(self._owner)
        self._changed.notify_all()


class _Ticket:
    """Somebody who waits, or whose turn it is."""

    def __init__(self, urgency: Urgency):
        self.urgency = urgency
