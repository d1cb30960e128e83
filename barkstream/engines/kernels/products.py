"""Matrix products by cuBLASLt: of the algorithms that it offers for a shape, the one that is quickest on this GPU.

The first one offered, which PyTorch takes, is up to a quarter slower (docs/performance.md). What was found is kept for the next start:
algorithms add in different orders, and a call is to give the same tokens then.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from barkstream.engines.kernels import CACHE

WORKSPACE_BYTES = 32 << 20
N_OFFERED, N_TRIES = 16, 7
N_WEIGHTS = 12  # layers' that are timed: more than L2 holds
WORTH = 0.97  # of the time of one that is offered before it: who takes less is taken in its place

# Of cublasLt.h and library_types.h
COMPUTE_32F, R_32F, R_16BF = 68, 0, 14
TRANSA, EPILOGUE, BIAS_POINTER = 3, 7, 8  # cublasLtMatmulDescAttributes_t
MAX_WORKSPACE_BYTES = 1  # cublasLtMatmulPreferenceAttributes_t
WITH_BIAS, WITH_GELU = 4, 32  # cublasLtEpilogue_t; both: their sum. 1: neither


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class _Offer(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@dataclass(frozen=True)
class Kind:
    """What a product is added to, and what becomes of it."""

    n_rows: int
    n_columns: int
    n_summed: int
    adds: bool  # to a float32 matrix; else the result is bf16
    has_bias: bool
    has_gelu: bool


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] weight [out, in]^T + bias [out], all of them and the result bf16."""
    return _product(x, weight, bias, has_gelu=False)


def gelu_of_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x weight^T + bias), bf16, in one kernel: by tanh, which differs from Bark's erf by less than bf16 does."""
    return _product(x, weight, bias, has_gelu=True)


def add_product(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """x [rows, out] float32 += y [rows, in] weight [out, in]^T, both bf16: one kernel, which adds before it rounds."""
    kind = Kind(len(y), len(weight), weight.shape[1], adds=True, has_bias=False, has_gelu=False)
    _plan(kind, y.device.index).run(_Matrices(y, weight, None, x))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, has_gelu: bool) -> Tensor:
    out = torch.empty(len(x), len(weight), dtype=torch.bfloat16, device=x.device)
    kind = Kind(len(x), len(weight), weight.shape[1], adds=False, has_bias=bias is not None, has_gelu=has_gelu)
    _plan(kind, x.device.index).run(_Matrices(x, weight, bias, out))
    return out


def choose_algorithms(work: Callable[[], None]) -> None:
    """Run work that will often run, and choose the algorithms of those of its products that have none."""
    _thread.uses = {}
    try:
        work()
    finally:
        uses, _thread.uses = _thread.uses, None
    for plan, matrices in uses.items():
        plan.choose(matrices)


_thread = threading.local()


