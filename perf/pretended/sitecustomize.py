"""Engines that take an H200's time for Bark large and say nothing: for the process that a GPU's stages share, and no other.

Python imports a module of this name when it starts, if its folder is on PYTHONPATH: `perf/pretended_gpu.py` puts it there.
One time line stands for the GPU: what is launched begins when all before it is over. Costs: docs/performance.md, docs/load.md.
"""

from __future__ import annotations

import sys
import threading
import time
import types

STEP_MS = {  # a decode step, by rows; a kernel for so many rows takes what lies between this and the next
    "semantic": {1: 0.279, 2: 0.36, 4: 0.45, 8: 0.505, 16: 0.631, 32: 0.95},
    "coarse": {1: 0.283, 2: 0.39, 4: 0.52, 8: 0.55, 16: 0.70, 32: 1.15},
}
PREFILL_MS = {"semantic": (2.5, 2.9, 3.2, 3.6), "coarse": (2.0, 3.24, 4.45, 5.9)}  # of 1 to 4 rows; more go in fours
FINE_MS, LONG_FINE_MS = (6.82, 8.3, 11.0, 11.5), 12.0  # 1 to 4 windows of 256 frames; one of more
CODEC_MS, CODEC_MS_A_CHUNK = 1.7, 0.5
LAUNCH_S = 0.0008  # Python, before anything is on its way


def pretend() -> None:
    import numpy as np

    from barkstream.engines import Generation, Head
    from barkstream.engines import open as engines

    lock = threading.Lock()
    free_at = 0.0

    def launch(cost_ms: float):
        """Returns what waits until the work is over."""
        nonlocal free_at
        until = time.thread_time() + LAUNCH_S
        while time.thread_time() < until:
            pass
        with lock:
            free_at = over_at = max(time.monotonic(), free_at) + cost_ms / 1e3
        return lambda: time.sleep(max(0.0, over_at - time.monotonic()))

    class Causal:
        def __init__(self, stage, head):
            self.stage, self.head, self.held = stage, head, {}

        @property
        def n_owned_slots(self):
            return len(self.held)

        def release(self, *streams):
            for stream in streams:
                self.held.pop(stream, None)

        def generate(self, rows):
            return self.start(rows)()

        def start(self, rows):
            n_steps, n_new = max(row.n_tokens for row in rows), sum(not self._goes_on(row) for row in rows)
            steps, prefill = STEP_MS[self.stage], PREFILL_MS[self.stage]
            step_ms = (
                np.interp(len(rows), list(steps), list(steps.values()))
                + next(ms for n, ms in steps.items() if n >= len(rows))
            ) / 2
            wait = launch(n_steps * step_ms + sum(prefill[min(4, n_new - i) - 1] for i in range(0, n_new, 4)))

            def finish():
                wait()
                said = [self._tokens(row) for row in rows]
                for row, tokens in zip(rows, said, strict=True):
                    self.held[row.stream] = row.ids_with(tokens)[:-1]
                return [Generation(tokens, False) for tokens in said]

            return finish

        def _goes_on(self, row):
            held, needed = self.held.get(row.stream), row.ids[:-1]
            return held is not None and len(held) >= len(needed) and np.array_equal(held[: len(needed)], needed)

        def _tokens(self, row):
            positions = row.position + np.arange(row.n_tokens)
            n = self.head.size - (self.head.end is not None)
            first = self.head.first_id + positions % self.head.n_codebooks * self.head.size
            return (first + (positions * 7919 + row.sampling.seed) % n).astype(np.int32)

    class Fine:
        def start(self, windows):
            short = sum(window.n_frames <= 256 for window in windows)
            cost_ms = sum(FINE_MS[min(4, short - i) - 1] for i in range(0, short, 4))
            wait = launch(cost_ms + LONG_FINE_MS * (len(windows) - short))
            return lambda: wait() or [np.where(window.codes < 1024, window.codes, 0) for window in windows]

    class Codec:
        def start(self, chunks):
            wait = launch(CODEC_MS + CODEC_MS_A_CHUNK * len(chunks))
            audible = lambda codes: np.full(codes.shape[1] * 320, 0.1, np.float32)  # noqa: E731
            return lambda: wait() or [(audible(codes), state) for codes, state in chunks]

    def open_causal(engine, stage, path, checkpoint, *args, **kwargs):
        return Causal(
            stage, Head.semantic(checkpoint.semantic) if stage == "semantic" else Head.coarse(checkpoint.coarse)
        )

    engines.open_causal = open_causal
    engines.open_fine = lambda *args, **kwargs: Fine()
    engines.open_codec = lambda *args, **kwargs: Codec()
    torch = types.ModuleType("torch")  # which the log asks for the GPU's memory
    torch.cuda = types.SimpleNamespace(memory_reserved=lambda: 0, mem_get_info=lambda: (0, 0))
    sys.modules["torch"] = torch


if "barkstream.engines.host" in sys.orig_argv:
    pretend()
