"""Decode steps of 1 to 8 rows as one kernel launch: `decode.cu`, its weights in streaming order, its arguments."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import c_int, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from barkstream.engines import Head
from barkstream.engines.kernels import Kernel, Source, build, current_stream, quickest_place
from barkstream.engines.kernels.weights import GPTWeights, LayerWeights
from barkstream.tokens import GPTSize

N_WARPS, COPIES = 8, 8
ENDED = 1  # of decode.cuh: a row's speech ended
ROW_COUNTS = (1, 2, 4, 8)


class RowArguments(NamedTuple):
    """`Row` of sampling.cuh."""

    seed: int = 0
    slot: int = 0
    length: int = 0
    position: int = 0
    ids: tuple[int, int] = (0, 0)
    n_tokens: int = 0
    top_k: int = 0
    temperature: float = 0.0
    top_p: float = 0.0
    min_eos_p: float = 0.0

    @property
    def filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


ROW = struct.Struct("=Q7i3f")  # as the kernels have it


def room_for_rows(n_rows: int) -> type[ctypes.Array[c_uint64]]:
    """Of a kernel's arguments."""
    return c_uint64 * (n_rows * ROW.size // ctypes.sizeof(c_uint64))


def write_rows(rows: Sequence[RowArguments], into: ctypes.Structure | memoryview, offset: int = 0) -> None:
    """As the kernels read them. offset: bytes."""
    for seed, slot, length, position, ids, *rest in rows:
        ROW.pack_into(into, offset, seed, slot, length, position, *ids, *rest)
        offset += ROW.size


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all slots, as cache.cuh lays them out; the last slot is scratch, for the rows that fill a batch up."""

    values: Tensor  # [layers, 2, slots, heads, block, 64] bf16; or uint8, 128 + value / scale
    scales: Tensor | None  # of the latter, [layers, 2, slots, heads, block] float32

    @classmethod
    def zeros(cls, size: GPTSize, n_slots: int, bits: int) -> KVCache:
        shape = (size.n_layers, 2, n_slots + 1, size.n_heads, size.block_size)
        values = torch.zeros(*shape, 64, dtype=torch.bfloat16 if bits == 16 else torch.uint8, device="cuda")
        return cls(values, None if bits == 16 else torch.zeros(shape, device="cuda"))

    @property
    def n_slots(self) -> int:
        """The scratch slot included."""
        return self.values.shape[2]

    @property
    def bits(self) -> int:
        return 16 if self.scales is None else 8


class Halts:
    """Ends launches early: numbers them, and tells those under way to make no step after the one that they are at."""

    def __init__(self) -> None:
        # The last launch that is to halt. Kernels look here, in the host's memory, once a step.
        self._word = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._on_host = self._word.numpy()
        self._launched = 0

    @property
    def address(self) -> int:
        """Where the kernels look."""
        return self._word.data_ptr()

    def next_launch(self) -> int:
        """The number of a launch that nothing halts yet."""
        self._launched += 1
        return self._launched

    def halt(self) -> None:
        """Launches so far make one step at least, and none after it. Any thread may call it."""
        self._on_host[0] = self._launched


def pointer(tensor: Tensor | None) -> int | None:
    """For a kernel; a null pointer if there is no tensor."""
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Bits:
    """Of the numbers that a decode step reads: 16 (bf16), or 8 with scales."""

    weights: int = 16
    kv: int = 16  # keys and values

    def __post_init__(self) -> None:
        """Raises ValueError, with what would be right."""
        for name, bits in (("weights", self.weights), ("keys and values", self.kv)):
            if bits not in (8, 16):
                raise ValueError(f"{name} have 16 or 8 bits, not {bits}")
        if self.weights < self.kv:
            raise ValueError("weights of 8 bits need keys and values of 8 bits")


def kernel_constants(size: GPTSize, head: Head, bits: Bits) -> dict[str, int]:
    """What the causal GPTs' kernel files are compiled with."""
    return dict(
        BITS=bits.weights,
        CACHE_BITS=bits.kv,
        WIDTH=size.width,
        N_HEADS=size.n_heads,
        BLOCK_SIZE=size.block_size,
        BOOK_SIZE=head.size,
        N_BOOKS=head.n_codebooks,
        END=-1 if head.end is None else head.end,
        STAGE=head.stage,
        FIRST_ID=head.first_id,
        NO_ID=size.n_input_ids,
    )


ARCHITECTURE = "sm_90a"


def padded(n_rows: int, row_counts: Sequence[int] = ROW_COUNTS) -> int:
    """The number of rows of the kernel that decodes so many."""
    return next(n for n in row_counts if n >= n_rows)


def source(size: GPTSize, head: Head, bits: Bits, n_rows: int) -> Source:
    """The kernel for so many rows, of ROW_COUNTS."""
    shape = dict(N_LAYERS=size.n_layers, N_ROWS=n_rows, HEAD_TILES=n_head_tiles(size, head))
    return "decode.cu", shape | kernel_constants(size, head, bits)


class FusedDecoder:
    """Decodes up to 8 rows on compute capability 9.0 or later, if the GPU can run 8 blocks a head at once."""

    def __init__(self, weights: GPTWeights, units: Units, size: GPTSize, head: Head, cache: KVCache, halts: Halts):
        """units: the weights as `pack_units` orders them."""
        self._halts = halts
        self._weights, self._units, self._size, self._head, self._cache = weights, units, size, head, cache
        self._bits = Bits(units.bits, cache.bits)
        self._n_blocks = 8 * size.n_heads
        self._variants: dict[int, _Variant] = {}
        self._number = 1

    @staticmethod
    def fits(size: GPTSize) -> bool:
        """Whether this GPU and this size allow it."""
        properties = torch.cuda.get_device_properties(0)
        even = size.n_layers % 2 == 0  # a bit tells one layer's packets from the next one's
        return (
            even
            and properties.major == 9
            and 8 * size.n_heads <= properties.multi_processor_count
            and size.head_width == 64
        )

    def source(self, n_rows: int) -> Source:
        """What `decode` of so many rows compiles when it is called first."""
        return source(self._size, self._head, self._bits, padded(n_rows))

    def decode(self, rows: Sequence[RowArguments], logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Start as many steps as the longest row wants; nothing waits for the GPU.

        Returns tokens [>= rows, block] int32 (indices within their codebook) and [>= rows, 2] int32: how many there are, and ENDED if
        speech ended, HALTED if the host ended the launch. Both are overwritten by the next call. logits: [rows, head.size] float32, to be
        filled with the last step's.
        """
        n_rows = padded(len(rows))
        variant = self._variants.get(n_rows) or self._build(n_rows)
        idle = RowArguments(slot=self._cache.n_slots - 1, position=rows[0].position, temperature=0, top_p=1)
        arguments = variant.arguments
        arguments.n_steps, arguments.number = max(row.n_tokens for row in rows), self._number
        arguments.launch = self._halts.next_launch()
        arguments.filter = any(row.filters for row in rows)
        arguments.one_book = len({row.position % self._head.n_codebooks for row in rows}) == 1
        last_logits = (
            None if logits is None else torch.empty(n_rows, self._head.size, dtype=torch.float32, device="cuda")
        )
        arguments.logits = None if last_logits is None else last_logits.data_ptr()
        write_rows([*rows, *[idle] * (n_rows - len(rows))], arguments, type(arguments).rows.offset)
        self._number = (self._number + arguments.n_steps) % (1 << 32)
        variant.kernel.launch((self._n_blocks, 1, 1), 32 * (N_WARPS + 2), [arguments], current_stream())
        if logits is not None and last_logits is not None:
            logits.copy_(last_logits[: len(rows)])
        return variant.tokens, variant.result

    def settle(self, rows: Sequence[RowArguments]) -> None:
        """Find a quick place for what the blocks exchange when so many rows are decoded, by decoding these."""
        self.decode(rows)
        variant = self._variants[padded(len(rows))]
        quickest_place(variant.packets, variant.use, lambda: self.decode(rows))

    def results(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """Where `decode` of so many rows leaves what it returns."""
        n_rows = padded(n_rows)
        variant = self._variants.get(n_rows) or self._build(n_rows)
        return variant.tokens, variant.result

    def _build(self, n_rows: int) -> _Variant:
        self._variants[n_rows] = _Variant(self, n_rows)
        return self._variants[n_rows]


class _Variant:
    """The kernel for one number of rows, with the memory that its blocks talk through."""

    def __init__(self, decoder: FusedDecoder, n_rows: int):
        size, head, width = decoder._size, decoder._head, decoder._size.width
        head_tiles = n_head_tiles(size, head)
        stages, partials = 12 * width * decoder._bits.weights, N_WARPS * 4 * n_rows * 8 * 4
        file, constants = source(size, head, decoder._bits, n_rows)
        shared_bytes = stages + 2 * partials + decoder._units.scale_bytes
        self.kernel: Kernel = build(file, ARCHITECTURE, **constants).kernel("decode", shared_bytes, cooperative=True)
        blocks = decoder._n_blocks
        parts = COPIES * 8 if n_rows == 1 else 17  # packets of a block and row, of attention
        packets = COPIES * size.n_heads * 24 + blocks * (parts + COPIES * 2 + head_tiles * 8) + COPIES * width * 7 // 8
        # Between launches what they hold is as good as zero.
        self.packets = torch.zeros(n_rows * packets, 2, dtype=torch.int64, device="cuda")
        self.tokens = torch.zeros(n_rows, size.block_size, dtype=torch.int32, device="cuda")
        self.result = torch.zeros(n_rows, 2, dtype=torch.int32, device="cuda")
        self.arguments = _arguments(n_rows)(
            weights=decoder._units.words.data_ptr(),
            embedding=decoder._weights.embedding.data_ptr(),
            positions=decoder._weights.positions.data_ptr(),
            scales=pointer(decoder._units.scales),
            cache=decoder._cache.values.data_ptr(),
            cache_scales=pointer(decoder._cache.scales),
            packets=self.packets.data_ptr(),
            tokens=self.tokens.data_ptr(),
            result=self.result.data_ptr(),
            halted=decoder._halts.address,
            n_slots=decoder._cache.n_slots,
        )

    def use(self, packets: Tensor) -> None:
        """In place of those so far."""
        self.packets, self.arguments.packets = packets, packets.data_ptr()


def _arguments(n_rows: int) -> type[ctypes.Structure]:
    """`Arguments` of decode.cu."""
    pointers = (
        "weights",
        "embedding",
        "positions",
        "scales",
        "cache",
        "cache_scales",
        "packets",
        "tokens",
        "result",
        "logits",
        "halted",
    )
    fields: list[tuple[str, type]] = [(name, c_void_p) for name in pointers]
    fields += [("n_slots", c_int), ("n_steps", c_int), ("launch", c_uint64), ("number", c_uint)]
    fields += [("filter", c_int), ("one_book", c_int)]
    return type("Arguments", (ctypes.Structure,), {"_fields_": [*fields, ("rows", room_for_rows(n_rows))]})


def n_head_tiles(size: GPTSize, head: Head) -> int:
    """Pairs of units that each of the 8 blocks a head has of a codebook's head."""
    return -(-head.size // (8 * size.n_heads * 16))


UNITS = (3, 1, 4, 4)  # of a block and a layer: queries, keys and values; output projection; the MLP's matrices


@dataclass(frozen=True)
class Units:
    """A causal GPT's weights in the order in which the kernels use them, see `pack_units`."""

    words: Tensor  # [blocks, units, width / 32, 32 lanes, 8] bf16; or uint8, 128 + weight / scale
    scales: Tensor | None  # of the latter, [blocks, units, 8 rows] float32

    @property
    def bits(self) -> int:
        return 16 if self.scales is None else 8

    @property
    def scale_bytes(self) -> int:
        """Of a block."""
        return 0 if self.scales is None else self.scales[0].nbytes


def pack_units(weights: GPTWeights, size: GPTSize, head: Head, bits: int = 16) -> Units:
    """Every block's weights in the order in which it uses them; with 8 bits, each row by the scale that makes its largest 127.

    A unit is 8 rows of `width` weights. Block 8 h + r has rows 8 r .. of head h's queries, keys and values, rows 8 b .. of both
    output projections (the MLP's in 4 pieces of k), rows 32 b .. of the MLP's first matrix, and its share of each codebook's head.
    Two units make the left operand of the tensor cores' m16n8k16: of each 32 of k, lane 4 g + j has eight, 8 j .., of row g.
    """
    width, n_blocks = size.width, 8 * size.n_heads
    # [blocks, units, 8, width], and how many units in a row have a row's scale in common
    parts: list[tuple[Tensor, int]] = []
    for layer in weights.layers:
        parts.append((layer.qkv.view(3, n_blocks, 8, width).transpose(0, 1), 1))
        parts.append((layer.out.view(n_blocks, 1, 8, width), 1))
        parts.append((layer.up.view(n_blocks, 4, 8, width), 1))
        parts.append((layer.down.view(n_blocks, 8, 4, width).transpose(1, 2), 4))
    n_rows = n_blocks * n_head_tiles(size, head) * 16
    for book in weights.head.split(head.size):
        padded = torch.nn.functional.pad(book, (0, 0, 0, n_rows - head.size))
        parts.append((padded.view(n_blocks, -1, 8, width), 1))
    scales = None
    if bits == 16:
        units = torch.cat([part for part, _ in parts], 1)
    else:
        quantized = [quantize(*part) for part in parts]
        units, scales = (torch.cat(each, 1) for each in zip(*quantized, strict=True))
    words = units.view(n_blocks, -1, 8, width // 32, 32).transpose(2, 3).reshape(n_blocks, -1, width // 32, 32, 8)
    return Units(words, scales)


def quantize(units: Tensor, together: int) -> tuple[Tensor, Tensor]:
    """units [blocks, n, 8, width] in bytes, 128 + weight / scale, and scales [blocks, n, 8]: `together` units in a row share theirs."""
    largest = units.abs().amax(-1).float()
    largest = largest.view(len(units), -1, together, 8).amax(2, keepdim=True).expand(-1, -1, together, -1)
    scales = (largest / 127).clamp(min=1e-12).reshape(len(units), -1, 8)
    return (units / scales[..., None] + 128).round().to(torch.uint8), scales


class PackedLayers(Sequence[LayerWeights]):
    """The layers' matrices out of packed units, each made anew whenever it is asked for: so that no second copy stays in memory."""

    def __init__(self, units: Tensor, size: GPTSize):
        """units: the words of `pack_units`, 16 bits each."""
        n_blocks, width = len(units), size.width
        self._n_layers, self._width = size.n_layers, width
        # 16 bytes an element, which copies move at once: [blocks, units, 8 rows, width / 32, 4]
        eights = units.view(n_blocks, -1, width // 32, 32 * 8).view(torch.complex128)
        self._rows = eights.view(n_blocks, -1, width // 32, 8, 4).transpose(2, 3)

    def __len__(self) -> int:
        return self._n_layers

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | list[LayerWeights]:
        which = range(len(self))[index]
        if isinstance(which, range):
            return [self[i] for i in which]
        width, n_units = self._width, sum(UNITS)
        qkv, out, up, down = self._rows[:, n_units * which : n_units * (which + 1)].split(UNITS, 1)

        def matrix(rows: Tensor, n_columns: int) -> Tensor:
            return rows.reshape(-1, n_columns // 8).view(torch.bfloat16)

        return LayerWeights(
            qkv=matrix(qkv.transpose(0, 1), width),
            out=matrix(out, width),
            up=matrix(up, width),
            down=matrix(down.transpose(1, 2), 4 * width),
        )
