"""Whose turn it is on a GPU: one stage's work runs at a time, the most urgent of those that wait goes next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HEAD_START_S = 0.004  # before the work that runs is over, the next may be prepared and launched behind it
HURRIED = 2  # the highest urgency of those whom somebody waits for
FOLLOW_S = 0.005  # so soon after such work the listener's next call comes, from another stage: others let it go first
LONE = 5  # the urgency of those who let all others go first:
GRACE_S = 0.001  # also those who come so soon after work was over, for most of them come again
PATIENCE_S = 0.005  # urgencies are asked so often at least, for time changes them

Urgency = Callable[[], int]  # the lowest goes first


class Turns:
    """Hands turns to the most urgent of those who wait for one. Threads share it.

    A turn is alone until its work is launched, which then runs on the GPU. Shortly before it is over the next turn begins, so that
    the GPU does not idle while Python prepares: chosen as late as that, for somebody more urgent may come.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []
        self._preparing: Turn | None = None
        self._running: list[Turn] = []  # launched: one on the GPU, and perhaps one behind it
        self._followed_until_s = 0.0  # until then a hurried call is expected
        self._over_s = 0.0  # when the work that was over last was over

    @contextmanager
    def turn(self, urgency: Urgency) -> Iterator[Turn]:
        """The block launches work, says so (`launched`), and waits for it.

        urgency: asked when a turn is given away; of equal ones, who came first has it.
        """
        turn = Turn(self, urgency)
        with self._changed:
            self._waiting.append(turn)
            wait_s = self._give_away()
            while self._preparing is not turn:
                self._changed.wait(wait_s)
                wait_s = self._give_away()
        turn.began_s = time.monotonic()
        try:
            yield turn
        finally:
            with self._changed:
                self._end(turn)

    def _launched(self, turn: Turn, takes_s: float, is_followed: bool) -> None:
        with self._changed:
            turn.is_followed = is_followed
            before_s = max((other.over_at_s for other in self._running), default=0.0)
            turn.over_at_s = max(before_s, time.monotonic()) + takes_s
            self._preparing = None
            self._running.append(turn)
            self._give_away()
            self._changed.notify_all()  # who waits has another time to wait for

    def _extended(self, turn: Turn, takes_s: float) -> bool:
        with self._changed:
            if self._waiting or self._preparing is not None or self._running != [turn]:
                return False
            turn.over_at_s = max(turn.over_at_s, time.monotonic()) + takes_s
            return True

    def _end(self, turn: Turn) -> None:
        now_s = time.monotonic()
        turn.busy_s = now_s - max(turn.began_s, self._over_s)
        self._over_s = now_s
        if self._preparing is turn:
            self._preparing = None
        else:
            self._running.remove(turn)
        if turn.is_followed:
            self._followed_until_s = now_s + FOLLOW_S
        self._give_away()
        self._changed.notify_all()

    def _give_away(self) -> float | None:
        """A turn to the most urgent; if it is too early for that, the seconds until it may not be, None if somebody will see to it.

        One chooses, for all: urgencies change with time, so those who wait could each find that it is another's turn.
        """
        if not self._waiting or self._preparing is not None or len(self._running) > 1:
            return None
        next_up = min(self._waiting, key=lambda turn: turn.urgency())
        urgency = next_up.urgency()
        if self._running and (urgency >= LONE or (urgency > HURRIED and any(t.is_followed for t in self._running))):
            return PATIENCE_S
        if (early_s := self._due_s(urgency) - time.monotonic()) > 0:
            return early_s
        if urgency <= HURRIED:
            self._followed_until_s = 0.0
        self._waiting.remove(next_up)
        self._preparing = next_up
        self._changed.notify_all()
        return None

    def _due_s(self, urgency: int) -> float:
        """When a turn of this urgency may begin, on time.monotonic()'s clock."""
        due_s = max((turn.over_at_s for turn in self._running), default=0.0) - HEAD_START_S
        if urgency > HURRIED:
            due_s = max(due_s, self._followed_until_s)
        return max(due_s, self._over_s + GRACE_S) if urgency >= LONE else due_s


class Turn:
    """Somebody who waits, or whose turn it is."""

    def __init__(self, turns: Turns, urgency: Urgency):
        self._turns, self.urgency = turns, urgency
        self.began_s = self.over_at_s = 0.0
        self.is_followed = False
        self.busy_s = 0.0  # once it is over: the GPU's time that it took, as far as the host can tell

    def launched(self, takes_s: float, is_followed: bool = False) -> None:
        """The work is on its way to the GPU, where it takes about takes_s.

        is_followed: whoever waits for it will ask for more as soon as it is there.
        """
        self._turns._launched(self, takes_s, is_followed)

    def extended(self, takes_s: float) -> bool:
        """Whether launched work may go on for so long: if nobody else waits for a turn."""
        return self._turns._extended(self, takes_s)
