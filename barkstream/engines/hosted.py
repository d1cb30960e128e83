"""A stage's engine in another process, the one that its GPU's stages share (`host.py`): as its Triton model sees it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from barkstream.engines import Chunk, Generation, Row, Window
from barkstream.engines.host import LISTENING
from barkstream.engines.open import EngineError, Spec
from barkstream.engines.workers import Work
from barkstream.sampling import Floats, Ints

N_TRIES = 3  # a process that is being killed may still accept the second
FOLDER = "BARKSTREAM_SOCKETS"  # environment variable: where the processes of one server meet


class HostedEngine:
    """Any stage. One thread at a time may use it; instances of the stage's model have one each."""

    def __init__(self, spec: Spec):
        """Raises what opening the engine raises, and EngineError if the process cannot be started."""
        self._spec = spec
        self._news, self._n_slots = Work(), 0  # not yet asked for; and KV slots that were reported by us
        self._connection: Connection | None = None
        self._open()

    def take_news(self) -> Work:
        """What the stage did since any of its instances last asked: what all of them are told adds up to all its work."""
        news, self._news = self._news, Work()
        self._n_slots += news.n_slots
        return news

    def generate(self, rows: list[Row]) -> list[Generation]:
        return self._run(rows)

    def fill(self, windows: Sequence[Window]) -> list[Ints]:
        return self._run(list(windows))

    def decode(self, chunks: Sequence[Chunk]) -> list[tuple[Floats, Floats]]:
        return self._run(list(chunks))

    def release(self, *streams: int) -> None:
        """Free streams' KV slots; nothing happens for one that has none."""
        self._news += self._ask("release", streams)[1]

    def _run(self, calls: list[Any]) -> list[Any]:
        results, news = self._ask("run", calls)
        self._news += news
        return results

    def _ask(self, verb: str, argument: Any) -> Any:
        """Calls are pure, so one that was lost with the process is made again. Raises EngineError if that ends too."""
        for _ in range(N_TRIES):
            try:
                if self._connection is None:
                    self._open()
                assert self._connection is not None
                return _answer(self._connection, verb, argument)
            except (EOFError, ConnectionError):
                self._connection = None
                self._news = replace(self._news, n_slots=-self._n_slots)  # they are gone with the process
        raise EngineError(f"the process of GPU {self._spec.device} ended {N_TRIES} times over this call")

    def _open(self) -> None:
        connection = connect(self._spec.device)
        _answer(connection, "open", self._spec)
        self._connection = connection


def _answer(connection: Connection, verb: str, argument: Any) -> Any:
    connection.send((verb, argument))
    is_result, answer = connection.recv()
    if not is_result:
        raise answer
    return answer


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
