"""Listeners who leave: how soon does the server free their rows, and does it survive a storm of them?

    python3 perf/cancel_storm.py [--url HOST:PORT --metrics-url http://HOST:PORT/metrics] [--streams 200] [--at-once 8]

Waves of streams: all begin, and after a random while (0 to --listen seconds) all leave at once. A stream is free when the server
counts it as live no more, which is after both of its KV slots are free; that is read from its metrics, some 2 ms apart. At the
end the gauges must be at zero and a request must be answered, else the exit status is 1. Table first, last line JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from load_report import append_row, exit_with, origin, percentiles
from load_test import NO_VOICE, default_voice

from barkstream.clients import BarkstreamError, Client
from barkstream.clients.client import Stream
from barkstream.server import Server

TEXT = "This goes on for longer than anybody will listen, and so on, and so forth. " * 8
LIVE = "barkstream_live_streams"
SLOTS = ("barkstream_semantic_kv_slots", "barkstream_coarse_kv_slots")
TIMEOUT_S = 60.0  # for a wave to begin, and to be gone


class Metrics:
    """A server's metrics, over one connection."""

    def __init__(self, url: str):
        self._path = urlsplit(url).path
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)

    def read(self) -> dict[str, float]:
        """Values by name; labelled ones are left out."""
        self._connection.request("GET", self._path)
        page = self._connection.getresponse().read().decode()
        return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", page, re.MULTILINE)}

    def wait(self, name: str, value: float) -> bool:
        """Ask until it has that value; False after TIMEOUT_S."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            if self.read()[name] == value:
                return True
        return False


def main() -> int:
    arguments = parse_arguments()
    where = origin(arguments.gpu, arguments.n_gpus, arguments.commit, arguments.model)
    with open_server(arguments) as (url, metrics_url), Client(url) as client:
        row = {**where, **storm(client, Metrics(metrics_url), arguments), "note": arguments.note}
    print(
        f"{row['streams']} streams left, {row['at_once']} at once: freed after {row['freed_ms_p50']} ms (p50),", end=" "
    )
    print(
        f"{row['freed_ms_p95']} ms (p95), {row['freed_ms_max']} ms (largest); {row['left_behind']} left behind;",
        end=" ",
    )
    print("the server answers" if row["answered_after"] else "the server answers no more")
    if arguments.output:
        append_row(arguments.output, row)
    print(json.dumps(row))
    return 0 if row["answered_after"] and not row["left_behind"] else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="host:port of a running server's gRPC; without, one is started")
    parser.add_argument("--metrics-url", default="http://127.0.0.1:8002/metrics", help="default: %(default)s")
    parser.add_argument("--streams", type=int, default=200, help="in all (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=8, help="a wave (default: %(default)s)")
    parser.add_argument("--listen", type=float, default=1.0, metavar="S", help="at most (default: %(default)s)")
    parser.add_argument("--voice", default=default_voice() or NO_VOICE, help=f"{NO_VOICE}: no preset")
    parser.add_argument("--output", type=Path, help="perf/results/*-cancel.json that gets the row")
    parser.add_argument("--model", help="what the server speaks with (default: what was exported last)")
    parser.add_argument("--gpu", help="the server's GPU (default: this machine's)")
    parser.add_argument("--n-gpus", type=int, help="that the server uses (default: this machine's)")
    parser.add_argument("--commit", help="of the server (default: this checkout's)")
    parser.add_argument("--note", default="", help="a remark that is kept with the row")
    return parser.parse_args()


@contextlib.contextmanager
def open_server(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The URLs of gRPC and metrics: the given ones, or those of a server that lives as long as the block."""
    if arguments.url:
        yield arguments.url, arguments.metrics_url
        return
    with Server() as started:
        yield started.grpc_url, started.metrics_url


def storm(client: Client, metrics: Metrics, arguments: argparse.Namespace) -> dict[str, Any]:
    """All waves, and what became of the server."""
    voice = None if arguments.voice == NO_VOICE else arguments.voice
    speak(client, voice)  # the first request pays for what is made at first use
    before = metrics.read()
    generator, freed_s = random.Random(0), list[float]()
    while (n := min(arguments.at_once, arguments.streams - len(freed_s))) > 0:
        freed = wave(client, metrics, voice, n, generator.uniform(0, arguments.listen))
        freed_s += freed
        if len(freed) < n:
            break
    return {
        "streams": len(freed_s),
        "at_once": arguments.at_once,
        **percentiles("freed_ms", [1000 * s for s in freed_s]),
        "freed_ms_max": round(1000 * max(freed_s, default=0.0), 2),
        "left_behind": n_held(metrics.read(), before),
        "answered_after": speak(client, voice),
    }


def wave(client: Client, metrics: Metrics, voice: str | None, n: int, listen_s: float) -> list[float]:
    """n streams begin, and leave at once; the seconds after which each was free, fewer if the server keeps some."""
    before = metrics.read()
    streams = [client.stream(TEXT, voice=voice) for _ in range(n)]
    listeners = [threading.Thread(target=listen, args=[stream]) for stream in streams]
    for listener in listeners:
        listener.start()
    if not metrics.wait(LIVE, n):
        raise SystemExit(f"only {metrics.read()[LIVE]:g} of {n} streams began")
    time.sleep(listen_s)
    left_at = time.perf_counter()
    for stream in streams:
        stream.close()
    freed_s = watch(metrics, n, before, left_at)
    for listener in listeners:
        listener.join()
    return freed_s


def watch(metrics: Metrics, n: int, before: dict[str, float], left_at: float) -> list[float]:
    """When each of n live streams was live no more, in seconds since left_at."""
    freed_s: list[float] = []
    since_s = 0.0
    while len(freed_s) < n and since_s < TIMEOUT_S:
        gauges = metrics.read()
        since_s = time.perf_counter() - left_at
        freed_s += [since_s] * (n - n_held(gauges, before) - len(freed_s))
    return freed_s


def n_held(gauges: dict[str, float], before: dict[str, float]) -> int:
    """Streams that are live or hold a slot, beyond those who did before (a caller of a stage may keep a slot of its own)."""
    return int(max(gauges[name] - before[name] for name in (LIVE, *SLOTS)))


def listen(stream: Stream) -> None:
    """Thread: take the chunks until the stream is closed."""
    with contextlib.suppress(BarkstreamError):
        for _ in stream:
            pass


def speak(client: Client, voice: str | None) -> bool:
    """Whether a short request is answered in full."""
    with contextlib.suppress(BarkstreamError):
        return bool(client.speak("All is well.", voice=voice, seed=1, max_seconds=2).size)
    return False


if __name__ == "__main__":
    exit_with(main)
