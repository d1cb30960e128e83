"""The causal GPTs on an NVIDIA GPU: bf16 weights and KV cache (or 8 bits), many decode steps without a word from the host.

Prefill fills the cache with all of a prefix but its last position, which the first decode step feeds: so no prefill needs
logits, and sampling happens in one place. Up to 64 rows decode in one kernel launch, few of them by
`kernels/decode.cu`, more by `kernels/wide.cu`; CUDA graphs around cuBLAS (`kernels/batched.cu`) are for GPUs that those do not fit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from barkstream.engines import Generation, Head, Row
from barkstream.engines.kernels import compile_all
from barkstream.engines.kernels.batched import BatchedDecoder, Layers, Prefill
from barkstream.engines.kernels.fused import (
    ARCHITECTURE,
    ENDED,
    Bits,
    FusedDecoder,
    Halts,
    KVCache,
    PackedLayers,
    RowArguments,
    pack_units,
)
from barkstream.engines.kernels.weights import load_weights, read_onnx
from barkstream.engines.kernels.wide import ROW_COUNTS, WideDecoder
from barkstream.engines.slots import Slot, Slots
from barkstream.engines.transfers import download_all
from barkstream.sampling import Ints, Sampling
from barkstream.tokens import GPTSize

WARM_UP = Sampling(temperature=0)
FUSED_ROWS = 4  # up to here `decode.cu` is faster than `wide.cu`
PREFILL_ROWS = 4  # at once, as one CUDA graph; their activations take 30 MB a row (large, 886 tokens)


@dataclass
class GpuSlot(Slot):
    """A place in the GPU's cache."""

    index: int


