"""Engines that take an H200's time for Bark large and say nothing.

One time line stands for the GPU: what is launched begins when all before it is over. Costs: docs/performance.md, docs/load.md.
"""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from barkstream.engines import Chunk, Generation, Head, Row, Window
from barkstream.engines import open as engines
from barkstream.sampling import Floats, Ints

SAID = "this GPU is pretended: its engines sleep"
STEP_MS = {  # a decode step, by rows; so many rows take what lies between this and the next number
    "semantic": {1: 0.279, 2: 0.36, 4: 0.45, 8: 0.505, 16: 0.631, 32: 0.95},
    "coarse": {1: 0.283, 2: 0.39, 4: 0.52, 8: 0.55, 16: 0.70, 32: 1.15},
}
PREFILL_MS = {"semantic": (2.5, 2.9, 3.2, 3.6), "coarse": (2.0, 3.24, 4.45, 5.9)}  # of 1 to 4 rows; more go in fours
FINE_MS, LONG_FINE_MS = (6.82, 8.3, 11.0, 11.5), 12.0  # 1 to 4 windows of 256 frames; one of more
CODEC_MS, CODEC_MS_A_CHUNK = 1.7, 0.5
LAUNCH_S = 0.0008  # Python's own time, before anything is on its way


class Gpu:
    """The time line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def launch(self, cost_ms: float) -> Callable[[], None]:
        """Returns what waits until the work is over."""
        until = time.thread_time() + LAUNCH_S
        while time.thread_time() < until:  # Python's time is work, not sleep
            pass
        with self._lock:
            self._free_at = over_at = max(time.monotonic(), self._free_at) + cost_ms / 1e3
        return lambda: time.sleep(max(0.0, over_at - time.monotonic()))


class CausalEngine:
    def __init__(self, gpu: Gpu, stage: str, head: Head):
        self._gpu, self._stage, self._head = gpu, stage, head
        self._held: dict[int, Ints] = {}

    @property
    def n_owned_slots(self) -> int:
        return len(self._held)

    def release(self, *streams: int) -> None:
        for stream in streams:
            self._held.pop(stream, None)

    def generate(self, rows: list[Row]) -> list[Generation]:
        return self.start(rows)()

    def start(self, rows: list[Row]) -> Callable[[], list[Generation]]:
        n_steps, n_new = max(row.n_tokens for row in rows), sum(not self._goes_on(row) for row in rows)
        wait = self._gpu.launch(n_steps * self._step_ms(len(rows)) + in_fours(PREFILL_MS[self._stage], n_new))

        def finish() -> list[Generation]:
            wait()
            said = [self._tokens(row) for row in rows]
            for row, tokens in zip(rows, said, strict=True):
                self._held[row.stream] = row.ids_with(tokens)[:-1]
            return [Generation(tokens, False) for tokens in said]

        return finish

    def _step_ms(self, n_rows: int) -> float:
        measured = STEP_MS[self._stage]
        padded = next(ms for n, ms in measured.items() if n >= n_rows)
        return (float(np.interp(n_rows, list(measured), list(measured.values()))) + padded) / 2

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
        wait = self._gpu.launch(in_fours(FINE_MS, n_short) + LONG_FINE_MS * (len(windows) - n_short))

        def finish() -> list[Ints]:
            wait()
            return [np.where(window.codes < 1024, window.codes, 0) for window in windows]

        return finish


class CodecEngine:
    def __init__(self, gpu: Gpu):
        self._gpu = gpu

    def start(self, chunks: list[Chunk]) -> Callable[[], list[tuple[Floats, Floats]]]:
        wait = self._gpu.launch(CODEC_MS + CODEC_MS_A_CHUNK * len(chunks))

        def finish() -> list[tuple[Floats, Floats]]:
            wait()
            return [(np.full(codes.shape[1] * 320, 0.1, np.float32), state) for codes, state in chunks]  # audible

        return finish


def in_fours(costs_ms: tuple[float, ...], n: int) -> float:
    """What n take together, where costs_ms are those of 1 to 4."""
    return sum(costs_ms[min(4, n - i) - 1] for i in range(0, n, 4))


def install() -> None:
    """From now on a stage that asks for a GPU gets one of these."""
    gpu = Gpu()

    def open_causal(engine: str, stage: str, path: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> CausalEngine:
        head = Head.semantic(checkpoint.semantic) if stage == "semantic" else Head.coarse(checkpoint.coarse)
        return CausalEngine(gpu, stage, head)

    engines.open_causal = open_causal
    engines.open_fine = lambda *args, **kwargs: FineEngine(gpu)
    engines.open_codec = lambda *args, **kwargs: CodecEngine(gpu)
    torch = types.ModuleType("torch")  # which the log asks for the GPU's memory
    torch.cuda = types.SimpleNamespace(memory_reserved=lambda: 0, mem_get_info=lambda: (0, 0))
    sys.modules["torch"] = torch
    print(SAID, file=sys.stderr, flush=True)
