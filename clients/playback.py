"""What a listener would hear: arrival times of chunks against the clock of a player."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AUDIBLE_PEAK = 10 ** (-50 / 20)  # -50 dBFS: quieter than this is silence to a listener


@dataclass(frozen=True)
class Arrival:
    """One chunk as it reached the client."""

    at_s: float  # since the request was sent
    n_samples: int
    peak: float  # largest |sample|, 0..1


@dataclass(frozen=True)
class Playback:
    """A player that starts at the first chunk and never skips."""

    n_underruns: int  # times that it ran dry before the last chunk
    underrun_s: float  # silence that it had to put in, in all
    in_hand_s: float  # audio still to be played when the last chunk had arrived
    smallest_lead_s: float | None  # least audio in hand when a chunk arrived; negative: late; None: fewer than 2 chunks


def simulate_playback(arrivals: Sequence[Arrival], sample_rate: int) -> Playback:
    """Play `arrivals` in order: a chunk that comes after the audio in hand has run out is an underrun."""
    leads_s: list[float] = []
    dry_at_s = 0.0  # when the audio in hand runs out
    for i, chunk in enumerate(arrivals):
        if i > 0:
            leads_s.append(dry_at_s - chunk.at_s)
        dry_at_s = max(dry_at_s, chunk.at_s) + chunk.n_samples / sample_rate
    late_s = [-lead for lead in leads_s if lead < 0]
    in_hand_s = dry_at_s - arrivals[-1].at_s if arrivals else 0.0
    return Playback(len(late_s), sum(late_s), in_hand_s, min(leads_s, default=None))


def time_to_first_audio(arrivals: Sequence[Arrival]) -> float | None:
    """TTFA in seconds: from sending the request to the first chunk that holds anything louder than AUDIBLE_PEAK.

    None if nothing audible came. Leading chunks of silence do not count; `arrivals[0].at_s` is the first chunk's time.
    """
    return next((chunk.at_s for chunk in arrivals if chunk.peak > AUDIBLE_PEAK), None)