@dataclass(frozen=True)
class _Matrices:
    """One use of a plan."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor


class _Plan:
    """A kind of product: its layouts, and the algorithm."""

    def __init__(self, kind: Kind, device: int):
        library, self._handle, self._workspace = _library(), _handle(device), _workspace(device)
        self._kind, self._device, self._add = kind, device, c_float(kind.adds)
        self._description = c_void_p()
        _check(library.cublasLtMatmulDescCreate(byref(self._description), COMPUTE_32F, R_32F))
        self._set(TRANSA, c_int32(1))
        self._set(EPILOGUE, c_int32((WITH_BIAS * kind.has_bias + WITH_GELU * kind.has_gelu) or 1))
        # cuBLAS's matrices lie column by column: to it ours are transposed.
        self._weight = _layout(R_16BF, kind.n_summed, kind.n_columns)
        self._x = _layout(R_16BF, kind.n_summed, kind.n_rows)
        self._out = _layout(R_32F if kind.adds else R_16BF, kind.n_columns, kind.n_rows)
        self._offers = self._offered()
        kept = _Choices.of(device).get(kind)
        self._chosen = kept if kept is not None and kept < len(self._offers) else None

    def run(self, matrices: _Matrices) -> None:
        """Raises ValueError for matrices that do not lie row by row."""
        if not all(each.is_contiguous() for each in (matrices.x, matrices.weight, matrices.out)):
            raise ValueError("a product's matrices must lie row by row")
        if self._chosen is None:
            if (uses := getattr(_thread, "uses", None)) is None:
                self._chosen = 0  # no time to try others
            elif len(seen := uses.setdefault(self, [])) < N_WEIGHTS:
                seen.append(replace(seen[0], weight=matrices.weight, bias=matrices.bias) if seen else matrices)
        self._launch(self._offers[self._chosen or 0], matrices)

    def choose(self, uses: Sequence[_Matrices]) -> None:
        """By timing them."""
        best, best_ms = 0, self._took_ms(self._offers[0], uses)
        for i, offer in enumerate(self._offers[1:], 1):
            if (took_ms := self._took_ms(offer, uses)) < WORTH * best_ms:
                best, best_ms = i, took_ms
        self._chosen = best
        _Choices.of(self._device).keep(self._kind, best)

    def _took_ms(self, offer: _Offer, uses: Sequence[_Matrices]) -> float:
        """Median, as a graph, as such products run: with one weight after the other, each of which comes from memory then."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            for matrices in (*uses, *uses):
                self._launch(offer, matrices)
        timed = []
        for _ in range(N_TRIES):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            timed.append((start, stop))
        torch.cuda.current_stream().synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in timed)

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.sizeof(value)
        _check(_library().cublasLtMatmulDescSetAttribute(self._description, attribute, byref(value), size))

    def _launch(self, offer: _Offer, matrices: _Matrices) -> None:
        if matrices.bias is not None:
            self._set(BIAS_POINTER, c_uint64(matrices.bias.data_ptr()))
        x, weight, out = (c_void_p(each.data_ptr()) for each in (matrices.x, matrices.weight, matrices.out))
        _check(
            _library().cublasLtMatmul(
                self._handle, self._description,
                byref(c_float(1)), weight, self._weight, x, self._x, byref(self._add), out, self._out, out, self._out,
                byref(offer.algorithm), c_void_p(self._workspace.data_ptr()), c_size_t(WORKSPACE_BYTES),
                c_void_p(torch.cuda.current_stream().cuda_stream),
            )
        )  # fmt: skip

    def _offered(self) -> list[_Offer]:
        library, preference = _library(), c_void_p()
        _check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
        most = c_uint64(WORKSPACE_BYTES)
        _check(library.cublasLtMatmulPreferenceSetAttribute(preference, MAX_WORKSPACE_BYTES, byref(most), 8))
        found, n_found = (_Offer * N_OFFERED)(), c_int()
        _check(
            library.cublasLtMatmulAlgoGetHeuristic(
                self._handle, self._description, self._weight, self._x, self._out, self._out, preference, N_OFFERED,
                found, byref(n_found),
            )
        )  # fmt: skip
        library.cublasLtMatmulPreferenceDestroy(preference)
        if offers := [offer for offer in found[: n_found.value] if offer.status == 0]:
            return offers
        raise RuntimeError(f"cuBLASLt has no algorithm for {self._kind}")


class _Choices:
    """Which algorithm of those offered was quickest, by kind of product, kept in a file for each kind of GPU and version of cuBLASLt."""

    def __init__(self, path: Path):
        self._path = path
        self._chosen: dict[str, int] = {}
        with suppress(OSError, ValueError):
            self._chosen = json.loads(path.read_text())

    @staticmethod
    @functools.cache
    def of(device: int) -> _Choices:
        made_of = f"{torch.cuda.get_device_name(device)} {_library().cublasLtGetVersion()}"
        return _Choices(CACHE / f"products-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json")

    def get(self, kind: Kind) -> int | None:
        return self._chosen.get(str(kind))

    def keep(self, kind: Kind, choice: int) -> None:
        self._chosen[str(kind)] = choice
        with suppress(OSError):  # a folder that nobody may write costs the next start its time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(self._chosen, indent=1))
            written.replace(self._path)


@functools.cache
def _plan(kind: Kind, device: int) -> _Plan:
    return _Plan(kind, device)


def _layout(dtype: int, n_rows: int, n_columns: int) -> c_void_p:
    layout = c_void_p()
    _check(
        _library().cublasLtMatrixLayoutCreate(
            byref(layout), dtype, c_uint64(n_rows), c_uint64(n_columns), c_int64(n_rows)
        )
    )
    return layout


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    _check(_library().cublasLtCreate(byref(handle)))
    return handle


@functools.cache
def _workspace(device: int) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


@functools.cache
def _library() -> ctypes.PyDLL:
    """The cuBLASLt that PyTorch has loaded. Launches are quick, so a call keeps Python for itself."""
    loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcublasLt.so" in line]
    library = ctypes.PyDLL(loaded[0] if loaded else "libcublasLt.so.13")
    library.cublasLtGetVersion.restype = c_size_t
    return library


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt error {status} (cublasStatus_t)")
