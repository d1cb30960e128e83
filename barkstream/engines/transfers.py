"""Numbers to the GPU and back without waiting for it: the host prepares the next work while the GPU is busy with the last.

Copies from and to ordinary memory would wait for all work that is under way; those from and to pinned memory queue with it. PyTorch
does not reuse pinned memory before the copies that were started with it are over.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, into: Tensor | None = None) -> Tensor:
    """A copy of the array on the GPU, or `into` with the array in it; used by what is launched after it."""
    pinned = torch.from_numpy(array).pin_memory()
    if into is None:
        return pinned.to("cuda", non_blocking=True)
    return into.copy_(pinned, non_blocking=True)


def download(tensor: Tensor) -> Callable[[], np.ndarray]:
    """What the tensor holds once all that was launched before is over: the call waits for that."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return pinned.numpy()

    return wait
