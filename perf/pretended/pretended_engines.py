"""Engines that take a GPU's time for Bark large and say nothing.

One time line stands for the GPU: what is launched begins when all before it is over.
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
from gpu_costs import COSTS, KEYS, Costs, prefix_share, together

from barkstream.engines import Chunk, Generation, Head, Row, Window, workers
from barkstream.engines import open as engines
from barkstream.sampling import Floats, Ints

SAID = "this GPU is pretended: its engines sleep"
GPU = "BARKSTREAM_PRETENDED"  # environment variable: which of COSTS, and how many times as long all of it takes, such as "h100 0.85"
ROW_COUNTS = 1, 2, 4, 8, 16, 24, 32  # that there are kernels for
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
        return list(ROW_COUNTS)

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
        n_steps, new = max(row.n_tokens for row in rows), [row for row in rows if not self._goes_on(row)]
        first_ms, step_ms = self._prefill_ms(new), self._step_ms(rows)
        for row in rows:  # what a call finds that is launched behind this one
            self._held[row.stream] = row.ids_with(self._tokens(row))[:-1]
        work = self._gpu.launch(first_ms, step_ms, n_steps)
        self._under_way = [*self._under_way, work]  # a new list: another thread may be reading the old one
        return work

    def _wait(self, work: Work, rows: list[Row]) -> list[Generation]:
        self._gpu.wait(work)
        self._under_way = [each for each in self._under_way if each is not work]
        said = [self._tokens(row)[: work.n_steps] for row in rows]
        for row, tokens in zip(rows, said, strict=True):
            self._held[row.stream] = row.ids_with(tokens)[:-1]
        return [Generation(tokens, False) for tokens in said]

    def _step_ms(self, rows: list[Row]) -> float:
        costs, step_ms = self._gpu.costs, self._gpu.costs.step(self._stage, len(rows))
        if self._stage == "semantic":
            return step_ms
        return step_ms - sum(costs.row_keys * (1 - (len(row.ids) + row.n_tokens / 2) / KEYS) for row in rows)

    def _prefill_ms(self, rows: list[Row]) -> float:
        if not rows:
            return 0.0
        share = 1.0 if self._stage == "semantic" else np.mean([prefix_share(len(row.ids) - 1) for row in rows])
        return float(share) * self._gpu.costs.prefill(self._stage, len(rows))

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
        work = self._gpu.launch(together(costs.fine, n_short) + costs.long_fine * (len(windows) - n_short))

        def finish() -> list[Ints]:
            self._gpu.wait(work)
            return [np.where(window.codes < 1024, window.codes, 0) for window in windows]

        return finish


class CodecEngine:
    def __init__(self, gpu: Gpu):
        self._gpu = gpu

    def start(self, chunks: list[Chunk]) -> Callable[[], list[tuple[Floats, Floats]]]:
        work = self._gpu.launch(together(self._gpu.costs.codec, len(chunks)))

        def finish() -> list[tuple[Floats, Floats]]:
            self._gpu.wait(work)
            # audible; and only a sentence's first chunk has a state of zeros (`POLICIES`)
            return [
                (np.full(chunk.codes.shape[1] * 320, 0.1, np.float32), np.ones_like(chunk.state)) for chunk in chunks
            ]

        return finish


def install() -> None:
    """From now on a stage that asks for a GPU gets one of these."""
    name, slower = os.environ[GPU].split()
    gpu = Gpu(COSTS[name].times(float(slower)))

    def open_causal(engine: str, stage: str, path: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> CausalEngine:
        head = Head.semantic(checkpoint.semantic) if stage == "semantic" else Head.coarse(checkpoint.coarse)
        return CausalEngine(gpu, stage, head)

    def measure(generate: Any, release: Any, prefix: Ints, row_counts: Any, n_tries: int = 0) -> workers.Costs:
        """Known: while a server starts, Python takes more time than any GPU."""
        stage, counts = generate.__self__._stage, range(1, 33)
        steps_s, prefills_s = (
            {n: cost(stage, n) / 1e3 for n in counts} for cost in (gpu.costs.step, gpu.costs.prefill)
        )
        return workers.Costs(steps_s, prefills_s)

    workers.measure = measure
    engines.open_causal = open_causal
    engines.open_fine = lambda *args, **kwargs: FineEngine(gpu)
    engines.open_codec = lambda *args, **kwargs: CodecEngine(gpu)
    torch = types.ModuleType("torch")  # which the log asks for the GPU's memory
    torch.cuda = types.SimpleNamespace(memory_reserved=lambda: 0, mem_get_info=lambda: (0, 0))
    sys.modules["torch"] = torch
    print(SAID, file=sys.stderr, flush=True)
