"""How many requests may be under way at once, and what one more is told."""

from __future__ import annotations

import math

from barkstream.peers import Peers


class Admission:
    """At most n_most requests at once; one more is refused, with a guess at when there will be room. Threads share it."""

    def __init__(self, n_most: int, peers: Peers | None = None):
        """peers: whose requests count, too."""
        self.n_most = n_most
        self._peers = peers or Peers()
        self._mean_s = 0.0  # how long a request takes, over about the last n_most of this process

    @property
    def n_live(self) -> int:
        """Requests under way."""
        return self._peers.n_live

    def enter(self) -> bool:
        """Whether there is room; if so, it is taken until `leave`."""
        with self._peers.together():
            admitted = self._peers.n_live < self.n_most
            self._peers.count_live(int(admitted))
            return admitted

    def leave(self, took_s: float) -> None:
        """A request has ended, after took_s seconds."""
        with self._peers.together():
            self._peers.count_live(-1)
            self._mean_s += (took_s - self._mean_s) / self.n_most

    def refusal(self) -> str:
        """While n_most are under way one ends every mean / n_most seconds: that, in whole seconds, is the hint."""
        retry_s = max(1, math.ceil(self._mean_s / self.n_most))
        return f"all {self.n_most} streams of this server are busy; retry after {retry_s} s"
