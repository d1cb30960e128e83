"""A causal GPT's weights on the GPU, from the names that a stage's artifact gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from barkstream.engines import Head
from barkstream.tokens import GPTSize


@dataclass(frozen=True)
class LayerWeights:
    """bf16, [out, in]; layer norm's weights, and its subtraction of the mean, folded into the matrices behind it."""

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class GPTWeights:
    embedding: Tensor  # [ids + 1, width] bf16; the last row is zero
    positions: Tensor  # [block, width] float32
    layers: Sequence[LayerWeights]
    head: Tensor  # [codebooks * size, width] bf16


def load_weights(named: Mapping[str, np.ndarray | Tensor], size: GPTSize, head: Head) -> GPTWeights:
    """Weights by Hugging Face name, either `x.weight` [out, in] or, as `model.onnx` has them, `x.weight.T` [in, out].

    The head holds the logits that count and no other: head.n_codebooks * head.size.
    Raises ValueError for what the kernels don't do: biases, 8-bit weights, a head of another size.
    """
    if any(name.endswith((".bias", ".int8")) for name in named):
        raise ValueError(
            "the cuda engine takes float32 artifacts (`make export PRECISION=`) of checkpoints without biases"
        )

    def tensor(name: str) -> Tensor:
        weight = named[name]
        return (weight if isinstance(weight, Tensor) else torch.from_numpy(np.array(weight))).to("cuda", torch.float32)

    def matrix(name: str, norm: str | None = None) -> Tensor:
        weight = tensor(f"{name}.weight") if f"{name}.weight" in named else tensor(f"{name}.weight.T").t()
        if norm:
            weight = weight * tensor(f"{norm}.weight")
            weight = weight - weight.mean(1, keepdim=True)  # W (x - mean x) = (W - row means of W) x
        return weight.to(torch.bfloat16).contiguous()

    table = tensor("input_embeds_layer.weight")[: size.n_input_ids]
    weights = GPTWeights(
        embedding=F.pad(table, (0, 0, 0, 1)).to(torch.bfloat16),
        positions=tensor("position_embeds_layer.weight").contiguous(),
        layers=[
            LayerWeights(
                qkv=matrix(f"layers.{i}.attn.att_proj", f"layers.{i}.layernorm_1"),
                out=matrix(f"layers.{i}.attn.out_proj"),
                up=matrix(f"layers.{i}.mlp.in_proj", f"layers.{i}.layernorm_2"),
                down=matrix(f"layers.{i}.mlp.out_proj"),
            )
            for i in range(size.n_layers)
        ],
        head=matrix("lm_head", "layernorm_final"),
    )
    if len(weights.head) != head.n_codebooks * head.size:
        raise ValueError(
            f"the head must hold the {head.n_codebooks * head.size} logits that count, not {len(weights.head)}"
        )
    return weights


def read_onnx(path: Path) -> dict[str, np.ndarray]:
    """The named weights of a stage's model.onnx. Raises FileNotFoundError that says what to do."""
    return {name: x for name, x in read_initializers(path).items() if ".weight" in name or ".bias" in name}


def read_initializers(path: Path) -> dict[str, np.ndarray]:
    """All constants of a model.onnx by name. Raises FileNotFoundError that says what to do."""
    import onnx_ir

    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `make export` (or `barkstream export CHECKPOINT`) first")
    initializers = onnx_ir.load(path).graph.initializers
    return {name: value.const_value.numpy() for name, value in initializers.items() if value.const_value is not None}
