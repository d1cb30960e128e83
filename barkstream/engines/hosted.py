"""A stage as its Triton model sees it: an engine of its own, or those in the processes that GPUs' stages share (`host.py`)."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

from barkstream.engines import Chunk, Row, Window, Windows, by_windows, one_by_one
from barkstream.engines.host import LISTENING
from barkstream.engines.mail import Caller
from barkstream.engines.open import VERBS, EngineError, Spec, open_stage
from barkstream.engines.workers import Work
from barkstream.server import SOCKETS

RETRY_S = 10.0  # a process that could not be started is tried again after so long, while other GPUs do its work
N_TRIES = 3  # a process that is being killed may still accept the second
ERRORS = (EngineError, ValueError, FileNotFoundError)  # what opening an engine raises


class OwnStage:
    """An engine in this process. One thread at a time may use it."""

    def __init__(self, spec: Spec):
        """Raises what opening the engine raises."""
        self._engine: Any = open_stage(spec)
        run: Callable[[list[Any]], list[Any]] = getattr(self._engine, VERBS[spec.stage])
        self._run: Callable[[list[Any]], list[Any]] = run
        if spec.stage != "codec":
            self._run = partial(by_windows if spec.is_causal else one_by_one, run)
        self._work, self._told = Work(), Work()

    def run(self, calls: Sequence[Row | Window | Windows | Chunk], streams: Sequence[int] = ()) -> list[Any]:
        """Each call's result. streams: of no use here."""
        began = time.perf_counter()
        results = self._run(list(calls))
        self._work += Work(1, len(calls), time.perf_counter() - began)
        return results

    def release(self, *streams: int) -> None:
        """Free streams' KV slots; nothing happens for one that has none."""
        self._engine.release(*streams)

    def take_news(self) -> Work:
        """What the stage did since this was last asked."""
        now = self._work + Work(n_slots=getattr(self._engine, "n_owned_slots", 0))
        news, self._told = now - self._told, now
        return news


class HostedStage:
    """A stage on one GPU or several. One thread at a time may use it; instances of the stage's model have one each.

    A stream's calls all go to one GPU, where its KV cache is: its key says which. What has no stream is dealt out in turn. While the
    process of a GPU is being started anew, another one's does its work: calls are pure, only caches have to be made again.
    """

    def __init__(self, specs: Sequence[Spec], first: int = 0):
        """specs: one a GPU. first: of them, the one that gets the first call without a stream. Raises what opening an engine raises."""
        with ThreadPoolExecutor(len(specs)) as pool:
            self.engines = list(pool.map(HostedEngine, specs))
        self._turn = itertools.count(first)

    def run(self, calls: Sequence[Row | Window | Windows | Chunk], streams: Sequence[int] = ()) -> list[Any]:
        """Each call's result, or the exception that it ended with. streams: whose calls they are, if anybody's; a Row says so itself."""
        streams = streams or [call.stream if isinstance(call, Row) else 0 for call in calls]
        return self._answers(
            [_Ask("run", call, self._home(stream)) for call, stream in zip(calls, streams, strict=True)]
        )

    def release(self, *streams: int) -> None:
        """Free streams' KV slots, wherever they are; nothing happens for one that has none. Raises EngineError."""
        engines = [engine for engine in range(len(self.engines)) if self.engines[engine].is_there]
        for answer in self._answers([_Ask("release", streams, engine) for engine in engines]):
            if answer is not None:
                raise answer

    def take_news(self) -> Work:
        """What the stage did since any of its instances last asked."""
        return reduce(add, (engine.take_news() for engine in self.engines))

    def _answers(self, asks: Sequence[_Ask]) -> list[Any]:
        """All GPUs at once: every ask is sent before the first answer is waited for."""
        for ask in asks:
            self._send(ask)
        for ask in asks:
            while not ask.is_answered:
                for lost in self.engines[ask.engine].receive():
                    self._send(lost)
        return [ask.answer for ask in asks]

    def _send(self, ask: _Ask) -> None:
        """To its GPU, or the next one that need not be waited for."""
        n = len(self.engines)
        nearest = [(ask.home + i) % n for i in range(n)]
        ask.engine = next((i for i in nearest if self.engines[i].is_there), ask.home)
        for lost in self.engines[ask.engine].send(ask):
            self._send(lost)

    def _home(self, stream: int) -> int:
        return (stream or next(self._turn)) % len(self.engines)


@dataclass(eq=False)
class _Ask:
    """Something asked of a process."""

    verb: str
    argument: Any
    home: int  # the GPU that should do it, of the stage's
    engine: int = 0  # the one that does
    answer: Any = None  # or the exception that it ended with
    is_answered: bool = False
    n_lost: int = 0  # times that the process ended over it

    def settle(self, answer: Any) -> None:
        self.answer, self.is_answered = answer, True


