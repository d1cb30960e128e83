"""Tensors from files: safetensors (no PyTorch needed), pickles (data only); weight norm folded; shapes checked."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from barkstream.tokens import Checkpoint, CodecLayout, FineLayout, GPTSize

Weights = dict[str, np.ndarray]


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message says what is missing or wrong."""


def open_tensors(directory: Path) -> Callable[[str], Weights]:
    """A reader of the tensors under a prefix (cut off their names), as they lie in the file.

    From model.safetensors, else pytorch_model.bin (needs PyTorch), each in one file or in shards with an index.
    """
    for base, open_file in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickle)):
        index = directory / f"{base}.index.json"
        if index.exists():
            files = [
                existing(directory / f, "a shard of the weights")
                for f in sorted(set(read_json(index)["weight_map"].values()))
            ]
        elif (directory / base).exists():
            files = [directory / base]
        else:
            continue
        return lambda prefix: {name: x for file in files for name, x in open_file(file, prefix)}
    raise CheckpointError(
        f"no weights in {directory}: expected model.safetensors or pytorch_model.bin (or their .index.json with shards)"
    )


def _safetensors(path: Path, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 (a file is no dict)
                if name.startswith(prefix):
                    yield name[len(prefix) :], file.get_tensor(name)
    except SafetensorError as broken:
        raise CheckpointError(f"{path} is damaged or only partly downloaded ({broken})") from None


def _pickle(path: Path, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in load_pickle(path).items():
        if name.startswith(prefix):
            yield name[len(prefix) :], tensor.float().numpy()


def load_pickle(path: Path) -> dict:
    """torch.load for tensors and plain data only: a pickle that would run code is refused. Raises CheckpointError."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"reading {path.name} needs PyTorch (pip install torch); a model.safetensors does not"
        ) from None
    scalar: Any = np.float64(0).__reduce__()[0]  # how NumPy pickles one: Suno's best_val_loss
    try:
        with torch.serialization.safe_globals([scalar, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as broken:  # RuntimeError, UnpicklingError, EOFError, ...: torch has no one class for damage
        reason = str(broken).strip().splitlines()[-1:]
        raise CheckpointError(
            f"{path} is damaged, only partly downloaded, or holds more than tensors ({''.join(reason)})"
        ) from None


def fold_weight_norm(tensors: Weights) -> Weights:
    """weight = g * v / |v|, the norm over all axes but the first. Both of PyTorch's spellings; others pass through."""
    folded = {}
    for name, x in tensors.items():
        for g, v in (
            (".weight_g", ".weight_v"),
            (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
        ):
            if name.endswith(v) and (gain := tensors.get(name.removesuffix(v) + g)) is not None:
                norm = np.sqrt(np.square(x, dtype=np.float64).sum(axis=tuple(range(1, x.ndim)), keepdims=True))
                folded[name.removesuffix(v) + ".weight"] = (gain * x / norm).astype(np.float32)
                break
            if name.endswith((g, v)):
                break
        else:
            folded[name] = x
    return folded


def with_tied_heads(tensors: Weights, n_codebooks: int, n_codes_given: int) -> Weights:
    """Fine heads that the file leaves out: head i is the input table of codebook i + 1."""
    tied = {f"lm_heads.{i}.weight": f"input_embeds_layers.{i + 1}.weight" for i in range(n_codebooks - n_codes_given)}
    return {**{head: tensors[table] for head, table in tied.items() if table in tensors}, **tensors}


def checked(stage: str, tensors: Weights, expected: Mapping[str, tuple[int, ...]]) -> Weights:
    """The tensors that `expected` names, and their biases. CheckpointError if one is missing or has another shape."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"the {stage} weights lack {missing[0]}{more}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"the {stage} weights' {name} is {list(tensors[name].shape)}; the config says {list(shape)}"
            )
    return {
        name: x for name, x in tensors.items() if name in expected or f"{name.removesuffix('.bias')}.weight" in expected
    }


def expected_shapes(checkpoint: Checkpoint, stage: str, n_codes_given: int = 1) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a stage cannot do without (biases of linear layers are optional)."""
    if stage == "codec":
        return _codec_shapes(checkpoint.codec)
    if stage == "fine":
        return _fine_shapes(checkpoint.fine, n_codes_given)
    size = getattr(checkpoint, stage).size
    tables = {
        "input_embeds_layer.weight": (size.n_input_ids, size.width),
        "lm_head.weight": (size.n_output_ids, size.width),
    }
    return {**tables, **_block_shapes(size)}


def _block_shapes(size: GPTSize) -> dict[str, tuple[int, ...]]:
    d = size.width
    shapes: dict[str, tuple[int, ...]] = {
        "position_embeds_layer.weight": (size.block_size, d),
        "layernorm_final.weight": (d,),
    }
    for i in range(size.n_layers):
        layer: dict[str, tuple[int, ...]] = {
            "attn.att_proj": (3 * d, d),
            "attn.out_proj": (d, d),
            "mlp.in_proj": (4 * d, d),
            "mlp.out_proj": (d, 4 * d),
        }
        layer |= {"layernorm_1": (d,), "layernorm_2": (d,)}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _fine_shapes(layout: FineLayout, n_codes_given: int) -> dict[str, tuple[int, ...]]:
    size = layout.size
    tables = {f"input_embeds_layers.{k}.weight": (size.n_input_ids, size.width) for k in range(layout.n_codebooks)}
    heads = {f"lm_heads.{i}.weight": (size.n_output_ids, size.width) for i in range(layout.n_codebooks - n_codes_given)}
    norms = ["layernorm_final", *(f"layers.{i}.layernorm_{j}" for i in range(size.n_layers) for j in (1, 2))]
    return {**tables, **heads, **_block_shapes(size), **{f"{norm}.bias": (size.width,) for norm in norms}}


def _codec_shapes(a: CodecLayout) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"quantizer.layers.{k}.codebook.embed": (a.codebook_size, a.codebook_width) for k in range(a.n_codebooks)
    }

    def conv(name: str, n_out: int, n_in: int, kernel: int, transposed: bool = False) -> None:
        shapes[f"decoder.{name}.conv.weight"] = (n_in, n_out, kernel) if transposed else (n_out, n_in, kernel)
        shapes[f"decoder.{name}.conv.bias"] = (n_out,)

    c = a.n_filters * 2 ** len(a.upsampling_ratios)
    conv("layers.0", c, a.codebook_width, a.kernel_size)
    for i in range(a.n_lstm_layers):
        shapes |= {f"decoder.layers.1.lstm.{kind}_l{i}": (4 * c, c) for kind in ("weight_ih", "weight_hh")}
        shapes |= {f"decoder.layers.1.lstm.{kind}_l{i}": (4 * c,) for kind in ("bias_ih", "bias_hh")}
    layer = 2
    for ratio in a.upsampling_ratios:
        conv(f"layers.{layer + 1}", c // 2, c, 2 * ratio, transposed=True)
        c //= 2
        for block in (f"layers.{layer + 2 + j}" for j in range(a.n_residual_layers)):
            conv(f"{block}.block.1", c // a.compress, c, a.residual_kernel_size)
            conv(f"{block}.block.3", c, c // a.compress, 1)
            if a.use_conv_shortcut:
                conv(f"{block}.shortcut", c, c, 1)
        layer += 2 + a.n_residual_layers
    conv(f"layers.{layer + 1}", 1, c, a.last_kernel_size)
    return shapes


def existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise CheckpointError(f"{what} is missing: {path}")
    return path


def read_json(path: Path) -> dict:
    try:
        return json.loads(existing(path, f"the checkpoint's {path.name}").read_text())
    except json.JSONDecodeError as broken:
        raise CheckpointError(f"{path} is no JSON: {broken}") from None
