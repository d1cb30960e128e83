"""Time to first audio, real-time factor and underruns of a server under one closed-loop client.

    python perf/ttfa.py [--url HOST:PORT] [--n 10]      # without --url: starts a server for the measurement

Each case is one text and one voice, asked for n times with the seeds 0..n-1, one at a time, after a warm-up request.
TTFA: client's send -> first audible chunk at the client. RTF: send -> last chunk / duration of the audio. Underruns: of
a player that starts at the first chunk. A failed request stays in the table. The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from math import ceil
from typing import Any

import numpy as np
from machine import machine

from barkstream import server
from barkstream.clients import BarkstreamError, Client
from barkstream.clients.report import measure

SHORT = "Good morning, how are you today? I hope you slept well."  # about 3 s
LONG = (
    "The train left the station a little after seven, and the rain had stopped by then. "
    "Nobody in the carriage said a word until the first tunnel. "
    "Then an old man opened his bag and offered everyone an apple. "
    "They were small and green, and they tasted of autumn. "
) * 4  # about a minute


def main() -> int:
    arguments = parse_arguments()
    with open_server(arguments.url) as url, Client(url) as client:
        rows = [
            measure_case(client, name, text, voice, arguments.n if name == "short" else ceil(arguments.n / 3))
            for voice in arguments.voice or [default_voice(), None]
            for name, text in (("short", SHORT), ("long", LONG))
            if name in arguments.text
        ]
    print_table(rows)
    where = machine("nvidia-pytriton", "onnxruntime")
    print(json.dumps({"benchmark": "ttfa", "load": "closed loop, 1 client", "machine": where, "cases": rows}))
    return 1 if any(row["n_failed"] for row in rows) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="host:port of a running server's gRPC; without, one is started")
    parser.add_argument(
        "--n", type=int, default=10, help="requests a case; of the long text a third (default: %(default)s)"
    )
    parser.add_argument("--text", nargs="+", choices=["short", "long"], default=["short", "long"])
    parser.add_argument("--voice", action="append", help="repeatable; without: the first preset, and none")
    return parser.parse_args()


@contextlib.contextmanager
def open_server(url: str | None) -> Iterator[str]:
    if url:
        yield url
        return
    with server.Server() as started:
        yield started.grpc_url


def default_voice() -> str | None:
    """The first voice preset of the model repository."""
    folder = server.MODEL_REPOSITORY / "bark/1/voices"
    return next((path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.npz"))), None)


def measure_case(client: Client, name: str, text: str, voice: str | None, n: int) -> dict[str, Any]:
    """n requests, one after another, after a warm-up with the short text."""
    request(client, SHORT, voice, seed=n)
    outcomes = [request(client, text, voice, seed) for seed in range(n)]
    done = [outcome for outcome in outcomes if "error" not in outcome]
    return {
        "text": name,
        "voice": voice,
        "n": n,
        "n_failed": n - len(done),
        "errors": sorted({outcome["error"] for outcome in outcomes if "error" in outcome}),
        "audio_s_mean": mean(done, "audio_s"),
        **percentiles(done, "ttfa_ms"),
        **percentiles(done, "first_chunk_ms"),
        **percentiles(done, "rtf"),
        "n_with_underruns": sum(outcome["n_underruns"] > 0 for outcome in done),
        "underrun_s": round(sum(outcome["underrun_s"] for outcome in done), 3),
    }


def request(client: Client, text: str, voice: str | None, seed: int) -> dict[str, Any]:
    """One measured request; a failure is `error`, its sentence."""
    stream = client.stream(text, voice=voice, seed=seed)
    try:
        for _ in stream:
            pass
    except BarkstreamError as error:
        return {"error": f"{error.status}: {error}"}
    if stream.ttfa_s is None:
        return {"error": "nothing audible came"}
    return measure(stream, client.sample_rate)


def percentiles(outcomes: list[dict[str, Any]], key: str) -> dict[str, float | None]:
    values = [outcome[key] for outcome in outcomes]
    return {f"{key}_p{p}": round(float(np.percentile(values, p)), 3) if values else None for p in (50, 95)}


def mean(outcomes: list[dict[str, Any]], key: str) -> float | None:
    return round(float(np.mean([outcome[key] for outcome in outcomes])), 2) if outcomes else None


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'text':6} {'voice':16} {'n':>3} {'failed':>6} {'audio s':>8} {'TTFA ms p50':>12} {'p95':>7}", end="")
    print(f" {'RTF p50':>8} {'p95':>6} {'underruns':>10} {'s':>6}")
    for row in rows:
        cells = [row["audio_s_mean"], row["ttfa_ms_p50"], row["ttfa_ms_p95"], row["rtf_p50"], row["rtf_p95"]]
        widths = ("8.2f", "12.0f", "7.0f", "8.2f", "6.2f")
        numbers = (
            f"{cell:{w}}" if cell is not None else f"{'-':>{w.split('.')[0]}}"
            for cell, w in zip(cells, widths, strict=True)
        )
        print(f"{row['text']:6} {row['voice'] or '-':16} {row['n']:3} {row['n_failed']:6}", *numbers, end="")
        print(f" {row['n_with_underruns']:6} of {row['n'] - row['n_failed']} {row['underrun_s']:6.2f}")
    for error in sorted({error for row in rows for error in row["errors"]}):
        print(f"failed: {error}")


if __name__ == "__main__":
    sys.exit(main())
