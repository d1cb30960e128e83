"""Numbers to the GPU and back without waiting for it: the host prepares the next work while the GPU is busy with the last.

Copies from and to ordinary memory would wait for all work that is under way; those from and to pinned memory queue with it. Small
ones go by the driver itself, through pinned memory that each thread reuses: PyTorch lets go of Python for every call, and another
thread then keeps it for a while, with the next batch not launched yet.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from barkstream.engines.kernels import Event, check, current_stream, driver, use_context

SMALL_BYTES = 1 << 20  # larger ones are PyTorch's
RING_BYTES = 32 << 20  # of a thread: more than its small copies take that are under way at once
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
        found, address = self.take_bytes(math.prod(shape) * dtype.itemsize)
        return found.view(dtype).reshape(shape), address

    def take_bytes(self, n: int) -> tuple[np.ndarray, int]:
        """n of them [n] uint8, and their address. Raises ValueError for more than there are."""
        if n > RING_BYTES:
            raise ValueError(f"{n} bytes at once are more than a thread's {RING_BYTES} of pinned memory")
        start = 0 if self._next + n > RING_BYTES else self._next
        self._next = start + _aligned(n)
        return self._bytes[start : start + n], self._address + start


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNED) * ALIGNED


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
    check(driver().cuMemcpyHtoDAsync_v2(into.data_ptr(), address, array.nbytes, current_stream()))
    return into


class Inputs:
    """Tensors on the GPU that lie one behind the other: one copy fills them all, where each would take as long to be asked for."""

    def __init__(self, **shapes: tuple[tuple[int, ...], torch.dtype]):
        """All zeros."""
        self._places: dict[str, tuple[slice, tuple[int, ...], np.dtype[Any]]] = {}
        n_bytes = 0
        for name, (shape, dtype) in shapes.items():
            end = n_bytes + math.prod(shape) * NUMPY[dtype].itemsize
            self._places[name], n_bytes = (slice(n_bytes, end), shape, NUMPY[dtype]), _aligned(end)
        self._memory = torch.zeros(n_bytes, dtype=torch.uint8, device="cuda")
        self._tensors = {
            name: self._memory[place].view(TORCH[dtype]).view(shape)
            for name, (place, shape, dtype) in self._places.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def send(self, fill: Callable[[dict[str, np.ndarray]], None]) -> None:
        """What `fill` writes into arrays like the tensors, all of which it has to fill; used by what is launched after it."""
        on_host, address = _ring().take_bytes(self._memory.nbytes)
        fill({name: on_host[place].view(dtype).reshape(shape) for name, (place, shape, dtype) in self._places.items()})
        check(driver().cuMemcpyHtoDAsync_v2(self._memory.data_ptr(), address, self._memory.nbytes, current_stream()))


def _is_alike(array: np.ndarray, tensor: Tensor) -> bool:
    """Whether their bytes are the same where their numbers are."""
    return tensor.is_contiguous() and NUMPY.get(tensor.dtype) == array.dtype and tensor.shape == array.shape


def download(tensor: Tensor) -> Callable[..., np.ndarray]:
    """What the tensor holds once all that was launched before is over: the call waits for that. It takes an index, if a part is wanted."""
    (wait,) = download_all(tensor)
    return wait


def download_all(*tensors: Tensor) -> list[Callable[..., np.ndarray]]:
    """`download` of each, which are all there together."""
    started = [_start_download(tensor) for tensor in tensors]
    done = Event()

    def wait(get: Callable[[Any], np.ndarray], part: Any = ...) -> np.ndarray:
        done.wait()
        return get(part)

    return [partial(wait, get) for get in started]


def _start_download(tensor: Tensor) -> Callable[[Any], np.ndarray]:
    """What gives a part of the array, once it is there."""
    if tensor.nbytes > SMALL_BYTES or not tensor.is_contiguous():
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        return lambda part: pinned.numpy()[part]
    on_host, address = _ring().take(tuple(tensor.shape), NUMPY[tensor.dtype])
    check(driver().cuMemcpyDtoHAsync_v2(address, tensor.data_ptr(), tensor.nbytes, current_stream()))
    return lambda part: on_host[part].copy()  # the ring goes round


def copy(tensor: Tensor, into: Tensor) -> None:
    """On the GPU, from one contiguous tensor to another of the same type and shape."""
    check(driver().cuMemcpyDtoDAsync_v2(into.data_ptr(), tensor.data_ptr(), into.nbytes, current_stream()))


def clear(tensor: Tensor) -> None:
    """Its bytes become 0 for what is launched after it."""
    check(driver().cuMemsetD8Async(tensor.data_ptr(), 0, tensor.nbytes, current_stream()))
