"""What one request was like for its listener, for people and as JSON."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from barkstream.clients.client import Stream
from barkstream.clients.playback import Arrival, simulate_playback
from barkstream.clients.protocol import Received


def measure(stream: Received, sample_rate: int) -> dict[str, Any]:
    """Measurements of a stream that was read to its end. The unit is in the key; None: there was no audio.

    rtf: time from sending the request to the last chunk / duration of the audio.
    """
    arrivals, playback = stream.arrivals, simulate_playback(stream.arrivals, sample_rate)
    audio_s = sum(chunk.n_samples for chunk in arrivals) / sample_rate
    return {
        "seed": stream.seed,
        "audio_s": round(audio_s, 3),
        "n_chunks": len(arrivals),
        "chunks_s": [round(chunk.n_samples / sample_rate, 3) for chunk in arrivals],
        "ttfa_ms": None if stream.ttfa_s is None else round(stream.ttfa_s * 1000, 1),
        "first_chunk_ms": round(arrivals[0].at_s * 1000, 1) if arrivals else None,
        "rtf": round(arrivals[-1].at_s / audio_s, 3) if arrivals else None,
        "n_underruns": playback.n_underruns,
        "underrun_s": round(playback.underrun_s, 3),
        "smallest_lead_s": None if playback.smallest_lead_s is None else round(playback.smallest_lead_s, 3),
    }


def describe(measured: dict[str, Any]) -> str:
    """`measure`'s result in a few lines."""
    if not measured["n_chunks"]:
        return f"seed       {measured['seed']}\naudio      none"
    ttfa = "nothing audible" if measured["ttfa_ms"] is None else f"{measured['ttfa_ms']:.0f} ms"
    lead = "" if measured["smallest_lead_s"] is None else f", smallest lead {measured['smallest_lead_s']:.2f} s"
    return "\n".join(
        [
            f"seed       {measured['seed']}",
            f"audio      {measured['audio_s']:.2f} s",
            f"chunks     {measured['n_chunks']}: {' '.join(f'{s:.2f}' for s in measured['chunks_s'])} s",
            f"TTFA       {ttfa} (first chunk {measured['first_chunk_ms']:.0f} ms)",
            f"RTF        {measured['rtf']:.2f} ({1 / max(measured['rtf'], 1e-3):.1f} x real time)",
            f"underruns  {measured['n_underruns']} ({measured['underrun_s']:.2f} s{lead})",
        ]
    )


def show_progress(stream: Stream, sample_rate: int) -> Iterator[NDArray[np.float32]]:
    """The stream's chunks; on stderr a bar that grows as they arrive, or a line a chunk where stderr is no terminal."""
    out = sys.stderr
    live = out.isatty()
    try:
        for chunk in stream:
            line = _progress_line(stream.arrivals, sample_rate, shutil.get_terminal_size().columns if live else 0)
            out.write(f"\r\033[K{line}" if live else f"{line}\n")
            out.flush()
            yield chunk
    finally:
        if live and stream.arrivals:
            out.write("\n")


def _progress_line(arrivals: list[Arrival], sample_rate: int, n_columns: int) -> str:
    audio_s = sum(chunk.n_samples for chunk in arrivals) / sample_rate
    in_hand_s = simulate_playback(arrivals, sample_rate).in_hand_s
    line = f"{audio_s:6.2f} s of speech  {audio_s / arrivals[-1].at_s:5.1f} x real time  {in_hand_s:5.1f} s ahead"
    width = min(n_columns - len(line) - 3, 40)
    if width < 8:
        return line
    cell_s = 0.25  # of audio; doubled whenever the bar is full
    while audio_s > cell_s * width:
        cell_s *= 2
    n_cells, n_in_hand = round(audio_s / cell_s), round(in_hand_s / cell_s)
    bar = "█" * (n_cells - n_in_hand) + "▒" * n_in_hand  # played, in hand
    return f" {bar:<{width}} {line}"