class HostedEngine:
    """A stage on one GPU. One thread at a time may use it.

    Calls are pure, so one that was lost with the process can be made again, up to N_TRIES times in all.
    """

    def __init__(self, spec: Spec):
        """Raises what opening the engine raises, and EngineError if the process cannot be started."""
        self._spec = spec
        self._news, self._n_slots = Work(), 0  # not yet asked for; and KV slots that were reported by us
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Ask] = {}
        self._connection: Caller | None = self._open()
        self._opening: Future[Caller] | None = None
        self._lost_s = 0.0  # when that began

    @property
    def is_there(self) -> bool:
        """Whether the process has the stage open: else the next ask waits until it has."""
        if self._opening and self._opening.done():
            if not self._opening.exception():
                self._connection, self._opening = self._opening.result(), None
            elif time.monotonic() > self._lost_s + RETRY_S:
                self._opening = self._opened_soon()
        return self._connection is not None

    def take_news(self) -> Work:
        """What the stage did since any of its instances last asked: what all of them are told adds up to all its work."""
        news, self._news = self._news, Work()
        self._n_slots += news.n_slots
        return news

    def send(self, ask: _Ask) -> list[_Ask]:
        """Those that were lost with the process over it, and are to be made again."""
        number = next(self._numbers)
        self._asked[number] = ask
        try:
            self._connected().send((number, ask.verb, ask.argument))
        except ERRORS as error:
            self._asked.pop(number).settle(error)
        except OSError:
            return self._lose()
        return []

    def receive(self) -> list[_Ask]:
        """Wait for the next answer; as send."""
        assert self._connection is not None
        try:
            number, answer, news = self._connection.receive()
        except (EOFError, OSError):
            return self._lose()
        self._news += news
        self._asked.pop(number).settle(answer)
        return []

    def _lose(self) -> list[_Ask]:
        """The process has ended, and with it the KV slots and what it was asked. It is started anew meanwhile."""
        self._connection, self._opening = None, self._opened_soon()
        self._news = replace(self._news, n_slots=-self._n_slots)
        lost, self._asked = list(self._asked.values()), {}
        for ask in lost:
            ask.n_lost += 1
            if ask.n_lost == N_TRIES:
                ask.settle(EngineError(f"the process of GPU {self._spec.device} ended {N_TRIES} times over a call"))
        return [ask for ask in lost if not ask.is_answered]

    def _connected(self) -> Caller:
        """Waits for it. Raises what opening the engine raises."""
        if not self.is_there:
            opening, self._opening = self._opening or self._opened_soon(), None
            self._connection = opening.result()
        assert self._connection is not None
        return self._connection

    def _opened_soon(self) -> Future[Caller]:
        opened: Future[Caller] = Future()
        self._lost_s = time.monotonic()

        def work() -> None:
            try:
                opened.set_result(self._open())
            except Exception as error:
                opened.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return opened

    def _open(self) -> Caller:
        """A connection to a process that has the stage open."""
        for _ in range(N_TRIES):
            connection = connect(self._spec.device)
            try:
                connection.send((0, "open", self._spec))
                _, answer, _ = connection.receive()
            except (EOFError, OSError):  # it accepted while it was being killed
                continue
            if answer is not None:
                raise answer
            return connection
        raise EngineError(f"the process of GPU {self._spec.device} ends as soon as it starts")


def connect(device: int) -> Caller:
    """To a GPU's process, which is started if there is none."""
    folder = sockets_folder()
    path = folder / f"gpu{device}"
    with locked(path.with_suffix(".lock")):
        try:
            return Caller(path)
        except (FileNotFoundError, ConnectionRefusedError):  # the latter: it was killed
            path.unlink(missing_ok=True)
            start(path, device)
            return Caller(path)


def start(path: Path, device: int) -> None:
    """Start a GPU's process and wait until it listens on the socket `path`. Raises EngineError."""
    package = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))}
    is_python = Path(sys.executable or "").name.startswith("python")  # not so in Triton's stub, everywhere
    python = sys.executable if is_python else shutil.which("python3") or "python3"
    process = subprocess.Popen(
        [python, "-m", "barkstream.engines.host", str(path), str(device)],
        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as said:
        if said.readline().strip() != LISTENING:
            raise EngineError(
                f"the process of GPU {device} did not start (status {process.wait()}): see the server's log"
            )


def sockets_folder() -> Path:
    """Where this server's processes meet; nobody else may look in."""
    folder = Path(os.environ.get(SOCKETS) or Path(tempfile.gettempdir(), f"barkstream-{os.getuid()}-{os.getppid()}"))
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EngineError(f"{folder} must belong to this user alone: remove it, or name another folder in {SOCKETS}")
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The block runs in one process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
