"""Which GPU a stream goes to: its key says it (`engines/hosted.py`), and keys are given out so that GPUs have equally many."""

from __future__ import annotations

import ctypes
import itertools
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def usable_gpus() -> int:
    """NVIDIA GPUs that this process may use, at least 1. Creates no context on any."""
    count = ctypes.c_int(0)
    with suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(count))
    return max(1, count.value)


class StreamKeys:
    """Keys of streams, none given out twice: key % n_gpus is the GPU with the fewest streams. Threads share it."""

    def __init__(self, n_gpus: int):
        self.n_gpus = n_gpus
        # From a number by chance on: a server's stages may outlive this process
        self._numbers = itertools.count(secrets.randbits(48) << 10 | 1)
        self._n_streams = [0] * n_gpus
        self._lock = threading.Lock()

    @contextmanager
    def key(self) -> Iterator[int]:
        """Of a stream that is under way while the block lasts."""
        with self._lock:
            number = next(self._numbers)
            # of those with the fewest another one each time
            gpu = min(range(self.n_gpus), key=lambda gpu: (self._n_streams[gpu], (gpu - number) % self.n_gpus))
            self._n_streams[gpu] += 1
        try:
            yield number * self.n_gpus + gpu
        finally:
            with self._lock:
                self._n_streams[gpu] -= 1
