"""What the processes of `bark` know of one another.

Triton gives each instance of `bark` a process, and deals requests out to them in turn. Limits, GPUs and pacing are all streams': so
each process says in a table how many requests it has under way, and, for each GPU, how many streams, from when on one of them is in
need and how much their listeners have in hand. The table is a file that all of them map; a process writes its own row and no other.
What one that was killed had under way counts until Triton starts another in its place.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

N_ROWS = 64  # processes at most
# Columns: the process and when it was born, requests under way; then the streams on each GPU, then from when on one of them is in need,
# then the audio that they have in hand.
PID, BORN, LIVE, FIRST_GPU = range(4)


class Peers:
    """A process's row, and the sums over all rows. Threads share it."""

    def __init__(self, n_gpus: int = 1, path: Path | None = None):
        """path: of the table, which is made if need be; None: this process is the only one. Raises RuntimeError if N_ROWS others use it."""
        self._streams = slice(FIRST_GPU, FIRST_GPU + n_gpus)
        self._needy_from = slice(FIRST_GPU + n_gpus, FIRST_GPU + 2 * n_gpus)
        self._in_hand = slice(FIRST_GPU + 2 * n_gpus, FIRST_GPU + 3 * n_gpus)
        n_bytes = 8 * N_ROWS * (FIRST_GPU + 3 * n_gpus)
        self._file = path and path.open("a+b")
        if self._file:
            self._file.truncate(n_bytes)
        memory = mmap.mmap(self._file.fileno(), n_bytes) if self._file else bytearray(n_bytes)
        self._table = np.frombuffer(memory, np.float64).reshape(N_ROWS, -1)
        self._lock = threading.Lock()
        with self.together():
            for row in self._table:
                if row[PID] and _born(int(row[PID])) != row[BORN]:  # it was killed: Triton starts another one
                    row[PID] = 0
            if not (free := np.flatnonzero(self._table[:, PID] == 0)).size:
                raise RuntimeError(f"{path} has room for {N_ROWS} processes: bark has more instances")
            self._index = int(free[0])
            self._row = self._table[self._index]
            self._row[:] = 0
            self._row[self._needy_from] = math.inf
            self._row[BORN] = _born(os.getpid())
            self._row[PID] = os.getpid()

    @property
    def is_alone(self) -> bool:
        return self._file is None

    @contextmanager
    def together(self) -> Iterator[None]:
        """While the block runs no other thread or process is in one: what it reads stays true until it has written."""
        with self._lock:
            if self._file:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                if self._file:
                    fcntl.flock(self._file, fcntl.LOCK_UN)

    @property
    def n_live(self) -> int:
        """Requests under way, in all processes."""
        return int(self._table[self._table[:, PID] != 0, LIVE].sum())

    def count_live(self, more: int) -> None:
        """Within `together`."""
        self._row[LIVE] += more

    @property
    def n_streams(self) -> list[int]:
        """Streams on each GPU, of all processes."""
        return [int(n) for n in self._table[self._table[:, PID] != 0, self._streams].sum(0)]

    def count_stream(self, gpu: int, more: int) -> None:
        """Within `together`."""
        self._row[self._streams][gpu] += more

    def tell_need(self, gpu: int, needy_from_s: float) -> None:
        """From when on (time.monotonic) one of this process's streams on a GPU is in need; infinity: never."""
        self._row[self._needy_from][gpu] = needy_from_s

    def is_needy_elsewhere(self, gpu: int, now_s: float) -> bool:
        """Whether another process has a stream on a GPU that is in need."""
        if self.is_alone:
            return False
        column = self._table[:, self._needy_from.start + gpu]
        others = self._table[:, PID] != 0
        others[self._index] = False
        return bool((column[others] <= now_s).any())

    def tell_in_hand(self, gpu: int, in_hand_s: float) -> None:
        """The audio that this process's streams on a GPU have in hand now, s."""
        self._row[self._in_hand][gpu] = in_hand_s

    @property
    def in_hand_elsewhere_s(self) -> float:
        """What the other processes' streams had in hand, on all GPUs, when each of them last sent a chunk."""
        others = self._table[:, PID] != 0
        others[self._index] = False
        return float(self._table[others, self._in_hand].sum())

    def close(self) -> None:
        """The row is free."""
        with self.together():
            self._row[PID] = 0


def _born(pid: int) -> int:
    """When a process was started, in the kernel's ticks since it booted; 0: there is none of that number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0
