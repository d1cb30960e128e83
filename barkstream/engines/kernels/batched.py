"""Many rows at once: prefill of whole prefixes, and decode steps as CUDA graphs.

Matrix products are cuBLASLt's (`products.py`), attention of prefixes is `attention.cu`, the rest `batched.cu`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_int, c_void_p

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from barkstream.engines import Head
from barkstream.engines.kernels import Kernel, build, current_stream
from barkstream.engines.kernels.attention import Attention
from barkstream.engines.kernels.fused import ROW, Bits, KVCache, RowArguments, kernel_constants, pointer, write_rows
from barkstream.engines.kernels.graphs import Graph, capture
from barkstream.engines.kernels.products import add_product, gelu_of_product, product
from barkstream.engines.kernels.weights import GPTWeights
from barkstream.engines.transfers import Inputs, upload
from barkstream.sampling import Ints
from barkstream.tokens import GPTSize

PREFILL_STEP = 128  # prefixes are padded to a multiple of this many tokens
GRAPH_TOKENS = 4096  # a prefill of more tokens than this keeps the GPU busy without a graph
NORM_ROWS = 2  # of a block of `layer_norm` in norm.cuh
STATE_FIELDS = 6  # length, ids, n_drawn, running, ended: `RowState` of batched.cu

Attend = Callable[[int, Tensor], Tensor]  # (layer, q | k | v [rows, 3 width]) -> [rows, width]


class Layers:
    """The transformer over rows of activations; attention is the caller's."""

    def __init__(self, weights: GPTWeights, size: GPTSize, head: Head, cache: KVCache):
        self.weights, self.size, self.head, self.cache = weights, size, head, cache
        major, minor = torch.cuda.get_device_capability()
        constants = kernel_constants(size, head, Bits(kv=cache.bits))
        module = build("batched.cu", f"sm_{major}{minor}", **constants)
        names = ["embed", "layer_norm", "store", "sample"] + ["attend"] * (cache.bits == 16)
        self.kernels: dict[str, Kernel] = {name: module.kernel(name) for name in names}
        self.attention = Attention(size.width, cache, constants)

    def run(self, states: Tensor, attend: Attend, n_layers: int) -> Tensor:
        """states: [rows, 6] int32, what to feed where. Returns the normed activations [rows, width] bf16 behind n_layers."""
        x = torch.empty(len(states), self.size.width, dtype=torch.float32, device="cuda")
        normed = torch.empty_like(x, dtype=torch.bfloat16)
        self.launch("embed", (len(x), 1, 1), states, self.weights.embedding, self.weights.positions, x, normed)
        for i in range(n_layers):
            layer = self.weights.layers[i]
            add_product(x, attend(i, product(normed, layer.qkv)), layer.out)
            self._norm(x, normed)
            add_product(x, gelu_of_product(normed, layer.up), layer.down)
            self._norm(x, normed)
        return normed

    def store(self, slots: Tensor, qkv: Tensor, layer: int) -> None:
        """Keys and values of whole prefixes, q | k | v [rows * tokens, 3 width] bf16, into the cache's slots [rows]."""
        cache = self.cache
        places = slots, qkv, cache.values, cache.scales, cache.n_slots
        self.launch("store", (len(qkv), 1, 1), *places, layer, len(qkv) // len(slots))

    def launch(self, name: str, grid: tuple[int, int, int], *arguments: Tensor | int | None, block: int = 256) -> None:
        """None: no such tensor."""
        passed = [c_int(a) if isinstance(a, int) else c_void_p(pointer(a)) for a in arguments]
        self.kernels[name].launch(grid, block, passed, current_stream())

    def _norm(self, x: Tensor, normed: Tensor) -> None:
        self.launch("layer_norm", (-(-len(x) // NORM_ROWS), 1, 1), x, normed, len(x), block=32 * NORM_ROWS)


class Prefill:
    """Keys and values of whole prefixes into the cache, padded to few lengths, small ones as CUDA graphs."""

    def __init__(self, layers: Layers):
        self._layers = layers
        self._graphs: dict[tuple[int, int], tuple[Graph, Inputs]] = {}
        # A row's states but for its ids: so they need not be made of three kinds of numbers each time.
        self._blank = np.zeros((layers.size.block_size, STATE_FIELDS), np.int32)
        self._blank[:, 0], self._blank[:, 1:3] = np.arange(len(self._blank)), layers.size.n_input_ids

    def __call__(
        self, ids: Sequence[Ints], slots: Sequence[int], amend: Callable[[Tensor], None] = lambda ids: None
    ) -> None:
        """ids: [S, C] of each row (C = 1 or 2), all of which goes into the row's slot. amend: told of the first ids of all rows' positions
        on the GPU, [rows * padded S], before they are used. Asynchronous."""
        size = self._layers.size
        n_rows = len(ids)
        n_tokens = min(-(-max(map(len, ids)) // PREFILL_STEP) * PREFILL_STEP, size.block_size)

        def fill(inputs: dict[str, np.ndarray]) -> None:
            states = inputs["states"].reshape(n_rows, n_tokens, STATE_FIELDS)
            states[:] = self._blank[:n_tokens]
            for i, row in enumerate(ids):
                states[i, : len(row), 1 : 1 + row.shape[1]] = row
            inputs["slots"][:] = slots

        if n_rows * n_tokens > GRAPH_TOKENS:
            inputs = self._inputs(n_rows, n_tokens)
            inputs.send(fill)
            amend(inputs["states"][:, 1])
            self._forward(inputs["states"], inputs["slots"])
            return
        graph, inputs = self._graphs.get((n_rows, n_tokens)) or self._capture(n_rows, n_tokens)
        inputs.send(fill)
        amend(inputs["states"][:, 1])
        graph.replay()

    def _capture(self, n_rows: int, n_tokens: int) -> tuple[Graph, Inputs]:
        inputs = self._inputs(n_rows, n_tokens)
        inputs["slots"].fill_(self._layers.cache.n_slots - 1)
        graph = capture(lambda: self._forward(inputs["states"], inputs["slots"]))
        self._graphs[n_rows, n_tokens] = graph, inputs
        return self._graphs[n_rows, n_tokens]

    @staticmethod
    def _inputs(n_rows: int, n_tokens: int) -> Inputs:
        return Inputs(states=((n_rows * n_tokens, STATE_FIELDS), torch.int32), slots=((n_rows,), torch.int32))

    def _forward(self, states: Tensor, slots: Tensor) -> None:
        layers, size = self._layers, self._layers.size
        n_tokens = len(states) // len(slots)

        def attend(i: int, qkv: Tensor) -> Tensor:
            if Attention.fits(n_tokens):
                return layers.attention(qkv, len(slots), slots, i)
            layers.store(slots, qkv, i)
            q, k, v = qkv.view(len(slots), n_tokens, 3, size.n_heads, 64).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return attended.transpose(1, 2).reshape(len(states), size.width)

        last = size.n_layers - 1  # of the last layer only keys and values are wanted
        normed = layers.run(states, attend, last)
        layers.store(slots, product(normed, layers.weights.layers[last].qkv), last)


class BatchedDecoder:
    """Decode steps of up to max_rows rows, one CUDA graph for each power of two. The cache holds bf16."""

    def __init__(self, layers: Layers):
        self._layers = layers
        self._steps: dict[int, _Step] = {}

    def decode(self, rows: Sequence[RowArguments], logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As FusedDecoder.decode."""
        n_rows = 1 << (len(rows) - 1).bit_length()
        if n_rows not in self._steps:
            self._steps[n_rows] = _Step(self._layers, n_rows)
        step = self._steps[n_rows]
        step.set(rows)
        for _ in range(max(row.n_tokens for row in rows)):
            step.graph.replay()
        if logits is not None:
            for i, row in enumerate(rows):
                book = (row.position + row.n_tokens - 1) % self._layers.head.n_codebooks
                logits[i] = step.logits[i].view(self._layers.head.n_codebooks, -1)[book]
        return step.tokens, step.states[:, [3, 5]]


class _Step:
    """One decode step of n_rows rows: its graph and the memory it works on."""

    def __init__(self, layers: Layers, n_rows: int):
        self._n_rows, self._scratch = n_rows, layers.cache.n_slots - 1
        self.rows = torch.zeros(n_rows, ROW.size, dtype=torch.uint8, device="cuda")
        self.states = torch.zeros(n_rows, STATE_FIELDS, dtype=torch.int32, device="cuda")
        self.tokens = torch.zeros(n_rows, layers.size.block_size, dtype=torch.int32, device="cuda")
        self.graph = capture(lambda: self._step(layers))

    def set(self, rows: Sequence[RowArguments]) -> None:
        rows = [*rows, *[RowArguments(slot=self._scratch, top_p=1)] * (self._n_rows - len(rows))]
        states = [[row.length, *row.ids, 0, row.n_tokens > 0, 0] for row in rows]
        packed = np.zeros(tuple(self.rows.shape), np.uint8)
        write_rows(rows, packed.data)
        upload(packed, self.rows)
        upload(np.array(states, np.int32), self.states)

    def _step(self, layers: Layers) -> None:
        size, _head, cache = layers.size, layers.head, layers.cache

        def attend(i: int, qkv: Tensor) -> Tensor:
            attended = torch.empty(self._n_rows, size.width, dtype=torch.bfloat16, device="cuda")
            grid = (size.n_heads, self._n_rows, 1)
            layers.launch("attend", grid, self.rows, self.states, qkv, cache.values, cache.n_slots, i, attended)
            return attended

        normed = layers.run(self.states, attend, size.n_layers)
        self.logits = torch.mm(normed, layers.weights.head.t(), out_dtype=torch.float32)
        layers.launch("sample", (self._n_rows, 1, 1), self.rows, self.states, self.logits, self.tokens, block=1024)
