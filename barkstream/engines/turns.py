"""Whose turn it is on a GPU: one stage's work runs at a time, the most urgent of those that wait goes next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HEAD_START_S = 0.004  # before the work that runs is over, the next may be prepared and launched behind it
AT_ONCE = -1  # the urgency of those whose listener has no audio yet
HURRIED = 2  # the highest of those whom somebody waits for
UNHURRIED = 3  # the lowest of the others
FOLLOW_S = 0.005  # so soon after such work the listener's next call comes, from another stage: others let it go first
LONE = 5  # the urgency of those who let all others go first:
GRACE_S = 0.001  # also those who come so soon after work was over, for most of them come again
HALT_S = 0.001  # work that is halted is over after so long
PATIENCE_S = 0.005  # urgencies are asked so often at least, for time changes them
NOBODY = 99  # a rank above all

Urgency = Callable[[], int]  # the lowest goes first
Rank = Callable[[], int]
Since = Callable[[], float]  # on time.monotonic()'s clock; of equal urgencies the earliest goes first


@dataclass(frozen=True)
class Launch:
    """Work on its way to the GPU."""

    takes_s: float  # about
    is_followed: bool = False  # whoever waits for it will ask for more as soon as it is there
    halt: Callable[[], None] | None = None  # ends it early; None: nothing does
    rank: int = 0  # whoever has a lower one may have it halted
    least_s: float = 0.0  # before so much of it is over it cannot be halted: prefills


class Turns:
    """Hands turns to the most urgent of those who wait for one. Threads share it.

    A turn is alone until its work is launched, which then runs on the GPU. Shortly before it is over the next turn begins, so that
    the GPU does not idle while Python prepares: chosen as late as that, for somebody more urgent may come. Who comes later and has a
    lower rank than what runs has it halted, if it can be: not at once, but when what comes in its place has been prepared.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []
        self._preparing: Turn | None = None
        self._running: list[Turn] = []  # launched: one on the GPU, and perhaps one behind it
        self._followed_until_s = 0.0  # until then a hurried call is expected
        self._over_s = 0.0  # when the work that was over last was over

    @contextmanager
    def turn(
        self,
        urgency: Urgency,
        rank: Rank = lambda: NOBODY,
        meanwhile: Callable[[], None] = lambda: None,
        since: Since | None = None,
    ) -> Iterator[Turn]:
        """The block launches work, says so (`launched`), and waits for it.

        urgency: asked when a turn is given away. rank: that of the work, as far as it is known. meanwhile: what there is time for if the
        turn does not begin at once. since: when the most urgent of its calls came; None: now.
        """
        turn = Turn(self, urgency, rank, since)
        with self._changed:
            self._waiting.append(turn)
            self._give_away()
            is_at_once = self._preparing is turn
        if not is_at_once:
            meanwhile()
        with self._changed:
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

    def hurry(self, rank: int, own: Turn | None = None) -> None:
        """A call of this rank has come, whose stage will want a turn at once.

        own: the stage's turn that is under way. It has to be over before the next one, so it is halted now, or when it is launched, if its
        rank is higher. For others' work there is time until the call's is about to be launched: meanwhile the GPU has something to do.
        """
        with self._changed:
            for turn in self._running:
                if rank < turn.launch.rank and turn.launch.halt:
                    turn.wanted_by = min(turn.wanted_by, rank)
                    self._followed_until_s = max(self._followed_until_s, time.monotonic() + FOLLOW_S)
            if own and own is self._preparing:
                own.wanted_by = min(own.wanted_by, rank)
            if own in self._running and rank < own.launch.rank:
                self._halt(own)
            self._make_room(rank)
            self._give_away()
            self._changed.notify_all()

    def _make_room(self, rank: int) -> None:
        """Behind two that run nothing can be prepared, so for a call of this rank the first is halted; the second keeps the GPU busy."""
        if len(self._running) > 1 and rank < self._running[0].launch.rank:
            self._halt(self._running[0])

    def _halt(self, turn: Turn) -> None:
        """Work that was launched."""
        if turn.launch.halt is None or turn.is_halted:
            return
        turn.launch.halt()
        turn.is_halted = True
        early_s = turn.over_at_s - self._halted_at_s(turn)
        if early_s > 0:
            for later in self._running[self._running.index(turn) :]:
                later.over_at_s -= early_s
                later.begins_s -= early_s if later is not turn else 0.0

    def _halted_at_s(self, turn: Turn) -> float:
        """When launched work is over that is halted now."""
        return max(time.monotonic(), turn.begins_s + turn.launch.least_s) + HALT_S

    def _halt_for(self, rank: int) -> None:
        """Work of such a rank is about to be launched, or just was."""
        for turn in self._running:
            if rank < turn.launch.rank:
                self._halt(turn)

    def _launching(self, rank: int) -> None:
        with self._changed:
            self._halt_for(rank)

    def _launched(self, turn: Turn, launch: Launch) -> None:
        with self._changed:
            turn.launch = launch
            self._halt_for(min(launch.rank, turn.wanted_by))
            before_s = max((other.over_at_s for other in self._running), default=0.0)
            turn.begins_s = max(before_s, time.monotonic())
            turn.over_at_s = turn.begins_s + launch.takes_s
            self._preparing = None
            self._running.append(turn)
            if turn.wanted_by < launch.rank:
                self._halt(turn)
            self._give_away()
            self._changed.notify_all()  # who waits has another time to wait for

    def _ended_early(self, turn: Turn) -> None:
        with self._changed:
            if turn in self._running:
                self._halt(turn)

    def _extended(self, turn: Turn, takes_s: float) -> bool:
        with self._changed:
            is_wanted = turn.is_halted or turn.wanted_by < turn.launch.rank
            if self._waiting or self._preparing is not None or self._running != [turn] or is_wanted:
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
        if (turn.launch.is_followed and not turn.is_halted) or turn.urgency() <= HURRIED:
            self._followed_until_s = now_s + FOLLOW_S
        self._give_away()
        self._changed.notify_all()

    def _give_away(self) -> float | None:
        """A turn to the most urgent; if it is too early for that, the seconds until it may not be, None if somebody will see to it.

        One chooses, for all: urgencies change with time, so those who wait could each find that it is another's turn.
        """
        if not self._waiting or self._preparing is not None:
            return None
        rank = min(turn.rank() for turn in self._waiting) if self._running else NOBODY
        if len(self._running) > 1:
            self._make_room(rank)
            return None
        urgencies = [turn.urgency() for turn in self._waiting]
        urgency = min(urgencies)
        next_up = _first_called([turn for turn, each in zip(self._waiting, urgencies, strict=True) if each == urgency])
        if self._running and (urgency >= LONE or self._is_kept_from(urgency)):
            return PATIENCE_S
        if (early_s := self._due_s(urgency, rank) - time.monotonic()) > 0:
            return early_s
        if urgency <= HURRIED:
            self._followed_until_s = 0.0
        self._waiting.remove(next_up)
        self._preparing = next_up
        self._changed.notify_all()
        return None

    def _is_kept_from(self, urgency: int) -> bool:
        """Whether the turn behind those that run is kept for somebody more urgent: the next call of a listener whom one of them is for,
        or a call that waits for one of them to be over, for it is of the same stage."""
        own = min(turn.urgency() for turn in self._running)
        is_waited_for = own <= HURRIED or any(turn.launch.is_followed for turn in self._running)
        return own <= AT_ONCE < urgency or (urgency > HURRIED and is_waited_for)

    def _due_s(self, urgency: int, rank: int) -> float:
        """When a turn of this urgency may begin, on time.monotonic()'s clock. rank: the lowest of those who wait."""
        due_s = max((self._free_at_s(turn, rank) for turn in self._running), default=0.0) - HEAD_START_S
        if urgency > HURRIED:
            due_s = max(due_s, self._followed_until_s)
        return max(due_s, self._over_s + GRACE_S) if urgency >= LONE else due_s

    def _free_at_s(self, turn: Turn, rank: int) -> float:
        """When launched work is over, or could be for a call of this rank."""
        if turn.launch.halt is None or turn.launch.rank <= rank:
            return turn.over_at_s
        return min(turn.over_at_s, self._halted_at_s(turn))


