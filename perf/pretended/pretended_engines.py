"""Engines that take a GPU's time for Bark large and say nothing.

One time line stands for the GPU: what is launched begins when all before it is over. Where the costs come
from: docs/performance.md, docs/load-results.md.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from barkstream.engines import Chunk, Generation, Head, Row, Window, workers
from barkstream.engines import open as engines
from barkstream.sampling import Floats, Ints

SAID = "this GPU is pretended: its engines sleep"
GPU = "BARKSTREAM_PRETENDED"  # environment variable: which of COSTS


@dataclass(frozen=True)
class Costs:
    """Milliseconds that Bark large was measured to take."""

    # A decode step, by rows; numbers between take as long as the next one.
    step: dict[str, dict[int, float]]
    prefill: dict[str, tuple[float, ...]]  # of 1 to 4 rows; more go in fours
    fine: tuple[float, ...]  # 1 to 4 windows of 256 frames
    long_fine: float  # one of more
    codec: float
    codec_a_chunk: float


COSTS = {
    "h200": Costs(  # e81596e
        step={
            "semantic": {1: 0.279, 2: 0.36, 4: 0.45, 8: 0.505, 16: 0.631, 32: 0.95},
            "coarse": {1: 0.283, 2: 0.39, 4: 0.52, 8: 0.55, 16: 0.70, 32: 1.15},
        },
        prefill={"semantic": (2.5, 2.9, 3.2, 3.6), "coarse": (2.0, 3.24, 4.45, 5.9)},
        fine=(6.82, 8.3, 11.0, 11.5),
        long_fine=12.0,
        codec=1.7,
        codec_a_chunk=0.5,
    ),
    "h100": Costs(
        step={
            "semantic": {1: 0.255, 2: 0.32, 4: 0.404, 8: 0.449, 16: 0.590, 32: 0.949},
            "coarse": {1: 0.265, 2: 0.366, 4: 0.495, 8: 0.526, 16: 0.780, 24: 1.115, 32: 1.342},
        },
        prefill={"semantic": (2.3, 2.6, 2.8, 3.0), "coarse": (1.82, 2.94, 4.27, 5.3)},
        fine=(6.63, 7.4, 10.0, 10.3),
        long_fine=11.1,
        codec=0.25,  # chunks of any lengths, 8720638
        codec_a_chunk=0.32,
    ),
    "h100-int8": Costs(  # the profile cuda-int8
        step={
            "semantic": {1: 0.210, 2: 0.275, 4: 0.342, 8: 0.385, 16: 0.494, 32: 0.740},
            "coarse": {1: 0.214, 2: 0.282, 4: 0.351, 8: 0.405, 16: 0.560, 24: 0.755, 32: 0.900},
        },
        prefill={"semantic": (1.16, 1.4, 1.6, 1.83), "coarse": (1.82, 2.94, 4.27, 5.3)},
        fine=(6.63, 7.4, 10.0, 10.3),
        long_fine=11.1,
        codec=0.25,  # chunks of any lengths, 8720638
        codec_a_chunk=0.32,
    ),
}
LAUNCH_S = 0.0008  # Python's own time, before anything is on its way


@dataclass(eq=False)
class Work:
    """On the time line. Seconds."""

    begins_at: float
    first_s: float  # what comes before its steps, or all of it
    step_s: float = 0.0
    n_steps: int = 0

    @property
    def over_at(self) -> float:
        return self.begins_at + self.first_s + self.n_steps * self.step_s


class Gpu:
    """The time line."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._lock = threading.Lock()
        self._launched: list[Work] = []  # and not waited for yet

    def launch(self, first_ms: float, step_ms: float = 0.0, n_steps: int = 0) -> Work:
        until = time.thread_time() + LAUNCH_S
        while time.thread_time() < until:  # Python's time is work, not sleep
            pass
        with self._lock:
            work = Work(self._free_at(self._launched), first_ms / 1e3, step_ms / 1e3, n_steps)
            self._launched.append(work)
        return work

    def wait(self, work: Work) -> None:
        """Until it is over."""
        while (early_s := work.over_at - time.monotonic()) > 0:
            time.sleep(min(early_s, 0.001) if work.n_steps else early_s)  # it may be halted
        with self._lock:
            self._launched.remove(work)

    def halt(self, works: list[Work]) -> None:
        """They make no step after the one that they are at, but one at least."""
        with self._lock:
            for i, work in enumerate(self._launched):
                if work.begins_at > time.monotonic():
                    work.begins_at = self._free_at(self._launched[:i])
                if work in works:
                    into_s = time.monotonic() - work.begins_at - work.first_s
                    work.n_steps = min(work.n_steps, max(1, math.ceil(into_s / work.step_s)))

    def _free_at(self, works: list[Work]) -> float:
        return max([time.monotonic(), *(work.over_at for work in works)])


