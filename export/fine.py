"""The fine GPT as one ONNX graph: fills codebooks 2.. of a window in order, sampling inside the graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from barkstream.export.gpt import transformer
from barkstream.export.graph import FLOAT, INT32, Graph
from barkstream.tokens import FineLayout


def fine_model(weights: Mapping[str, np.ndarray], layout: FineLayout, int8: bool = False) -> ir.Model:
    """Inputs: codes [B, K, T], fill_from [B, 1] (the first frame to fill), uniforms [B, K - given, T] in (0, 1),
    temperature [B, 1] (0: argmax).

    Output: filled [B, K, T]. One pass a codebook k, over the summed embeddings of codebooks 0..k, whatever stands in k
    so far: `unknown`, or what an earlier window filled, as in the reference. Frames before fill_from pass through.
    """
    g, n_to_fill = Graph(weights, int8), layout.n_codebooks - layout.n_given
    codes = g.input("codes", INT32, ["batch", layout.n_codebooks, "frames"])
    uniforms = g.input("uniforms", FLOAT, ["batch", n_to_fill, "frames"])
    is_filled = g.LessOrEqual(g.input("fill_from", INT32, ["batch", 1]), _frames(g, codes))  # [B, T]
    temperature = g.Unsqueeze(g.input("temperature", FLOAT, ["batch", 1]), [2])  # [B, 1, 1]
    filled = [g.Gather(codes, np.array(k), axis=1) for k in range(layout.n_codebooks)]
    x = _positions(g, codes)
    for k in range(layout.n_codebooks):
        known = filled[k]
        if k >= layout.n_given:
            logits = _logits(g, g.Add(x, _embed(g, k, known)), layout, k)
            token = sample(g, logits, g.Gather(uniforms, np.array(k - layout.n_given), axis=1), temperature)
            filled[k] = g.Where(is_filled, token, known)
        x = g.Add(x, _embed(g, k, filled[k]))
    g.output(
        "filled",
        g.Concat(*[g.Unsqueeze(f, [1]) for f in filled], axis=1),
        INT32,
        ["batch", layout.n_codebooks, "frames"],
    )
    return g.model("bark_fine")


def _frames(g: Graph, codes: ir.Value) -> ir.Value:
    """[T]: 0, 1, ..."""
    n_frames = g.Cast(g.Squeeze(g.Shape(codes, start=2, end=3)), to=INT32)
    return g.Range(np.array(0, np.int32), n_frames, np.array(1, np.int32))


def _positions(g: Graph, codes: ir.Value) -> ir.Value:
    """[1, T, D]"""
    return g.Unsqueeze(g.Slice(g.weight("position_embeds_layer.weight"), [0], g.Shape(codes, start=2, end=3), [0]), [0])


def _embed(g: Graph, k: int, codes: ir.Value) -> ir.Value:
    """Codebook k's codes [B, T] -> [B, T, D]"""
    return g.Gather(g.weight(f"input_embeds_layers.{k}.weight"), codes)


def _logits(g: Graph, x: ir.Value, layout: FineLayout, k: int) -> ir.Value:
    """x [B, T, D] -> logits of codebook k [B, T, codebook_size]. Heads exist for the last codebooks: 1..7 of 8."""
    x = g.layer_norm(
        transformer(g, x, layout.size, lambda _, qkv: _attention(g, qkv, layout.size.n_heads)), "layernorm_final"
    )
    n_heads = sum(name.startswith("lm_heads.") for name in g.weights)
    return g.linear(x, f"lm_heads.{k - (layout.n_codebooks - n_heads)}", rows=slice(layout.codebook_size))


def _attention(g: Graph, qkv: ir.Value, n_heads: int) -> ir.Value:
    query, key, value = g.Split(qkv, axis=2, num_outputs=3, n_outputs=3)
    return g.MultiHeadAttention(query, key, value, num_heads=n_heads, domain="com.microsoft")


def sample(g: Graph, logits: ir.Value, uniform: ir.Value, temperature: ir.Value) -> ir.Value:
    """Inverse of the cumulative distribution: how many of its steps lie below u * total. Temperature 0: argmax.

    logits [B, T, V], uniform [B, T], temperature [B, 1, 1] -> INT32 [B, T]
    """
    greedy = g.Equal(temperature, 0.0)
    p = g.Softmax(g.Div(logits, g.Where(greedy, 1.0, temperature)), axis=2)
    cdf = g.CumSum(p, np.array(2))
    mark = g.Mul(g.Unsqueeze(uniform, [2]), g.Slice(cdf, [-1], [np.iinfo(np.int64).max], [2]))
    drawn = g.ReduceSum(g.Cast(g.Less(cdf, mark), to=INT32), [2], keepdims=0)
    return g.Where(g.Squeeze(greedy, [2]), g.Cast(g.ArgMax(logits, axis=2, keepdims=0), to=INT32), drawn)