class Turn:
    """Somebody who waits, or whose turn it is."""

    def __init__(self, turns: Turns, urgency: Urgency, rank: Rank, since: Since | None = None):
        self._turns, self.urgency, self.rank = turns, urgency, rank
        asked_s = time.monotonic()
        self.since = since or (lambda: asked_s)
        self.began_s = 0.0  # the block
        self.begins_s = self.over_at_s = 0.0  # its work on the GPU, as far as the host can tell
        self.launch = Launch(0.0)
        self.wanted_by = NOBODY  # the lowest rank of the calls that came meanwhile and would have it over
        self.is_halted = False
        self.busy_s = (
            0.0  # once it is over: the GPU's time that it took, Python's included, as far as the host can tell
        )

    def launching(self, rank: int) -> None:
        """Work of this rank is about to be launched: what is halted for it stands by then. Need not be said."""
        self._turns._launching(rank)

    def launched(self, launch: Launch) -> None:
        """The work is on its way to the GPU."""
        self._turns._launched(self, launch)

    def halt(self) -> None:
        """End the launched work early, if it can be. Any thread may call it."""
        self._turns._ended_early(self)

    def extended(self, takes_s: float) -> bool:
        """Whether launched work may go on for so long: if nobody else waits for a turn."""
        return self._turns._extended(self, takes_s)


def _first_called(turns: list[Turn]) -> Turn:
    """Of equally urgent ones. A stage waits as soon as its last batch is over, with calls that are in no hurry; so what counts is when the
    call came that is."""
    return turns[0] if len(turns) == 1 else min(turns, key=lambda turn: turn.since())
