"""Numbers to the GPU and back without waiting for it: the host prepares the next work while the GPU is busy with the last.

Copies from and to ordinary memory would wait for all work that is under way; those from and to pinned memory queue with it. Small
ones go by the driver itself, through pinned memory that each thread reuses: PyTorch lets go of Python for every call, and another
thread then keeps it for a while, with the next batch not launched yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from barkstream.engines.kernels import check, driver, use_context

SMALL_BYTES = 256 << 10  # larger ones are PyTorch's
RING_BYTES = 16 << 20  # of a thread: more than its small copies take that are under way at once
ALIGNED = 256
NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.int32: np.dtype(np.int32),
    torch.float32: np.dtype(np.float32),
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
}
TORCH = {on_host: on_gpu for on_gpu, on_host in NUMPY.items()}


class _Ring:
    """A thread's pinned memory, which is used again and again."""

    def __init__(self) -> None:
        use_context()
        self._memory = torch.empty(RING_BYTES, dtype=torch.uint8).pin_memory()
        self._bytes, self._address, self._next = self._memory.numpy(), self._memory.data_ptr(), 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[np.ndarray, int]:
        """An array there, and its address."""
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        start = 0 if self._next + n_bytes > RING_BYTES else self._next
        self._next = start + -(-n_bytes // ALIGNED) * ALIGNED
        return self._bytes[start : start + n_bytes].view(dtype).reshape(shape), self._address + start


_thread = threading.local()


def _ring() -> _Ring:
    if not hasattr(_thread, "ring"):
        _thread.ring = _Ring()
    return _thread.ring


def upload(array: np.ndarray, into: Tensor | None = None) -> Tensor:
    """A copy of the array on the GPU, or `into` with the array in it; used by what is launched after it."""
    if array.nbytes > SMALL_BYTES or not (into is None or _is_alike(array, into)):
        pinned = torch.from_numpy(array).pin_memory()
        return pinned.to("cuda", non_blocking=True) if into is None else into.copy_(pinned, non_blocking=True)
    if into is None:
        into = torch.empty(array.shape, dtype=TORCH[array.dtype], device="cuda")
    on_host, address = _ring().take(array.shape, array.dtype)
    np.copyto(on_host, array)
    check(driver().cuMemcpyHtoDAsync_v2(into.data_ptr(), address, array.nbytes, _stream()))
    return into


def _is_alike(array: np.ndarray, tensor: Tensor) -> bool:
    """Whether their bytes are the same where their numbers are."""
    return tensor.is_contiguous() and NUMPY.get(tensor.dtype) == array.dtype and tensor.shape == array.shape


def download(tensor: Tensor) -> Callable[[], np.ndarray]:
    """What the tensor holds once all that was launched before is over: the call waits for that."""
    (wait,) = download_all(tensor)
    return wait


def download_all(*tensors: Tensor) -> list[Callable[[], np.ndarray]]:
    """`download` of each, which are all there together."""
    started = [_start_download(tensor) for tensor in tensors]
    done = torch.cuda.Event()
    done.record()

    def wait(take: Callable[[], np.ndarray]) -> np.ndarray:
        done.synchronize()
        return take()

    return [partial(wait, take) for take in started]


def _start_download(tensor: Tensor) -> Callable[[], np.ndarray]:
    """What gives the array, once it is there."""
    if tensor.nbytes > SMALL_BYTES or not tensor.is_contiguous():
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True).numpy
    on_host, address = _ring().take(tuple(tensor.shape), NUMPY[tensor.dtype])
    check(driver().cuMemcpyDtoHAsync_v2(address, tensor.data_ptr(), tensor.nbytes, _stream()))
    return on_host.copy  # the ring goes round


def clear(tensor: Tensor) -> None:
    """Its bytes become 0 for what is launched after it."""
    check(driver().cuMemsetD8Async(tensor.data_ptr(), 0, tensor.nbytes, _stream()))


def _stream() -> int:
    use_context()
    return torch.cuda.current_stream().cuda_stream
