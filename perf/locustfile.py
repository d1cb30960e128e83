"""Listeners for Locust: load that is steered from a web page, or without one.

    locust -f perf/locustfile.py --host 127.0.0.1:8001 --web-host 127.0.0.1          then open http://127.0.0.1:8089
    locust -f perf/locustfile.py --host 127.0.0.1:8001 --headless -u 8 -r 2 -t 60s  closed loop, 8 listeners

Three lines a text in its tables: `TTFA` (send -> first audible chunk), `speech` (send -> end; refused and failed requests are its
failures) and `playback` (milliseconds that a player starting at the first chunk stood still; more than none is a failure).
`make .venv/load` installs Locust, as `pip install -e '.[load]'` does. It exits with 1 if anything failed or stood still.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import grpc.experimental.gevent
from locust import User, constant, events, task

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Locust loads this file, it does not run it

from load_test import NO_VOICE, RETRY_S, TEXTS, default_voice

from barkstream.clients import BarkstreamError, Client
from barkstream.clients.client import Stream
from barkstream.clients.playback import simulate_playback

grpc.experimental.gevent.init_gevent()  # Locust's users are greenlets


class Underrun(Exception):
    """Playback stood still."""


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--voice", default=default_voice() or NO_VOICE, help=f"preset; {NO_VOICE}: no preset")
    parser.add_argument("--max-seconds", type=float, default=None, help="of one request's speech")


class Listener(User):
    """Listens to one speech after another, each to its end."""

    host = "127.0.0.1:8001"
    wait_time = constant(0)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.client = Client(self.host)
        self.voice = None if options.voice == NO_VOICE else options.voice
        self.max_seconds = float(options.max_seconds) if options.max_seconds else None  # the web page's are strings

    def on_stop(self) -> None:
        self.client.close()

    @task
    def short(self) -> None:
        self.listen("short")

    @task
    def medium(self) -> None:
        self.listen("medium")

    @task
    def long(self) -> None:
        self.listen("long")

    def listen(self, name: str) -> None:
        """One request, told to Locust."""
        sent = perf_counter()
        stream = self.client.stream(TEXTS[name], voice=self.voice, max_seconds=self.max_seconds)
        error = None
        try:
            for _ in stream:
                pass
        except BarkstreamError as failure:
            error = failure
        self._report(f"speech {name}", 1000 * (perf_counter() - sent), stream, error)
        if error is not None and error.status == "UNAVAILABLE":
            sleep(error.retry_after_s or RETRY_S)
        if stream.ttfa_s is not None:
            self._report(f"TTFA {name}", 1000 * stream.ttfa_s, stream)
            self._report_playback(name, stream)

    def _report_playback(self, name: str, stream: Stream) -> None:
        played = simulate_playback(stream.arrivals, self.client.sample_rate)
        error = Underrun(f"{played.n_underruns} times") if played.n_underruns else None
        self._report(f"playback {name}", 1000 * played.underrun_s, stream, error)

    def _report(self, name: str, ms: float, stream: Stream, error: Exception | None = None) -> None:
        n_bytes = 4 * sum(chunk.n_samples for chunk in stream.arrivals)
        self.environment.events.request.fire(
            request_type="gRPC", name=name, response_time=ms, response_length=n_bytes, exception=error, context={}
        )