class CudaEngine:
    """Generates tokens for batches of rows with one causal GPT. One thread at a time may use it."""

    def __init__(
        self,
        weights: Mapping[str, np.ndarray | Tensor],
        size: GPTSize,
        head: Head,
        n_slots: int = 32,
        max_batch: int = 32,
        fused: bool = True,
        one_copy: bool = False,
        bits: int = 16,
        kv_bits: int | None = None,
    ):
        """weights: by Hugging Face name, see `load_weights`. n_slots: streams whose KV cache is kept; max_batch: rows decoded together.
        one_copy: keep the weights in the fused kernels' order only; every prefill then unpacks them, layer by layer.
        bits: of the weights that decode steps read, kv_bits: of keys and values (None: as many): 16 (bf16), or 8 with scales, for GPUs
        that the fused kernels fit. Prefills compute in bf16 with bf16 weights either way.

        GPU memory: 2 copies of the weights in bf16 (1 with one_copy; 1.5 with 8 bits), and
        (max(n_slots, max_batch) + 1) * 4 * layers * width * block bytes of cache (large: 100 MB a slot; with 8 bits 53).

        Raises ValueError for bits, a size or a GPU that there are no kernels for.
        """
        self.bits = Bits(bits, bits if kv_bits is None else kv_bits)
        if self.bits.kv == 8 and max_batch > ROW_COUNTS[-1]:
            raise ValueError(f"8 bits are for at most {ROW_COUNTS[-1]} rows at once, not {max_batch}")
        if size.head_width != 64:
            raise ValueError(f"the cuda engine's kernels are made for heads 64 wide, not {size.head_width}")
        self.size, self.head, self.max_batch = size, head, max_batch
        n_slots = max(n_slots, max_batch)
        on_gpu = load_weights(weights, size, head)
        self.cache = KVCache.zeros(size, n_slots, self.bits.kv)
        self._fused = self._wide = self._batched = None
        self._halts = Halts()
        if fused and FusedDecoder.fits(size):
            units = pack_units(on_gpu, size, head, bits)
            if one_copy and bits == 16:
                on_gpu = replace(on_gpu, layers=PackedLayers(units.words, size))
            self._fused = FusedDecoder(on_gpu, units, size, head, self.cache, self._halts)
            self._wide = WideDecoder(on_gpu, units, size, head, self.cache, self._halts)
        elif self.bits.kv == 8:
            raise ValueError(
                "8 bits need a GPU of compute capability 9.x and a model that the fused kernels fit: use bf16"
            )
        layers = Layers(on_gpu, size, head, self.cache)
        self._prefill = Prefill(layers)
        if self.bits.kv == 16:
            self._batched = BatchedDecoder(layers)
        # The id of the first token of the codebook that a position draws from.
        books = torch.arange(size.block_size + head.n_codebooks, dtype=torch.int32, device="cuda") % head.n_codebooks
        self._first_ids = head.first_id + head.size * books
        self._slots = Slots([GpuSlot(np.zeros((0, 1), np.int32), i) for i in range(n_slots)])

    @classmethod
    def load(
        cls,
        path: Path,
        size: GPTSize,
        head: Head,
        n_slots: int = 32,
        max_batch: int = 32,
        one_copy: bool = False,
        bits: int = 16,
        kv_bits: int | None = None,
    ) -> CudaEngine:
        """path: a stage's model.onnx, of which only the weights are read."""
        return cls(read_onnx(path), size, head, n_slots, max_batch, one_copy=one_copy, bits=bits, kv_bits=kv_bits)

    @property
    def n_owned_slots(self) -> int:
        """Slots that streams hold now, those of a call under way included."""
        return self._slots.n_owned

    @property
    def row_counts(self) -> list[int]:
        """Numbers of rows that there are kernels for; others take as long as the next one."""
        counts = {2**i for i in range(self.max_batch.bit_length())}
        if self._wide is not None:
            counts |= {n for n in ROW_COUNTS if FUSED_ROWS < n <= self.max_batch}
        return sorted(counts)

    @property
    def start_alone(self) -> Callable[[Row, int, Callable[[], bool]], Callable[[], list[Generation]]] | None:
        """`start` for an only row, which may have a chain; None if this GPU does not fit the kernels that know how.

        The row goes in pieces of so many tokens at most, each of them launched behind the one before, whose tokens it finds on the GPU:
        two are under way for as long as the callable says that it may go on. What was drawn by then, or until it was halted, is the result.
        """
        return None if self._fused is None else self._start_alone

    @property
    def halt(self) -> Callable[[], None] | None:
        """Ends what is under way after the decode step that it is at, whatever was wanted: its generations are then shorter, and not ended.
        Any thread may call it. None if this GPU does not fit the kernels that know how."""
        return None if self._fused is None else self._halts.halt

    def release(self, *streams: int) -> None:
        """Free streams' slots; nothing happens for one that has none."""
        for stream in streams:
            self._slots.release(stream)

    def generate(self, rows: list[Row]) -> list[Generation]:
        """Up to n_tokens new tokens for every row. Raises ValueError for a row that does not fit."""
        batches = [rows[i : i + self.max_batch] for i in range(0, len(rows), self.max_batch)]
        return [generation for batch in batches for generation in self.start(batch)()]

    def start(self, rows: list[Row]) -> Callable[[], list[Generation]]:
        """`generate` for at most max_batch rows: launches, and returns what waits for the results. To be called before the next start.

        Raises ValueError for a row that does not fit.
        """
        for row in rows:
            row.check(self.size)
        slots = self._slots.take(rows)
        try:
            wait = self._launch(rows, slots)
        except BaseException:
            self._slots.give_back(rows, slots)
            raise

        def finish() -> list[Generation]:
            try:
                tokens, results = wait()
                generations = self._take(rows, tokens, results)
                for slot, generation in zip(slots, generations, strict=True):
                    slot.ids = _held(generation)
            finally:
                self._slots.give_back(rows, slots)
            return generations

        return finish

    def _start_alone(self, row: Row, n_piece: int, goes_on: Callable[[], bool]) -> Callable[[], list[Generation]]:
        row.check(self.size)
        with ExitStack() as undo:
            (slot,) = undo.enter_context(self._slots.lease([row]))
            pieces = _Pieces(self, row, slot, n_piece)
            pieces.launch()
            leased = undo.pop_all()

        def finish() -> list[Generation]:
            with leased:
                said: list[Generation] = []
                while pieces.under_way and not (said and said[-1].ended):
                    while len(pieces.under_way) < 2 and pieces.are_left and goes_on():
                        pieces.launch()
                    said.append(pieces.take())
                pieces.settle()
            return [Generation.joined([each.tokens for each in said], said[-1].ended)]

        return finish

    def _launch_behind(self, row: Row, slot: GpuSlot, n_before: int) -> Callable[[], tuple[Ints, Ints]]:
        """Decode steps of a row whose last id is the last of the n_before tokens of the launch before."""
        arguments = self._arguments(row, slot)
        arguments = arguments._replace(ids=(-n_before, arguments.ids[1]))
        tokens, results = self.decode([arguments])
        tokens, results = download_all(tokens[:1], results[:1])
        return lambda: (tokens(), results())

    def _note_ids(self, row: Row, into: Tensor) -> None:
        """The ids [n] of an only row's tokens, which were launched last."""
        assert self._fused is not None
        tokens, _ = self._fused.results(1)
        first = row.position % self.head.n_codebooks
        torch.add(tokens[0, : len(into)], self._first_ids[first : first + len(into)], out=into)

    def warm_up(self, prefix_lengths: Sequence[int]) -> None:
        """Compile the kernels and capture the graphs of every batch size, and those of prefixes of these lengths."""
        compile_all(
            [
                decoder.source(n)
                for n in self.row_counts
                if isinstance(decoder := self._decoder(n), FusedDecoder | WideDecoder)
            ],
            ARCHITECTURE,
        )
        for n_rows in self.row_counts:
            ids = np.full((2, 1), self.size.n_input_ids, np.int32)
            self.generate([Row(ids, 2, 0, WARM_UP) for _ in range(n_rows)])
            if isinstance(decoder := self._decoder(n_rows), FusedDecoder | WideDecoder):
                decoder.settle(self._rows_for_trial(n_rows))
        for n_rows in range(1, min(self.max_batch, PREFILL_ROWS) + 1):
            for length in prefix_lengths:
                scratch = [self.cache.n_slots - 1] * n_rows
                self.prefill([np.full((length, 1), self.size.n_input_ids, np.int32)] * n_rows, scratch)
        torch.cuda.synchronize()

    def _rows_for_trial(self, n_rows: int) -> list[RowArguments]:
        """Some steps in the middle of a block."""
        row = Row(np.full((self.size.block_size * 3 // 4, 1), self.size.n_input_ids, np.int32), 16, 0, WARM_UP)
        return [self._arguments(row, GpuSlot(row.ids, i)) for i in range(n_rows)]

    def prefill(self, ids: Sequence[Ints], slots: Sequence[int]) -> None:
        """Keys and values of whole prefixes [S, C] into slots. Asynchronous."""
        for i in range(0, len(ids), PREFILL_ROWS):
            self._prefill(ids[i : i + PREFILL_ROWS], slots[i : i + PREFILL_ROWS])

    def decode(self, rows: Sequence[RowArguments], logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decode steps for rows whose slots are filled, see `FusedDecoder.decode`. Asynchronous."""
        return self._decoder(len(rows)).decode(rows, logits)

    def _decoder(self, n_rows: int) -> FusedDecoder | WideDecoder | BatchedDecoder:
        """What decodes so many rows fastest on this GPU, see docs/performance.md."""
        if self._fused is not None and n_rows <= FUSED_ROWS:
            return self._fused
        if self._wide is not None and n_rows <= ROW_COUNTS[-1]:
            return self._wide
        assert self._batched is not None, "8 bits, and more rows than max_batch may be"
        return self._batched

    def _launch(self, rows: list[Row], slots: Sequence[GpuSlot]) -> Callable[[], tuple[Ints, Ints]]:
        """Prefill what is new, decode; what is returned waits for tokens [B, block] and results [B, 2]."""
        new = [(row, slot) for row, slot in zip(rows, slots, strict=True) if slot.n_known(row.ids) < len(row.ids) - 1]
        for _, slot in new:
            slot.ids = slot.ids[:0]
        if new:
            self.prefill([row.ids[:-1] for row, _ in new], [slot.index for _, slot in new])
        tokens, results = self.decode([self._arguments(row, slot) for row, slot in zip(rows, slots, strict=True)])
        tokens, results = download_all(tokens[: len(rows)], results[: len(rows)])
        drawn = slice(None), slice(max(row.n_tokens for row in rows))
        return lambda: (tokens(drawn), results())

    def _arguments(self, row: Row, slot: GpuSlot) -> RowArguments:
        ids, sampling = row.ids, row.sampling
        last = ids[-1].tolist()
        return RowArguments(
            sampling.seed % (1 << 64),
            slot.index,
            len(ids) - 1,
            row.position,
            (last[0], last[1] if len(last) > 1 else self.size.n_input_ids),
            row.n_tokens,
            sampling.top_k,
            sampling.temperature,
            sampling.top_p,
            sampling.min_eos_p,
        )

    def _take(self, rows: list[Row], tokens: Ints, results: Ints) -> list[Generation]:
        """tokens: [B, n], indices within their codebook."""
        positions = np.array([[row.position] for row in rows], np.int32)
        books = positions + np.arange(max(row.n_tokens for row in rows), dtype=np.int32)
        books %= self.head.n_codebooks
        drawn = tokens[:, : books.shape[1]] + (books * self.head.size + self.head.first_id)  # int32, as tokens are
        generations = []
        for row, ids, (n, reason) in zip(rows, drawn, results.tolist(), strict=True):
            generations.append(Generation(ids[:n], reason == ENDED, row.ids_with(ids[:n])))
        return generations


class _Pieces:
    """An only row's pieces, launched one behind the other. On the host the ids drawn by those under way are not known: they are 0."""

    def __init__(self, engine: CudaEngine, row: Row, slot: GpuSlot, n_piece: int):
        assert row.chain is None or engine.head.end is None, "a chain's windows do not end early"
        self._engine, self._slot, self._n_piece = engine, slot, n_piece
        self._to_launch = self._to_take = row
        self._last: Row | None = None  # launched
        self._is_halted = False
        self._is_lost = False  # what the slot holds: a window's prefix was put there behind a piece that was halted
        self.under_way: deque[Callable[[], tuple[Ints, Ints]]] = deque()
        self._slid: deque[bool] = deque()  # of those: whether a prefix went before
        # Ids drawn before the last launch, of which prefixes of a chain's windows are made, behind heads of so many.
        self._n_head = row.chain.heads.shape[1] if row.chain else 0
        self._drawn = torch.empty(row.n_tokens if row.chain else 0, dtype=torch.int32, device="cuda")
        self._n_drawn = 0

    @property
    def are_left(self) -> bool:
        """Pieces that may be launched."""
        return self._to_launch.n_tokens > 0 and not self._is_halted

    def launch(self) -> None:
        """The next one."""
        piece = self._to_launch.piece(self._n_piece)
        self._slid.append(False)
        if self._last is None:
            self.under_way.append(self._engine._launch([piece], [self._slot]))
            self._slot.ids = self._slot.ids[:0]  # not known until it is over
        else:
            self._launch_behind(self._last, piece)
        self._last, self._to_launch = piece, self._to_launch.after(np.zeros(piece.n_tokens, np.int32))

    def _launch_behind(self, last: Row, piece: Row) -> None:
        engine, n = self._engine, self._n_drawn + last.n_tokens
        if self._n_head:
            engine._note_ids(last, self._drawn[self._n_drawn : n])
        self._n_drawn = n
        held = last.ids_with(np.zeros(last.n_tokens, np.int32))
        if not np.array_equal(piece.ids, held):  # a window that slides; else the cache goes on
            unknown = self._drawn[max(0, n - len(piece.ids) + self._n_head) : n]
            engine._prefill([piece.ids[:-1]], [self._slot.index], partial(_amend, len(piece.ids), unknown))
            self._slid[-1] = True
        self.under_way.append(engine._launch_behind(piece, self._slot, last.n_tokens))

    def take(self) -> Generation:
        """Wait for the oldest that is under way. Behind one that was halted there are no tokens."""
        piece = self._to_take.piece(self._n_piece)
        (generation,) = self._engine._take([piece], *self.under_way.popleft()())
        self._is_lost |= self._slid.popleft() and self._is_halted
        self._is_halted |= len(generation.tokens) < piece.n_tokens and not generation.ended
        self._slot.ids, self._to_take = _held(generation), self._to_take.after(generation.tokens, generation.ids)
        return generation

    def settle(self) -> None:
        """Nothing is under way any more."""
        if self._is_lost:
            self._slot.ids = self._slot.ids[:0]


def _held(generation: Generation) -> Ints:
    """The prefix [n, C] that a row's slot holds after a call: all that was fed, which is not the token drawn last."""
    assert generation.ids is not None, "of this engine"
    return generation.ids if generation.ended else generation.ids[:-1]


def _amend(n_ids: int, unknown: Tensor, ids: Tensor) -> None:
    """Put into a prefix of n_ids on the GPU, which is prefilled but for its last one, those that were not known on the host."""
    ids[n_ids - len(unknown) : n_ids - 1].copy_(unknown[:-1])
