"""How many requests may be under way at once, and what one more is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from barkstream.peers import Peers


@dataclass(frozen=True)
class Backlog:
    """How much audio a server owes: what its streams lack until each has `lead_s` in hand, in all. It tells a machine that keeps up with
    many streams from one that falls behind with as many."""

    most_s: float = math.inf  # with more nobody is admitted
    lead_s: float = 0.0
    in_hand_s: Callable[[], float] = lambda: 0.0  # of all streams, of each no more than lead_s

    def owed_s(self, n_live: int) -> float:
        """With so many requests under way: one that has no player, for it is being read or does not stream, has nothing in hand."""
        return n_live * self.lead_s - self.in_hand_s()


class Admission:
    """At most n_most requests at once, and a bounded backlog; one more is refused, with a guess at when there will be room.

    Threads share it.
    """

    def __init__(self, n_most: int, peers: Peers | None = None, backlog: Backlog | None = None):
        """peers: whose requests count, too."""
        self.n_most = n_most
        self._peers = peers or Peers()
        self._backlog = backlog or Backlog()
        self._mean_s = 0.0  # how long a request takes, over about the last n_most of this process

    @property
    def n_live(self) -> int:
        """Requests under way."""
        return self._peers.n_live

    def enter(self, goes_on: bool = False) -> str | None:
        """None: there is room, and it is taken until `leave`. Else what to tell the caller. goes_on: its listener was admitted before, and
        is in the middle of a conversation: whatever is owed, there is room for the rest."""
        with self._peers.together():
            n_live = self._peers.n_live
            if n_live >= self.n_most:
                return f"all {self.n_most} streams of this server are busy; {self._hint()}"
            most_s = math.inf if goes_on else self._backlog.most_s
            if math.isfinite(most_s) and self._backlog.owed_s(n_live) > most_s:
                return f"this server's streams lack more than {most_s:g} s of audio; {self._hint()}"
            self._peers.count_live(1)
            return None

    def leave(self, took_s: float) -> None:
        """A request has ended, after took_s seconds."""
        with self._peers.together():
            self._peers.count_live(-1)
            self._mean_s += (took_s - self._mean_s) / self.n_most

    def _hint(self) -> str:
        """While n_most are under way one ends every mean / n_most seconds: that, in whole seconds."""
        return f"retry after {max(1, math.ceil(self._mean_s / self.n_most))} s"
