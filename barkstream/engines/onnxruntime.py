"""The causal GPTs on ONNX Runtime: KV caches updated in place, rows of different lengths decoded in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from barkstream.engines import Chunk, Generation, Head, Row, Window
from barkstream.engines.slots import Slot, Slots
from barkstream.sampling import Floats, Ints, Sampling, draw, ends, gumbel_noise
from barkstream.tokens import GPTSize


def open_session(path: Path, n_threads: int) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU. Raises FileNotFoundError or RuntimeError with what to do."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `make export` (or `barkstream export CHECKPOINT`) first")
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.log_severity_level = 3
    # Between two decode steps the next one is under way within microseconds, but other stages' threads need the cores
    # when this one is idle: waiting threads sleep.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RuntimeError(
            f"{path} cannot be loaded, it may be truncated: run `make export` again ({error})"
        ) from error


class Cache:
    """Keys and values of B rows, and the graph's inputs and outputs, bound once: a step only writes numbers into arrays."""

    def __init__(self, session: ort.InferenceSession, size: GPTSize, n_ids: int, n_logits: int, keys_values: Floats):
        """keys_values: [2 layers, B, heads, block, head width], which the graph reads and updates in place."""
        n_rows = keys_values.shape[1]
        self.keys_values = keys_values
        self.ids = np.zeros((n_rows, 1, n_ids), np.int32)
        self.last = np.zeros(n_rows, np.int32)
        self.lengths = np.ones(n_rows, np.int32)
        self.logits = np.zeros((n_rows, n_logits), np.float32)
        self._session, self._size = session, size
        self._held: list[ort.OrtValue] = []
        self._caches = [ort.OrtValue.ortvalue_from_numpy(array) for array in keys_values]
        self._step = self._binding(self.ids)

    def step(self) -> Floats:
        """One decode step with the ids [B, 1, C] and lengths [B] set before; logits [B, V], overwritten by the next step."""
        self._session.run_with_iobinding(self._step)
        return self.logits

    def prefill(self, ids: Ints) -> Floats:
        """The whole prefix ids [B, S, C] at once; logits [B, V] after its last token."""
        self.last[:], self.lengths[:] = ids.shape[1] - 1, ids.shape[1]
        n_held = len(self._held)
        self._session.run_with_iobinding(self._binding(ids))
        del self._held[n_held:]
        self.last[:] = 0
        return self.logits

    def _value(self, array: np.ndarray) -> ort.OrtValue:
        """The array's own memory as ONNX Runtime's. A binding does not keep it alive, so we do."""
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._held.append(value)
        return value

    def _binding(self, ids: Ints) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, array in (("token_ids", ids), ("last", self.last), ("lengths", self.lengths)):
            binding.bind_ortvalue_input(name, self._value(array))
        binding.bind_ortvalue_output("logits", self._value(self.logits))
        for i in range(self._size.n_layers):
            for name, cache in ((f"key_{i}", self._caches[2 * i]), (f"value_{i}", self._caches[2 * i + 1])):
                binding.bind_ortvalue_input(name, cache)
                binding.bind_ortvalue_output(f"{name}_out", cache)  # the same memory: no copy of the cache per step
        return binding


@dataclass
class CpuSlot(Slot):
    """A stream's KV cache."""

    cache: Cache


@dataclass
class Decoding:
    """A row on its way: its slot, how much of it the cache holds, and what has been drawn."""

    row: Row
    slot: CpuSlot
    n_cached: int  # positions whose keys and values are in the cache
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def unfinished(self) -> bool:
        return not self.ended and len(self.tokens) < self.row.n_tokens

    def ids(self) -> Ints:
        """All ids [n, C]: the prefix, then what has been drawn."""
        return self.row.ids_with(np.array(self.tokens, np.int32))

    def next_ids(self) -> Ints:
        """Ids [C] of the position to feed: the prefix's last, or the token drawn last."""
        ids = self.row.ids[-1].copy()
        if self.tokens:
            ids[0] = self.tokens[-1]
        return ids

    def take(self, logits: Floats, head: Head) -> None:
        """Draw the next token from logits [V]."""
        position = self.row.position + len(self.tokens)
        eligible, first_id = head.eligible(logits, position)
        noise = gumbel_noise(self.row.sampling.seed, head.stage, position, head.size)
        token, tempered = draw(eligible, noise, self.row.sampling)
        if head.end is not None and ends(token, tempered, head.end, self.row.sampling):
            self.ended = True
        else:
            self.tokens.append(first_id + token)


