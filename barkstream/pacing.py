"""Whose stage call is made next: that of the listener who would run dry first.

The server knows when it sent each chunk and how long that plays, so it knows every player's time in hand. A stage decodes
so many calls together with profit; more than that would only wait in its queue, in the order of their coming. So they
wait here: who has heard nothing yet goes first, then who is nearest to an underrun; a stream well ahead of playback
yields. No capacity is left idle for it: while there is room in a stage, nobody waits.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CANCEL_CHECK_S = 0.05  # how often one that waits looks for a listener who has left; Triton cannot tell us

Deadline = tuple[bool, float]  # has been sent audio; since when it waits for it, or when playback runs dry


class Cancelled(Exception):
    """The listener has left."""


class Player:
    """A listener's player, as the server can know it: it starts at the first chunk and never skips."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._began_at = clock()
        self._dry_at: float | None = None

    @property
    def age_s(self) -> float:
        """Since its request was taken in."""
        return self._clock() - self._began_at

    @property
    def is_silent(self) -> bool:
        """Nothing has been sent yet."""
        return self._dry_at is None

    @property
    def deadline(self) -> Deadline:
        """The smallest is the most urgent: no audio yet, the oldest first; then the nearest to an underrun."""
        return (False, self._began_at) if self._dry_at is None else (True, self._dry_at)

    def take(self, audio_s: float) -> bool:
        """A chunk of audio_s seconds was sent; whether that was too late: playback had run dry."""
        now = self._clock()
        late = self._dry_at is not None and now > self._dry_at
        self._dry_at = (now if self._dry_at is None else max(now, self._dry_at)) + audio_s
        return late


class Turns:
    """Turns at one stage, for all streams. Threads share it."""

    def __init__(self, n_at_once: int):
        """n_at_once: calls that may be under way at a time."""
        self._n_free = n_at_once
        self._waiting: list[tuple[Deadline, int]] = []
        self._numbers = itertools.count()  # the order of their coming, for equal deadlines
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, player: Player, is_cancelled: Callable[[], bool]) -> Iterator[float]:
        """The block is one call; gives the seconds waited for it. Raises Cancelled when the listener has left."""
        waited_s = self._enter(player, is_cancelled)
        try:
            yield waited_s
        finally:
            with self._changed:
                self._n_free += 1
                self._changed.notify_all()

    def _enter(self, player: Player, is_cancelled: Callable[[], bool]) -> float:
        if is_cancelled():
            raise Cancelled
        with self._changed:
            mine = (player.deadline, next(self._numbers))
            self._waiting.append(mine)
            try:
                waited_s = self._wait(mine, is_cancelled)
                self._n_free -= 1
            finally:
                self._waiting.remove(mine)
                self._changed.notify_all()
        return waited_s

    def _wait(self, mine: tuple[Deadline, int], is_cancelled: Callable[[], bool]) -> float:
        """Until there is room and nobody is more urgent; the seconds waited, 0 if it was so at once."""
        waited_s, start = 0.0, time.monotonic()
        while not self._n_free or min(self._waiting) != mine:
            self._changed.wait(CANCEL_CHECK_S)
            if is_cancelled():
                raise Cancelled
            waited_s = time.monotonic() - start
        return waited_s
