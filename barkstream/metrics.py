"""What the Python models count, for Prometheus: on Triton's own metrics endpoint, beside Triton's metrics.

Names, types and labels: docs/load.md. `family` is Triton's `pb_utils.MetricFamily`, handed in because only bls.py knows Triton.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable
from itertools import product
from queue import SimpleQueue
from typing import Any

from barkstream.engines.workers import Work
from barkstream.guard import ACTIONS, FAULTS

FIRST_CHUNK_BUCKETS_S = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1, 2, 5, 10)
STAGES = ("bark_semantic", "bark_coarse", "bark_fine", "bark_codec")
REQUEST, SPEAKER = "request", "bark"  # whose error it was, if no stage's: the caller's, or our own
SOON_S = 0.01  # whoever counts has an answer to give, and is not to share Python with the updates meanwhile


class _Updates:
    """Updates metrics on a thread of its own, a little later, and what adds up at once: each is a message to Triton and back, some 50 us
    that no listener has to wait for.

    One for a process, because a process is what Triton gives a Python model, and two threads that update metrics at once crash the
    Python backend of Triton 2.51.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[float], None], float, bool]] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, update: Callable[[float], None], value: float, adds_up: bool) -> None:
        """adds_up: one update with the sum is as good as some."""
        self._queue.put((update, value, adds_up))
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            told = [self._queue.get()]
            time.sleep(SOON_S)
            told += [self._queue.get() for _ in range(self._queue.qsize())]  # nobody else takes any
            sums: dict[Callable[[float], None], float] = {}
            for update, value, adds_up in told:
                if adds_up:
                    sums[update] = sums.get(update, 0.0) + value
                else:
                    self._update(update, value)
            for update, value in sums.items():
                self._update(update, value)

    def _update(self, update: Callable[[float], None], value: float) -> None:
        try:
            update(value)
        except Exception:  # one that Triton does not take must not be the last
            traceback.print_exc()


_UPDATES = _Updates()


class Metric:
    """One time series, which threads may share. It is updated soon after it was told."""

    def __init__(self, metric: Any):
        self._increment, self._observe = metric.increment, metric.observe

    def increment(self, by: float = 1) -> None:
        _UPDATES.put(self._increment, by, True)

    def observe(self, value: float) -> None:
        _UPDATES.put(self._observe, value, False)


class Metrics:
    """Makes metrics and keeps their families: a metric lives as long as its family."""

    def __init__(self, family: Any):
        self._family = family
        self._families: list[Any] = []

    def gauge(self, name: str, description: str) -> Metric:
        return Metric(self._new(name, description, self._family.GAUGE).Metric(labels={}))

    def counter(self, name: str, description: str) -> Metric:
        return Metric(self._new(name, description, self._family.COUNTER).Metric(labels={}))

    def counters(self, name: str, description: str, label: str, values: Iterable[str]) -> dict[str, Metric]:
        """A counter for each value of a label, all of them exposed from the start."""
        family = self._new(name, description, self._family.COUNTER)
        return {value: Metric(family.Metric(labels={label: value})) for value in values}

    def histogram(self, name: str, description: str, buckets: Iterable[float]) -> Metric:
        """buckets: upper bounds, rising; Triton adds +Inf."""
        family = self._new(name, description, self._family.HISTOGRAM)
        return Metric(family.Metric(labels={}, buckets=[float(bound) for bound in buckets]))

    def _new(self, name: str, description: str, kind: Any) -> Any:
        family = self._family(name=f"barkstream_{name}", description=description, kind=kind)
        self._families.append(family)
        return family


class SpeakerMetrics(Metrics):
    """Of `bark`: the listeners."""

    def __init__(self, family: Any):
        super().__init__(family)
        self.live = self.gauge("live_streams", "Requests being spoken now")
        self.first_chunk_s = self.histogram(
            "first_chunk_seconds", "From taking a request in to sending its first chunk", FIRST_CHUNK_BUCKETS_S
        )
        self.audio_s = self.counter("audio_seconds_total", "Seconds of audio sent")
        self.underruns = self.counter("underruns_total", "Chunks sent after their listener's playback had run dry")
        self.paced_s = self.counter("paced_seconds_total", "Seconds that streams ahead of playback let others go first")
        self.refused = self.counter("refused_total", "Requests refused at once because the server was full")
        self.cancelled = self.counter("cancelled_total", "Requests whose listener left")
        self.failed = self.counters(
            "failed_total", "Requests answered with an error, by whose it was", "stage", (REQUEST, *STAGES, SPEAKER)
        )
        guard = self._new("guard_total", "Sentences that went wrong, by fault and what was done", family.COUNTER)
        self._guard = {
            (action, fault): Metric(guard.Metric(labels={"action": action, "fault": fault}))
            for action, fault in product(ACTIONS, FAULTS)
        }

    def count_guard(self, action: str, fault: str) -> None:
        """A guard has acted."""
        self._guard[action, fault].increment()


class StageMetrics(Metrics):
    """Of a stage: its batches. Rows over calls is the mean batch size."""

    def __init__(self, family: Any, stage: str):
        """stage: "semantic", "coarse", "fine" or "codec"."""
        super().__init__(family)
        self._calls = self.counter(f"{stage}_calls_total", "Batches run")
        self._rows = self.counter(f"{stage}_rows_total", "Rows of those batches")
        self._busy_s = self.counter(f"{stage}_busy_seconds_total", "Seconds that those batches took, Python included")
        self._kv_slots = None
        if stage in ("semantic", "coarse"):
            self._kv_slots = self.gauge(f"{stage}_kv_slots", "KV slots held by live streams")

    def count(self, work: Work) -> None:
        """More work was done. The gauge is shared with the model's other instances, so it is moved, not set."""
        if work.n_slots and self._kv_slots:
            self._kv_slots.increment(work.n_slots)
        if work.n_batches:
            self._calls.increment(work.n_batches)
            self._rows.increment(work.n_rows)
            self._busy_s.increment(work.busy_s)
