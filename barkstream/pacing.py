"""Who may call a stage now: streams that are well ahead of their listeners let those go first that are not.

The server knows when it sent each chunk and how long that plays, so it knows every player's time in hand. A stream is
needy while it has sent no audio, or has next to none in hand; one with more than the pacer's lead in hand waits while any
other is needy, at most until it is down to the lead itself. Without needy streams nobody waits: no capacity is left idle.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from barkstream.peers import Peers

NEEDY_S = 0.1  # with less in hand a stream is needy
CANCEL_CHECK_S = 0.05  # how often one that waits looks for a listener who has left; Triton cannot tell us
PEERS_CHECK_S = 0.01  # and whether another process's streams are still in need


class Player:
    """A listener's player, as the server can know it: it starts at the first chunk, or plays already, and never skips."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, lead_s: float = 0.0):
        """lead_s: seconds of audio that it has in hand, of a request before; 0: it has not started."""
        self._clock = clock
        self._dry_at = clock() + lead_s if lead_s else None

    @property
    def lead_s(self) -> float:
        """Seconds of audio in hand; below 0 it has stood still so long; -inf before the first chunk."""
        return -math.inf if self._dry_at is None else self._dry_at - self._clock()

    @property
    def needy_from_s(self) -> float:
        """When it will have little in hand, by its clock."""
        return -math.inf if self._dry_at is None else self._dry_at - NEEDY_S

    def take(self, audio_s: float) -> bool:
        """A chunk of audio_s seconds was sent; whether that was too late: playback had run dry."""
        now = self._clock()
        late = self._dry_at is not None and now > self._dry_at
        self._dry_at = (now if self._dry_at is None else max(now, self._dry_at)) + audio_s
        return late


@dataclass(frozen=True)
class Hold:
    """In a crowd a first chunk is sent no sooner than so long after its request, while the second is being made already. Whoever was
    served quickly has that much more in hand when the next come; whoever was not waits no longer."""

    crowd: int  # streams live, up to which nothing is held
    until_s: (
        float  # after its request, with half as many streams again, or more; with fewer, so much less in proportion
    )

    def is_crowd(self, n_live: int) -> bool:
        """Whether with so many streams live first chunks are held, or soon will be."""
        return 0 < self.crowd <= n_live

    def left_s(self, n_live: int, since_s: float) -> float:
        """Seconds for which a first chunk is to be held on, whose request came since_s ago."""
        share = min(1.0, 2 * (n_live / self.crowd - 1)) if self.crowd else 1.0
        return max(0.0, share * self.until_s - since_s)


class Pacer:
    """Orders the stage calls of a GPU's streams by their players' leads. Threads share it."""

    def __init__(
        self,
        lead_s: float,
        clock: Callable[[], float] = time.monotonic,
        peers: Peers | None = None,
        gpu: int = 0,
    ):
        """lead_s: seconds in hand beyond which a stream may have to wait; infinity: no pacing. peers: whose streams on the GPU count, too,
        by time.monotonic."""
        self._lead_s = lead_s
        self._clock = clock
        self._peers, self._gpu = peers or Peers(gpu + 1), gpu
        self._players: set[Player] = set()
        self._changed = threading.Condition()

    @contextmanager
    def player(self, lead_s: float = 0.0) -> Iterator[Player]:
        """A new stream's player, known to the others while the block lasts. lead_s: as Player's."""
        player = Player(self._clock, lead_s)
        with self._changed:
            self._players.add(player)
            self._tell()
        try:
            yield player
        finally:
            with self._changed:
                self._players.discard(player)
                self._tell()
                self._changed.notify_all()

    @property
    def in_hand_s(self) -> float:
        """What its streams' players have in hand, s, of each no more than the lead."""
        with self._changed:
            return self._in_hand_s()

    def take(self, player: Player, audio_s: float) -> bool:
        """`player` was sent a chunk; whether that was too late. Those who waited for it may go on."""
        with self._changed:
            self._changed.notify_all()
            was_late = player.take(audio_s)
            self._tell()
            return was_late

    def wait(self, player: Player, is_cancelled: Callable[[], bool]) -> float:
        """Return when it is the stream's turn, or its listener has left; the seconds waited, 0 if it was its turn already."""
        waited_s, start, look_s = 0.0, self._clock(), 0.0  # the last: when it looks next
        with self._changed:
            while (excess_s := self._excess_s(player)) > 0:
                if waited_s >= look_s:
                    if is_cancelled():
                        break
                    look_s = waited_s + CANCEL_CHECK_S
                self._changed.wait(min(excess_s, CANCEL_CHECK_S if self._peers.is_alone else PEERS_CHECK_S))
                waited_s = self._clock() - start
        return waited_s

    def _excess_s(self, player: Player) -> float:
        """Seconds that a stream has to wait if nothing changes; 0: it is its turn."""
        excess_s, now_s = player.lead_s - self._lead_s, self._clock()
        if excess_s <= 0:
            return 0.0
        is_anybody_needy = any(other.needy_from_s < now_s for other in self._players - {player})
        return excess_s if is_anybody_needy or self._peers.is_needy_elsewhere(self._gpu, now_s) else 0.0

    def _in_hand_s(self) -> float:
        return sum(min(max(player.lead_s, 0.0), self._lead_s) for player in self._players)

    def _tell(self) -> None:
        """The peers."""
        self._peers.tell_need(self._gpu, min((player.needy_from_s for player in self._players), default=math.inf))
        if not self._peers.is_alone:
            self._peers.tell_in_hand(self._gpu, self._in_hand_s())