class CausalEngine:
    def __init__(self, gpu: Gpu, stage: str, head: Head):
        self._gpu, self._stage, self._head = gpu, stage, head
        self._held: dict[int, Ints] = {}
        self._under_way: list[Work] = []

    @property
    def row_counts(self) -> list[int]:
        return list(self._gpu.costs.step[self._stage])

    @property
    def n_owned_slots(self) -> int:
        return len(self._held)

    def release(self, *streams: int) -> None:
        for stream in streams:
            self._held.pop(stream, None)

    def generate(self, rows: list[Row]) -> list[Generation]:
        return self.start(rows)()

    def halt(self) -> None:
        self._gpu.halt(self._under_way)

    def start(self, rows: list[Row]) -> Callable[[], list[Generation]]:
        work = self._launch(rows)

        def finish() -> list[Generation]:
            return self._wait(work, rows)

        return finish

    def start_alone(self, row: Row, n_piece: int, goes_on: Callable[[], bool]) -> Callable[[], list[Generation]]:
        left, launched, said = row, [], list[Ints]()

        def launch() -> None:
            nonlocal left
            piece = left.piece(n_piece)
            launched.append((self._launch([piece]), piece))
            left = left.after(self._tokens(piece))

        def finish() -> list[Generation]:
            is_halted = False
            while launched:
                while not is_halted and len(launched) < 2 and left.n_tokens and goes_on():
                    launch()
                work, piece = launched.pop(0)
                (generation,) = self._wait(work, [piece])
                if not is_halted:
                    said.append(generation.tokens)
                is_halted |= len(generation.tokens) < piece.n_tokens
            return [Generation.joined(said, False)]

        launch()
        return finish

    def _launch(self, rows: list[Row]) -> Work:
        n_steps, n_new = max(row.n_tokens for row in rows), sum(not self._goes_on(row) for row in rows)
        for row in rows:  # what a call finds that is launched behind this one
            self._held[row.stream] = row.ids_with(self._tokens(row))[:-1]
        prefills_ms = in_fours(self._gpu.costs.prefill[self._stage], n_new)
        work = self._gpu.launch(prefills_ms, self._step_ms(len(rows)), n_steps)
        self._under_way = [*self._under_way, work]  # a new list: another thread may be reading the old one
        return work

    def _wait(self, work: Work, rows: list[Row]) -> list[Generation]:
        self._gpu.wait(work)
        self._under_way = [each for each in self._under_way if each is not work]
        said = [self._tokens(row)[: work.n_steps] for row in rows]
        for row, tokens in zip(rows, said, strict=True):
            self._held[row.stream] = row.ids_with(tokens)[:-1]
        return [Generation(tokens, False) for tokens in said]

    def _step_ms(self, n_rows: int) -> float:
        return next(ms for n, ms in self._gpu.costs.step[self._stage].items() if n >= n_rows)

    def _goes_on(self, row: Row) -> bool:
        held, needed = self._held.get(row.stream), row.ids[:-1]
        return held is not None and len(held) >= len(needed) and np.array_equal(held[: len(needed)], needed)

    def _tokens(self, row: Row) -> Ints:
        """Any that may be said."""
        positions = row.position + np.arange(row.n_tokens)
        n_choices = self._head.size - (self._head.end is not None)
        first = self._head.first_id + positions % self._head.n_codebooks * self._head.size
        return (first + (positions + row.sampling.seed) % n_choices).astype(np.int32)


class FineEngine:
    def __init__(self, gpu: Gpu):
        self._gpu = gpu

    def start(self, windows: list[Window]) -> Callable[[], list[Ints]]:
        n_short = sum(window.n_frames <= 256 for window in windows)
        costs = self._gpu.costs
        work = self._gpu.launch(in_fours(costs.fine, n_short) + costs.long_fine * (len(windows) - n_short))

        def finish() -> list[Ints]:
            self._gpu.wait(work)
            return [np.where(window.codes < 1024, window.codes, 0) for window in windows]

        return finish


class CodecEngine:
    def __init__(self, gpu: Gpu):
        self._gpu = gpu

    def start(self, chunks: list[Chunk]) -> Callable[[], list[tuple[Floats, Floats]]]:
        work = self._gpu.launch(self._gpu.costs.codec + self._gpu.costs.codec_a_chunk * len(chunks))

        def finish() -> list[tuple[Floats, Floats]]:
            self._gpu.wait(work)
            return [(np.full(codes.shape[1] * 320, 0.1, np.float32), state) for codes, state in chunks]  # audible

        return finish


def in_fours(costs_ms: tuple[float, ...], n: int) -> float:
    """What n take together, where costs_ms are those of 1 to 4."""
    return sum(costs_ms[min(4, n - i) - 1] for i in range(0, n, 4))


def install() -> None:
    """From now on a stage that asks for a GPU gets one of these."""
    gpu = Gpu(COSTS[os.environ[GPU]])

    def open_causal(engine: str, stage: str, path: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> CausalEngine:
        head = Head.semantic(checkpoint.semantic) if stage == "semantic" else Head.coarse(checkpoint.coarse)
        return CausalEngine(gpu, stage, head)

    def measure(generate: Any, release: Any, prefix: Ints, row_counts: Any) -> workers.Costs:
        """Known: while a server starts, Python takes more time than any GPU."""
        stage, counts = generate.__self__._stage, range(1, 33)
        steps_ms, prefills_ms = gpu.costs.step[stage], gpu.costs.prefill[stage]
        prefills_s = {n: in_fours(prefills_ms, n) / 1e3 for n in counts}
        steps_s = {n: steps_ms[min(padded for padded in steps_ms if padded >= n)] / 1e3 for n in counts}
        return workers.Costs(steps_s, prefills_s)

    workers.measure = measure
    engines.open_causal = open_causal
    engines.open_fine = lambda *args, **kwargs: FineEngine(gpu)
    engines.open_codec = lambda *args, **kwargs: CodecEngine(gpu)
    torch = types.ModuleType("torch")  # which the log asks for the GPU's memory
    torch.cuda = types.SimpleNamespace(memory_reserved=lambda: 0, mem_get_info=lambda: (0, 0))
    sys.modules["torch"] = torch
    print(SAID, file=sys.stderr, flush=True)
