"""What one request was like for its listener, for people and as JSON."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from barkstream.clients.playback import simulate_playback
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


def show_progress(
    chunks: Iterable[NDArray[np.float32]], stream: Received, sample_rate: int, out: TextIO = sys.stderr
) -> Iterator[NDArray[np.float32]]:
    """The same chunks, with a bar on a terminal (else a line a chunk) that grows as audio arrives."""
    live = out.isatty()
    audio_s = 0.0
    try:
        for chunk in chunks:
            audio_s += len(chunk) / sample_rate
            line = _progress_line(stream, audio_s, sample_rate, shutil.get_terminal_size().columns if live else 0)
            out.write(f"\r\033[K{line}" if live else f"{line}\n")
            out.flush()
            yield chunk
    finally:
        if live:
            out.write("\n")


def _progress_line(stream: Received, audio_s: float, sample_rate: int, n_columns: int) -> str:
    first, last = stream.arrivals[0], stream.arrivals[-1]
    ahead_s = audio_s - (last.at_s - first.at_s)  # of a player that started at the first chunk
    line = f"{audio_s:6.2f} s of speech  {audio_s / last.at_s:5.1f} x real time  {ahead_s:5.1f} s ahead"
    width = min(n_columns - len(line) - 3, 40)
    if width < 8:
        return line
    cell_s = 0.25  # of audio; doubled whenever the bar is full
    while audio_s > cell_s * width:
        cell_s *= 2
    n_cells, n_played = round(audio_s / cell_s), round(max(0.0, audio_s - ahead_s) / cell_s)
    bar = "█" * min(n_played, n_cells) + "▒" * max(0, n_cells - n_played)  # played, in hand
    return f" {bar:<{width}} {line}"
