"""The causal GPTs (semantic, coarse) as one ONNX graph for prefill and decode, and the block they share with `fine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from barkstream.export.graph import FLOAT, INT32, Graph, Shape
from barkstream.tokens import CoarseLayout, GPTSize, SemanticLayout

Attention = Callable[[int, ir.Value], ir.Value]  # (layer, q | k | v [B, S, 3 D]) -> [B, S, D]


def transformer(
    g: Graph, x: ir.Value, size: GPTSize, attention: Attention, wanted: Callable[[ir.Value], ir.Value] = lambda x: x
) -> ir.Value:
    """x [B, S, D] through all blocks: pre-norm, erf GELU, no dropout. Without the final norm.

    wanted: picks the positions whose result is used. After the last attention nothing mixes positions, so the rest are
    dropped there and not at the end (nano-bark's coarse stage: an eighth of a prefill's matrix products).
    """
    for i in range(size.n_layers):
        block = f"layers.{i}"
        qkv = g.linear(g.layer_norm(x, f"{block}.layernorm_1"), f"{block}.attn.att_proj")
        attended = attention(i, qkv)
        if i == size.n_layers - 1:
            x, attended = wanted(x), wanted(attended)
        x = g.Add(x, g.linear(attended, f"{block}.attn.out_proj"))
        hidden = g.Gelu(g.linear(g.layer_norm(x, f"{block}.layernorm_2"), f"{block}.mlp.in_proj"))
        x = g.Add(x, g.linear(hidden, f"{block}.mlp.out_proj"))
    return x


def semantic_model(weights: Mapping[str, np.ndarray], layout: SemanticLayout, int8: bool = False) -> ir.Model:
    """Text and history share positions: 2 ids each. Logits: the semantic tokens, then `end`."""
    head = np.append(np.arange(layout.n_tokens), layout.end)
    return causal_model(Graph(weights, int8), layout.size, n_ids=2, head=head, name="bark_semantic")


def coarse_model(weights: Mapping[str, np.ndarray], layout: CoarseLayout, int8: bool = False) -> ir.Model:
    """Logits: n_codebooks * codebook_size, from `first_id`."""
    head = layout.first_id + np.arange(layout.n_codebooks * layout.codebook_size)
    return causal_model(Graph(weights, int8), layout.size, n_ids=1, head=head, name="bark_coarse")


def causal_model(g: Graph, size: GPTSize, n_ids: int, head: np.ndarray, name: str) -> ir.Model:
    """A step of S tokens for B rows over a KV cache that is updated in place (bind output and input to one buffer).

    Inputs: token_ids [B, S, n_ids] (ids of one position are summed; n_input_ids is a zero row), last [B] (index in S of
    a row's last valid token), lengths [B] (tokens in the row's cache after the call), key_i / value_i [B, H, T, Dh].
    Prefill: rows padded on the right, nothing cached before. Decode: S = 1. (S > 1 onto a cache: B = 1 only, by GQA.)
    Outputs: logits [B, V] at `last`, for the ids in `head`; key_i_out / value_i_out.
    """
    token_ids = g.input("token_ids", INT32, ["batch", "tokens", n_ids])
    last, lengths = g.input("last", INT32, ["batch"]), g.input("lengths", INT32, ["batch"])
    one = np.int32(1)
    past = g.Sub(g.Sub(lengths, np.array(one)), last)  # [B] tokens cached before the call
    n_new = g.Cast(g.Shape(token_ids, start=1, end=2), to=INT32)  # [1]
    cached = CachedAttention(
        g, size, last_index=g.Sub(lengths, np.array(one)), total=g.Add(g.ReduceMax(past, keepdims=0), g.Squeeze(n_new))
    )
    x = g.Add(_embed(g, token_ids), _positions(g, past, n_new, size.block_size))
    at_last = g.Cast(g.Unsqueeze(last, [1]), to=ir.DataType.INT64)
    x = transformer(g, x, size, cached, wanted=lambda x: g.GatherND(x, at_last, batch_dims=1))  # [B, D]
    logits = g.linear(g.layer_norm(x, "layernorm_final"), "lm_head", rows=head)
    g.output("logits", logits, FLOAT, ["batch", len(head)])
    cached.declare_outputs()
    return g.model(name)


class CachedAttention:
    """GroupQueryAttention over key_i / value_i, which it declares as the graph's inputs."""

    def __init__(self, g: Graph, size: GPTSize, last_index: ir.Value, total: ir.Value) -> None:
        self.g, self.size, self.last_index, self.total = g, size, last_index, total
        self.shape: Shape = ["batch", size.n_heads, size.block_size, size.head_width]
        self.updated: list[tuple[str, ir.Value]] = []

    def __call__(self, layer: int, qkv: ir.Value) -> ir.Value:
        past = [self.g.input(f"{kind}_{layer}", FLOAT, self.shape) for kind in ("key", "value")]
        heads = {"num_heads": self.size.n_heads, "kv_num_heads": self.size.n_heads}
        operands = (qkv, None, None, *past, self.last_index, self.total)
        x, key, value = self.g.GroupQueryAttention(*operands, **heads, domain="com.microsoft", n_outputs=3)
        self.updated += [(f"key_{layer}_out", key), (f"value_{layer}_out", value)]
        return x

    def declare_outputs(self) -> None:
        for name, value in self.updated:
            self.g.output(name, value, FLOAT, self.shape)


def _embed(g: Graph, token_ids: ir.Value) -> ir.Value:
    """[B, S, C] -> [B, S, D]: the sum of each position's embeddings; one id past the table is a row of zeros."""
    table = g.constant("input_embeds_layer.weight", np.pad(g.weights["input_embeds_layer.weight"], ((0, 1), (0, 0))))
    return g.ReduceSum(g.Gather(table, token_ids), [2], keepdims=0)


def _positions(g: Graph, past: ir.Value, n_new: ir.Value, block_size: int) -> ir.Value:
    """[B, S, D]: embeddings of positions past, past + 1, ...; those of padding are clipped to the block."""
    steps = g.Range(np.array(0, np.int32), g.Squeeze(n_new), np.array(1, np.int32))
    positions = g.Add(g.Unsqueeze(past, [1]), g.Unsqueeze(steps, [0]))
    clipped = g.Clip(positions, np.array(0, np.int32), np.array(block_size - 1, np.int32))
    return g.Gather(g.weight("position_embeds_layer.weight"), clipped)
