"""Which GPU a stream goes to: its key says it (`engines/hosted.py`), and keys are given out so that GPUs have equally many."""

from __future__ import annotations

import ctypes
import itertools
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from barkstream.peers import Peers


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

    def __init__(self, n_gpus: int, peers: Peers | None = None):
        """peers: whose streams count, too."""
        self.n_gpus = n_gpus
        self._peers = peers or Peers(n_gpus)
        # From a number by chance on: a server's stages may outlive this process, and it may have peers.
        self._numbers = itertools.count(secrets.randbits(48) << 10 | 1)

    @contextmanager
    def key(self) -> Iterator[int]:
        """Of a stream that is under way while the block lasts."""
        with self._peers.together():
            number, n_streams = next(self._numbers), self._peers.n_streams
            # of those with the fewest another one each time
            gpu = min(range(self.n_gpus), key=lambda gpu: (n_streams[gpu], (gpu - number) % self.n_gpus))
            self._peers.count_stream(gpu, 1)
        try:
            yield number * self.n_gpus + gpu
        finally:
            with self._peers.together():
                self._peers.count_stream(gpu, -1)
