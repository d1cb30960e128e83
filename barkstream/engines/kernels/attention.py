"""Attention over all tokens of prefixes or windows (`attention.cu`), for heads 64 wide."""

from __future__ import annotations

import math
from ctypes import c_int, c_void_p

import torch
from torch import Tensor

from barkstream.engines.kernels import Kernel, Source, build, current_stream
from barkstream.engines.kernels.fused import KVCache, pointer

TILE = 64  # queries of a block, and keys that it looks at together
GROUP = 128  # threads of a group, of which a block has one or two
FEW_BLOCKS = 264  # of up to so many, two groups are faster: the longest block is waited for


def source(width: int, n_groups: int, constants: dict[str, int] | None = None) -> Source:
    """constants: of the cache that a prefix's keys and values go into (`fused.kernel_constants`); None: windows, not causal."""
    cached = {"CAUSAL": 0} if constants is None else {**constants, "CAUSAL": 1}
    return "attention.cu", {"WIDTH": width, "GROUPS": n_groups, **cached}


class Attention:
    """The kernel for one width."""

    def __init__(self, width: int, cache: KVCache | None = None, constants: dict[str, int] | None = None):
        """cache, constants: of prefixes' keys and values, which the kernel also stores; None: windows, not causal."""
        major, minor = torch.cuda.get_device_capability()
        self._kernels: dict[int, Kernel] = {}
        for n_groups in (1, 2):
            file, defined = source(width, n_groups, constants)
            module = build(file, f"sm_{major}{minor}", **defined)
            self._kernels[n_groups] = module.kernel("attend_all", shared_bytes=TILE * 128 * (1 + 4 * n_groups))
        self._width, self._cache = width, cache

    @staticmethod
    def fits(n_tokens: int) -> bool:
        """Whether rows of so many tokens come out even."""
        return n_tokens % TILE == 0

    def __call__(self, qkv: Tensor, n_rows: int, slots: Tensor | None = None, layer: int = 0) -> Tensor:
        """q | k | v [rows * tokens, 3 width] bf16 -> [rows * tokens, width]. slots [rows], layer: where keys and values go."""
        n_tokens = len(qkv) // n_rows
        out = torch.empty(len(qkv), self._width, dtype=torch.bfloat16, device=qkv.device)
        arguments: list[c_void_p | c_int] = [c_void_p(qkv.data_ptr()), c_void_p(out.data_ptr()), c_int(n_tokens)]
        if self._cache is not None:
            cache = self._cache
            arguments += [c_void_p(pointer(part)) for part in (slots, cache.values, cache.scales)]
            arguments += [c_int(cache.n_slots), c_int(layer)]
        grid = self._width // 64, n_tokens // TILE, n_rows
        n_groups = 2 if math.prod(grid) <= FEW_BLOCKS else 1
        self._kernels[n_groups].launch(grid, n_groups * GROUP, arguments, current_stream())
        return out
