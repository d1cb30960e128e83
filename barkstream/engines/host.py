"""One process a GPU, which holds the engines of all its stages: `python3 -m barkstream.engines.host SOCKET DEVICE`

Triton gives every Python model a process of its own. Four of them on one GPU mean four CUDA contexts of half a gigabyte, and
a GPU that divides its time between them whatever is urgent. So the stages' models hold no engine: they send their batches
here (`hosted.py`), where the rows of all batches are decoded together and the stages take turns (`workers.py`).

A model's instance is a connection. It says (number, verb, argument), as many as it likes, and each is answered when it is done, in
any order, by (number, result, Work) or (number, exception, Work). Work: what the stage did since any instance was last told.

    "open", Spec      a stage's engine, made for the first who asks; None
    "run", call       a Row, Window, Windows or Chunk; its result
    "release", keys   of streams whose KV slots are free from now on; None. Calls of theirs that wait are answered with what there is

The process ends with its last connection, or when its GPU fails: what is lost then is only caches, and the next call starts it
anew.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from barkstream.engines.mail import Line, Reader
from barkstream.engines.open import (
    VERBS,
    EngineError,
    Spec,
    is_cpu,
    open_stage,
    prefix_lengths,
    tokens_a_second,
    use_gpu,
)
from barkstream.engines.trace import open_trace
from barkstream.engines.turns import Turns
from barkstream.engines.workers import (
    N_TRIES,
    N_TRIES_ON_CPU,
    POLICIES,
    CausalWorker,
    FineWorker,
    Work,
    Worker,
    at_once,
    measure,
)
from barkstream.garbage import spare_what_is_here

SWITCH_S = 0.0001  # threads hand Python over after so long: the one that has the next piece to launch must not wait
LISTENING = "listening"
NO_NEWS = Work()
SAID = (ValueError, FileNotFoundError, EngineError)  # errors whose own words a caller should hear


class Stage:
    """A stage's engine and its worker's thread."""

    def __init__(self, spec: Spec, turns: Turns, has_begun: Callable[[int], bool], n_streams: Callable[[], int]):
        """has_begun: whether the stage behind this one has heard of a stream. n_streams: that the GPU's stages know. Raises what opening
        the engine raises."""
        self.spec, self.n_users = spec, 0
        self._turns, self._has_begun, self._n_streams = turns, has_begun, n_streams
        self.knows: Callable[[int], bool] = lambda stream: True  # whether a stream's calls have come
        self.n_known: Callable[[], int] = lambda: 0  # of how many they have
        self._n_slots: Callable[[], int] = lambda: 0
        self._release: Callable[..., None] = lambda *streams: None
        self._drop = self._release
        self._told, self._told_of = Work(), Work()  # the latter: the worker's, by which the former came about
        self._lock = threading.Lock()
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(opened,), name=spec.stage, daemon=True)
        self._thread.start()
        opened.result()

    def close(self) -> None:
        self._worker.close()
        self._thread.join()

    def run(self, call: Any) -> Future[Any]:
        return self._worker.submit([call])[0]

    def release(self, streams: tuple[int, ...]) -> Future[Any]:
        self._drop(*streams)
        return self._worker.between(lambda: self._release(*streams))

    def news(self) -> Work:
        with self._lock:
            done, n_slots = self._worker.work_done, self._n_slots()
            if done is self._told_of and n_slots == self._told.n_slots:
                return NO_NEWS  # as for all answers of a batch but the first
            now = done + Work(n_slots=n_slots)
            news, self._told, self._told_of = now - self._told, now, done
        return news

    def _work(self, opened: Future[None]) -> None:
        try:
            with self._turns.turn(lambda: 0):
                began = time.monotonic()
                self._worker = self._open()
                self._worker.trace = open_trace(self.spec.stage, self.spec.device)
                print(
                    f"GPU {self.spec.device}: {self.spec.stage} open after {time.monotonic() - began:.1f} s{memory(self.spec)}"
                )
        except Exception as error:
            return opened.set_exception(error)
        spare_what_is_here()
        opened.set_result(None)
        self._worker.work()
        return None

    def _open(self) -> Worker[Any, Any]:
        spec, policy = self.spec, POLICIES[self.spec.stage]
        engine: Any = open_stage(spec)
        start = at_once(getattr(engine, VERBS[spec.stage])) if is_cpu(spec.engine) else engine.start
        if spec.stage == "fine" or spec.stage == "codec":
            worker_of = FineWorker if spec.stage == "fine" else Worker
            return worker_of(start, spec.max_batch, self._turns, policy, self._n_streams)
        n_ids = 2 if spec.stage == "semantic" else 1
        prefix = np.zeros((prefix_lengths(spec.stage, spec.checkpoint)[-1] + 1, n_ids), np.int32)
        n_tries = N_TRIES_ON_CPU if is_cpu(spec.engine) else N_TRIES
        costs = measure(engine.generate, engine.release, prefix, engine.row_counts, n_tries)
        self._n_slots, self._release = lambda: engine.n_owned_slots, engine.release
        worker = CausalWorker(
            start,
            engine.release,
            spec.max_batch,
            self._turns,
            policy,
            costs.step_s,
            costs.prefill_s,
            None if is_cpu(spec.engine) else engine.start_alone,
            tokens_a_second(spec.stage, spec.checkpoint),
            None if is_cpu(spec.engine) else engine.halt,
            self._has_begun,
        )
        self._drop, self.knows, self.n_known = worker.drop, worker.knows, worker.n_known
        return worker


def memory(spec: Spec) -> str:
    """For the log: what this process's engines hold of the GPU's memory."""
    if is_cpu(spec.engine):
        return ""
    import torch

    free, total = torch.cuda.mem_get_info()
    return f", {torch.cuda.memory_reserved() / 1e9:.2f} GB reserved, {(total - free) / 1e9:.2f} GB of the GPU in use"


def in_background(work: Callable[..., None], *arguments: Any) -> None:
    """What takes long, or may wait for something that does."""
    threading.Thread(target=work, args=arguments, daemon=True).start()


def answer(line: Line, number: int, stage: Stage | None, done: Future[Any]) -> None:
    """Tell whoever asked. On the thread that has the answer: to wake another one would take longer."""
    error = done.exception()
    if error is not None and not isinstance(error, SAID):
        traceback.print_exception(error)
        end_if_gpu_is_lost(stage)
        error = EngineError(repr(error))
    news = stage.news() if stage else Work()
    if not line.send((number, error or done.result(), news)):
        in_background(line.flush)


class Host:
    """The stages that are open, and who uses them."""

    def __init__(self, path: Path):
        """path: of the socket to listen on."""
        self._path = path
        self._reader = Reader(path)
        self._turns = Turns()
        self._lock = threading.Lock()
        self._stages: dict[str, Stage] = {}
        self._used: dict[Line, Stage | None] = {}  # by whom: the stage that it has opened

    def serve(self) -> None:
        """Answer connections until the last of them closes: then the process ends."""
        self._reader.read(self._joined, self._said, partial(in_background, self._left))

    def _joined(self, line: Line) -> None:
        self._used[line] = None

    def _said(self, line: Line, message: tuple[int, str, Any]) -> None:
        number, verb, argument = message
        if verb == "open":
            return in_background(self._opened, line, number, argument)
        stage = self._used[line]
        assert stage is not None, "open a stage first"
        try:
            done = stage.run(argument) if verb == "run" else stage.release(argument)
        except Exception as error:
            done = Future()
            done.set_exception(error)
        return done.add_done_callback(partial(answer, line, number, stage))

    def _opened(self, line: Line, number: int, spec: Spec) -> None:
        done: Future[Any] = Future()
        with self._lock:
            try:
                self._used[line] = self._open(spec)
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)
        answer(line, number, None, done)

    def _open(self, spec: Spec) -> Stage:
        stage = self._stages.get(spec.stage)
        if stage is None:
            has_begun = partial(self._has_begun, spec.stage)
            stage = self._stages[spec.stage] = Stage(spec, self._turns, has_begun, self._n_streams)
        if stage.spec != spec:
            raise EngineError(
                f"GPU {spec.device} has another {spec.stage} stage open: one server, one repository a GPU"
            )
        stage.n_users += 1
        return stage

    def _has_begun(self, stage: str, stream: int) -> bool:
        """Whether the stage behind a stage, if it waits for one, knows a stream."""
        coarse = self._stages.get("coarse") if stage == "semantic" else None
        return coarse is None or coarse.knows(stream)

    def _n_streams(self) -> int:
        """Those whose coarse calls have come."""
        coarse = self._stages.get("coarse")
        return coarse.n_known() if coarse else 0

    def _left(self, line: Line) -> None:
        with self._lock:
            stage = self._used.pop(line)
            if not self._used:
                self._path.unlink(missing_ok=True)
                os._exit(0)
            if stage is None:
                return
            stage.n_users -= 1
            if not stage.n_users:  # its model was unloaded
                del self._stages[stage.spec.stage]
                stage.close()
                del stage
                spare_what_is_here()


def end_if_gpu_is_lost(stage: Stage | None) -> None:
    """After a fault a CUDA context fails whatever it is asked: only a new process helps, which the next call starts."""
    if stage is None or is_cpu(stage.spec.engine):
        return
    import torch

    try:
        use_gpu(stage.spec.device)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"GPU {stage.spec.device} has failed, its process ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main() -> None:
    sys.setswitchinterval(SWITCH_S)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    host = Host(Path(sys.argv[1]))
    print(LISTENING, flush=True)
    os.dup2(2, 1)  # whoever started us hears no more than that; the log is standard error
    host.serve()


if __name__ == "__main__":
    main()