class CausalEngine:
    """Generates tokens for batches of rows with one causal GPT."""

    def __init__(self, path: Path, size: GPTSize, head: Head, n_slots: int, max_batch: int, n_threads: int):
        """path: a stage's model.onnx. n_slots: streams whose KV cache is kept; max_batch: rows decoded together.

        Memory: (n_slots + max_batch) * 2 * layers * width * block * 4 bytes at most, taken as it is used.
        """
        self.head, self.size, self.max_batch = head, size, max_batch
        self._session = open_session(path, n_threads)
        self._n_ids = next(value.shape[2] for value in self._session.get_inputs() if value.name == "token_ids")
        self._slots = Slots([self._new_slot() for _ in range(max(n_slots, max_batch))])
        self._shared = self._memory(max_batch)  # where rows meet that are decoded together
        self._shared_caches: dict[int, Cache] = {}  # by number of rows

    @property
    def row_counts(self) -> list[int]:
        """Some numbers of rows, from one to a full batch."""
        return [2**i for i in range(self.max_batch.bit_length())]

    @property
    def n_owned_slots(self) -> int:
        """Slots that streams hold now, those of a call under way included."""
        return self._slots.n_owned

    def release(self, *streams: int) -> None:
        """Free streams' slots; nothing happens for one that has none."""
        for stream in streams:
            self._slots.release(stream)

    def generate(self, rows: list[Row]) -> list[Generation]:
        """Up to n_tokens new tokens for every row. Raises ValueError for a row that does not fit."""
        for row in rows:
            row.check(self.size)
        batches = [rows[i : i + self.max_batch] for i in range(0, len(rows), self.max_batch)]
        return [generation for batch in batches for generation in self._generate(batch)]

    def warm_up(self) -> None:
        """One prefill and a decode step alone and in a full batch, so that the first caller does not pay for memory."""
        n = self.size.block_size - 2
        rows = [Row(np.zeros((n, self._n_ids), np.int32), 2, 0, Sampling(temperature=0)) for _ in range(self.max_batch)]
        self.generate(rows[:1])
        self.generate(rows)

    def _generate(self, rows: list[Row]) -> list[Generation]:
        with self._slots.lease(rows) as slots:
            decodings = [self._start(row, slot) for row, slot in zip(rows, slots, strict=True)]
            self._decode([d for d in decodings if d.unfinished])
            for d in decodings:
                d.slot.ids = d.ids()[: d.n_cached]
        return [Generation(np.array(d.tokens, np.int32), d.ended) for d in decodings]

    def _start(self, row: Row, slot: CpuSlot) -> Decoding:
        """A row with its prefix in the cache: all but the last position if the slot knows that much, else all, prefilled."""
        n = len(row.ids)
        if slot.n_known(row.ids) >= n - 1:
            return Decoding(row, slot, n_cached=n - 1)
        decoding = Decoding(row, slot, n_cached=n)
        if row.n_tokens:
            decoding.take(slot.cache.prefill(row.ids[None])[0], self.head)
        return decoding

    def _decode(self, decodings: list[Decoding]) -> None:
        if len(decodings) == 1:
            return self._run(decodings, lambda n_rows: decodings[0].slot.cache)
        decodings = sorted(decodings, key=lambda d: -d.row.n_tokens)  # so that those who finish first stand last
        starts = [d.n_cached for d in decodings]
        for i, d in enumerate(decodings):
            self._shared[:, i, :, : d.n_cached] = d.slot.cache.keys_values[:, 0, :, : d.n_cached]
        self._run(decodings, self._shared_cache)
        for i, (d, start) in enumerate(zip(decodings, starts, strict=True)):
            d.slot.cache.keys_values[:, 0, :, start : d.n_cached] = self._shared[:, i, :, start : d.n_cached]
        return None

    def _run(self, decodings: list[Decoding], cache_for: Callable[[int], Cache]) -> None:
        """Decode steps until every row is finished; row i lies at place i of the cache."""
        running = list(decodings)
        while running:
            cache = cache_for(len(running))
            for i, d in enumerate(running):
                cache.ids[i, 0], cache.lengths[i] = d.next_ids(), d.n_cached + 1
            logits = cache.step()
            for i, d in enumerate(running):
                if d.unfinished:  # one that ended in the middle of the batch runs idle until those behind it are done
                    d.n_cached += 1
                    d.take(logits[i], self.head)
            while running and not running[-1].unfinished:
                running.pop()

    def _new_slot(self) -> CpuSlot:
        return CpuSlot(np.zeros((0, self._n_ids), np.int32), self._cache(self._memory(1)))

    def _memory(self, n_rows: int) -> Floats:
        size = self.size
        return np.zeros((2 * size.n_layers, n_rows, size.n_heads, size.block_size, size.head_width), np.float32)

    def _cache(self, keys_values: Floats) -> Cache:
        return Cache(self._session, self.size, self._n_ids, self.head.n_codebooks * self.head.size, keys_values)

    def _shared_cache(self, n_rows: int) -> Cache:
        if n_rows not in self._shared_caches:
            self._shared_caches[n_rows] = self._cache(self._shared[:, :n_rows])
        return self._shared_caches[n_rows]


class FineEngine:
    """Fills windows of frames, one after another."""

    def __init__(self, path: Path, n_threads: int):
        """path: the stage's model.onnx."""
        self._session = open_session(path, n_threads)

    def fill(self, windows: Sequence[Window]) -> list[Ints]:
        """Each window's codes [K, T] with the codebooks that were not given drawn anew from frame fill_from on."""
        return [self._fill(window) for window in windows]

    def _fill(self, window: Window) -> Ints:
        return _run(
            self._session,
            codes=window.codes,
            fill_from=np.array([window.fill_from], np.int32),
            uniforms=window.uniforms,
            temperature=np.array([window.temperature], np.float32),
        )[0]


class CodecEngine:
    """Decodes chunks of codes, one after another."""

    def __init__(self, path: Path, n_threads: int):
        """path: the stage's model.onnx."""
        self._session = open_session(path, n_threads)

    def decode(self, chunks: Sequence[Chunk]) -> list[tuple[Floats, Floats]]:
        """(samples [samples_per_frame n], next state [N]) of each chunk."""
        return [self._decode(chunk.codes, chunk.state) for chunk in chunks]

    def _decode(self, codes: Ints, state: Floats) -> tuple[Floats, Floats]:
        audio, next_state = _run(self._session, codes=codes, state=state)
        return audio, next_state


def _run(session: ort.InferenceSession, **inputs: np.ndarray) -> list[np.ndarray]:
    """One call for one stream: a batch dimension added and taken away again."""
    outputs = session.run(None, {name: array[None] for name, array in inputs.items()})
    return [np.asarray(output)[0] for output in outputs]
