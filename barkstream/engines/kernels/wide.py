"""Decode steps of 8 to 64 rows as one kernel launch: `wide.cu` and its arguments."""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Sequence
from ctypes import c_int, c_ubyte, c_uint64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from barkstream.engines import Head
from barkstream.engines.kernels import Kernel, Source, build, current_stream, quickest_place
from barkstream.engines.kernels.fused import (
    ARCHITECTURE,
    UNITS,
    Bits,
    Halts,
    KVCache,
    RowArguments,
    Units,
    kernel_constants,
    n_head_tiles,
    padded,
    pointer,
    room_for_rows,
    write_rows,
)
from barkstream.engines.kernels.weights import GPTWeights
from barkstream.engines.transfers import clear
from barkstream.tokens import GPTSize

ROW_COUNTS = (8, 16, 24, 32, 64)
N_WARPS, N_TEAMS = 8, 4
MAX_SHARED_BYTES = 227 << 10  # of a block, compute capability 9.0
# Bytes of a block's stream that are on their way at once: little while it polls, for what it polls waits behind them.
WEIGHTS_IN_FLIGHT, MOST_KEYS_IN_FLIGHT = 16 << 10, 96 << 10
MAX_STAGES = 24


@dataclass(frozen=True)
class _SharedMemory:
    """Of a block."""

    unit_bytes: int
    n_stages: int
    dynamic_bytes: int

    @classmethod
    def of(cls, size: GPTSize, bits: Bits, n_rows: int, scale_bytes: int) -> _SharedMemory:
        """As many stages as there is room for. scale_bytes: of the weights' scales."""
        unit_bytes, sums_bytes = size.width * bits.weights, N_WARPS * 4 * 8 * n_rows * 4
        # A unit; or as many bytes of keys and values, and behind them their scales: 4 bytes for each 64.
        stage_bytes = unit_bytes + (unit_bytes // 16 if bits.kv == 8 else 0)
        static_bytes = 1024 + 180 * n_rows  # `Shared` of wide.cu is no larger
        n_stages = min((MAX_SHARED_BYTES - static_bytes - sums_bytes - scale_bytes) // stage_bytes, MAX_STAGES)
        return cls(unit_bytes, n_stages, n_stages * stage_bytes + sums_bytes + scale_bytes)


def source(size: GPTSize, head: Head, bits: Bits, n_rows: int) -> Source:
    """The kernel for so many rows, of ROW_COUNTS."""
    tiles = n_head_tiles(size, head)
    n_units = sum(UNITS) * size.n_layers + 2 * tiles * head.n_codebooks
    shared = _SharedMemory.of(size, bits, n_rows, n_units * 8 * 4 if bits.weights == 8 else 0)
    shape = dict(
        N_LAYERS=size.n_layers,
        N_ROWS=n_rows,
        HEAD_TILES=tiles,
        STAGES=shared.n_stages,
        WEIGHTS_IN_FLIGHT=min(max(WEIGHTS_IN_FLIGHT // shared.unit_bytes, 1), shared.n_stages - 1),
        KEYS_IN_FLIGHT=_n_stages(_keys_in_flight(bits.kv, n_rows), shared),
        MOST_KEYS_IN_FLIGHT=_n_stages(MOST_KEYS_IN_FLIGHT, shared),
    )
    return "wide.cu", shape | kernel_constants(size, head, bits)


class WideDecoder:
    """Decodes up to 64 rows on the GPUs that `FusedDecoder` fits, from the same weights."""

    def __init__(self, weights: GPTWeights, units: Units, size: GPTSize, head: Head, cache: KVCache, halts: Halts):
        """As FusedDecoder."""
        self._halts = halts
        self._weights, self._units, self._size, self._head, self._cache = weights, units, size, head, cache
        self._bits = Bits(units.bits, cache.bits)
        self._variants: dict[int, _Variant] = {}

    def source(self, n_rows: int) -> Source:
        """As FusedDecoder.source."""
        return source(self._size, self._head, self._bits, padded(n_rows, ROW_COUNTS))

    def decode(self, rows: Sequence[RowArguments], logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As FusedDecoder.decode."""
        n_rows = padded(len(rows), ROW_COUNTS)
        if n_rows not in self._variants:
            self._variants[n_rows] = _Variant(self, n_rows)
        variant = self._variants[n_rows]
        idle = RowArguments(slot=self._cache.n_slots - 1, position=rows[0].position, temperature=0, top_p=1)
        variant.launch([*rows, *[idle] * (n_rows - len(rows))], self._halts.next_launch())
        if logits is not None:
            logits.copy_(variant.logits[: len(rows), : self._head.size])
        return variant.tokens, variant.result

    def settle(self, rows: Sequence[RowArguments]) -> None:
        """As FusedDecoder.settle."""
        self.decode(rows)
        variant = self._variants[padded(len(rows), ROW_COUNTS)]
        quickest_place(variant.news, variant.use, lambda: self.decode(rows))


class _Variant:
    """The kernel for one number of rows, with the memory that it works on."""

    def __init__(self, decoder: WideDecoder, n_rows: int):
        size, head = decoder._size, decoder._head
        self._n_rows, self._n_codebooks, self._n_blocks = n_rows, head.n_codebooks, 8 * size.n_heads
        tiles = n_head_tiles(size, head)
        shared = _SharedMemory.of(size, decoder._bits, n_rows, decoder._units.scale_bytes)
        file, constants = source(size, head, decoder._bits, n_rows)
        module = build(file, ARCHITECTURE, **constants)
        self._kernel: Kernel = module.kernel("decode", shared.dynamic_bytes, cooperative=True)

        def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device="cuda")

        width, n_logits = size.width, self._n_blocks * tiles * 16
        self.logits, self.noise = (zeros(n_rows, n_logits, dtype=torch.float32) for _ in range(2))
        self.tokens = zeros(n_rows, size.block_size, dtype=torch.int32)
        self.result = zeros(n_rows, 2, dtype=torch.int32)
        # What blocks tell one another, in bytes; zero at the start of every call
        row_bytes = 2 * width * n_rows
        sizes = dict(x=1, middle=1, qkv=3, attended=1, hidden=4)
        sizes = {name: n * row_bytes for name, n in sizes.items()}
        sizes |= dict(exchange=self._n_blocks * 4 * 2 * n_rows * 16, drawn=n_rows * 16, logits_ready=self._n_blocks * 4)
        self._sizes = sizes
        self.news = zeros(sum(sizes.values()), dtype=torch.uint8)
        self._buffers = dict(
            weights=decoder._units.words,
            embedding=decoder._weights.embedding,
            positions=decoder._weights.positions,
            scales=decoder._units.scales,
            cache=decoder._cache.values,
            cache_scales=decoder._cache.scales,
            **self._parts(self.news),
            logits=self.logits,
            noise=self.noise,
            tokens=self.tokens,
            result=self.result,
        )
        fields: list[tuple[str, type]] = [(name, c_void_p) for name in self._buffers]
        fields += [("halted", c_void_p), ("n_slots", c_int), ("n_steps", c_int), ("launch", c_uint64)]
        fields += [("one_book", c_int), ("order", c_ubyte * n_rows)]
        layout = type("Arguments", (ctypes.Structure,), {"_fields_": [*fields, ("rows", room_for_rows(n_rows))]})
        pointers = {name: pointer(buffer) for name, buffer in self._buffers.items()}
        self._arguments = layout(**pointers, halted=decoder._halts.address, n_slots=decoder._cache.n_slots)

    def _parts(self, news: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._sizes, news.split(list(self._sizes.values())), strict=True))

    def use(self, news: Tensor) -> None:
        """In place of those so far."""
        self.news = news
        for name, part in self._parts(news).items():
            setattr(self._arguments, name, part.data_ptr())

    def launch(self, rows: Sequence[RowArguments], number: int) -> None:
        """As many steps as the longest row wants. Asynchronous."""
        arguments = self._arguments
        arguments.launch = number
        arguments.n_steps = max(row.n_tokens for row in rows)
        arguments.one_book = len({row.position % self._n_codebooks for row in rows}) == 1
        arguments.order[:] = deal_rows([row.length if row.n_tokens else 0 for row in rows])
        write_rows(rows, arguments, type(arguments).rows.offset)
        clear(self.news)
        self._kernel.launch((self._n_blocks, 1, 1), 32 * (N_WARPS + 2), [arguments], current_stream())


def _n_stages(n_bytes: int, shared: _SharedMemory) -> int:
    """Of keys and values."""
    return min(max(n_bytes // shared.unit_bytes, 1), shared.n_stages - N_TEAMS)


def _keys_in_flight(kv_bits: int, n_rows: int) -> int:
    """Bytes of keys and values that are on their way at once while a block polls (found by trying)."""
    if kv_bits == 8:
        return 8 << 10
    return 32 << 10 if n_rows <= 16 else 16 << 10


def deal_rows(lengths: Sequence[int]) -> list[int]:
    """Rows dealt to 8 blocks, equally many to each, the longest first to the one with the least to do: [8 * rows per block]."""
    hands: list[list[int]] = [[] for _ in range(8)]
    least = [(0, i) for i in range(8)]  # a heap: what a hand that has room has to do
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        load, i = heapq.heappop(least)
        hands[i].append(row)
        if len(hands[i]) < len(lengths) // 8:
            heapq.heappush(least, (load + lengths[row], i))
    return [row for hand in hands for row in hand]
