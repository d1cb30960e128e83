"""A stage's engine in another process, the one that its GPU's stages share (`host.py`): as its Triton model sees it."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import reduce
from multiprocessing.connection import Client, Connection
from operator import add
from pathlib import Path
from typing import Any

from barkstream.engines import Chunk, Generation, Row, Window
from barkstream.engines.host import LISTENING
from barkstream.engines.open import EngineError, Spec
from barkstream.engines.workers import Work
from barkstream.sampling import Floats, Ints

N_TRIES = 3  # a process that is being killed may still accept the second
FOLDER = "BARKSTREAM_SOCKETS"  # environment variable: where the processes of one server meet


class HostedStage:
    """A stage on one GPU or several. Threads share it; instances of the stage's model have one each.

    A stream's calls all go to one GPU, where its KV cache is; streams are dealt out in turn. What has no stream goes to the GPU
    that has the least to do.
    """

    def __init__(self, specs: Sequence[Spec]):
        """specs: one a GPU. Raises what opening an engine raises."""
        with ThreadPoolExecutor(len(specs)) as pool:
            self.engines = list(pool.map(HostedEngine, specs))

    def start(self, call: Row | Window | Chunk) -> Future[Any]:
        """A call's result to come. Fails with EngineError if its GPU's process ends N_TRIES times over it."""
        if isinstance(call, Row) and call.stream:
            return self._engine_of(call.stream).start(call)
        return min(self.engines, key=lambda engine: engine.n_asked).start(call)

    def start_release(self, stream: int) -> Future[None]:
        """Free a stream's KV slot; nothing happens if it has none."""
        return self._engine_of(stream).start_release(stream)

    def take_news(self) -> Work:
        """What the stage did since any of its instances last asked."""
        return reduce(add, (engine.take_news() for engine in self.engines))

    def _engine_of(self, stream: int) -> HostedEngine:
        return self.engines[stream % len(self.engines)]


class HostedEngine:
    """A stage on one GPU."""

    def __init__(self, spec: Spec):
        """Raises what opening the engine raises, and EngineError if the process cannot be started."""
        self._spec = spec
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._news, self._n_slots = Work(), 0  # not yet asked for; and KV slots that were reported by us
        with self._lock:
            self._open()

    @property
    def n_asked(self) -> int:
        """Calls under way."""
        link = self._link
        return len(link.asked) if link else 0

    def take_news(self) -> Work:
        """What the stage did since any of its instances last asked: what all of them are told adds up to all its work."""
        with self._lock:
            news, self._news = self._news, Work()
            self._n_slots += news.n_slots
        return news

    def generate(self, rows: Sequence[Row]) -> list[Generation]:
        return self._run(rows)

    def fill(self, windows: Sequence[Window]) -> list[Ints]:
        return self._run(windows)

    def decode(self, chunks: Sequence[Chunk]) -> list[tuple[Floats, Floats]]:
        return self._run(chunks)

    def release(self, *streams: int) -> None:
        """Free streams' KV slots; nothing happens for one that has none."""
        self.start_release(*streams).result()

    def start(self, call: Row | Window | Chunk) -> Future[Any]:
        """A call's result to come. Fails with EngineError if the process ends N_TRIES times over it: calls are pure, so one
        that was lost with the process is made again."""
        return self._ask("run", call)

    def start_release(self, *streams: int) -> Future[None]:
        return self._ask("release", streams)

    def _run(self, calls: Sequence[Any]) -> list[Any]:
        return [answer.result() for answer in [self.start(call) for call in calls]]

    def _ask(self, verb: str, argument: Any) -> Future[Any]:
        ask = _Ask(verb, argument)
        self._send([ask])
        return ask.answer

    def _send(self, asks: Sequence[_Ask]) -> None:
        with self._lock:
            try:
                link = self._link or self._open()
            except (EngineError, FileNotFoundError, ValueError) as error:
                for ask in asks:
                    ask.answer.set_exception(error)
                return
            numbers = [link.number(ask) for ask in asks]
        for number, ask in zip(numbers, asks, strict=True):  # not under the lock: the listener needs it
            link.send(number, ask)

    def _open(self) -> _Link:
        """A new link to a process that has the stage open."""
        for tries_left in reversed(range(N_TRIES)):
            connection = connect(self._spec.device)
            try:
                connection.send((0, "open", self._spec))
                _, answer, _ = connection.recv()
            except (EOFError, ConnectionError):  # it accepted while it was being killed
                if not tries_left:
                    raise EngineError(f"the process of GPU {self._spec.device} ends as soon as it starts") from None
                continue
            if answer is not None:
                raise answer
            break
        self._link = _Link(connection)
        threading.Thread(target=self._listen, args=(self._link,), daemon=True).start()
        return self._link

    def _listen(self, link: _Link) -> None:
        """Thread: hand the answers out until the process ends, then ask again what it has not answered."""
        with suppress(EOFError, ConnectionError):
            while True:
                number, answer, news = link.connection.recv()
                with self._lock:
                    self._news += news
                    ask = link.asked.pop(number)
                if isinstance(answer, Exception):
                    ask.answer.set_exception(answer)
                else:
                    ask.answer.set_result(answer)
        with self._lock:
            self._link = None
            self._news = replace(self._news, n_slots=-self._n_slots)  # they are gone with the process
            lost = list(link.asked.values())
        again = []
        for ask in lost:
            ask.n_lost += 1
            if ask.n_lost < N_TRIES:
                again.append(ask)
            else:
                ask.answer.set_exception(
                    EngineError(f"the process of GPU {self._spec.device} ended {N_TRIES} times over a call")
                )
        if again:
            self._send(again)


class _Ask:
    """Something asked of the process."""

    def __init__(self, verb: str, argument: Any):
        self.verb, self.argument = verb, argument
        self.answer: Future[Any] = Future()
        self.n_lost = 0


class _Link:
    """A connection, and what was asked over it and is not answered yet."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.asked: dict[int, _Ask] = {}
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()

    def number(self, ask: _Ask) -> int:
        """From now on it is answered, or lost with the process."""
        number = next(self._numbers)
        self.asked[number] = ask
        return number

    def send(self, number: int, ask: _Ask) -> None:
        with self._sending, suppress(OSError):  # whoever listens finds out too, and asks again
            self.connection.send((number, ask.verb, ask.argument))


def connect(device: int) -> Connection:
    """To a GPU's process, which is started if there is none."""
    folder = sockets_folder()
    path = folder / f"gpu{device}"
    with locked(path.with_suffix(".lock")):
        try:
            return Client(str(path), "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):  # the latter: it was killed
            path.unlink(missing_ok=True)
            start(path, device)
            return Client(str(path), "AF_UNIX")


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
    folder = Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir(), f"barkstream-{os.getuid()}-{os.getppid()}"))
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EngineError(f"{folder} must belong to this user alone: remove it, or name another folder in {FOLDER}")
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The block runs in one process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
