"""Writes the artifacts into a model repository, each whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

import barkstream
from barkstream.export.checkpoint import Source, Voice, Weights
from barkstream.export.codec import codec_model
from barkstream.export.codec_state import state_size
from barkstream.export.fine import fine_model
from barkstream.export.gpt import coarse_model, semantic_model
from barkstream.tokens import Checkpoint

FORMAT = "1"  # of the artifacts: raise it when inputs, outputs or state change
EXTERNAL_BYTES = 1_500_000_000  # protobuf ends at 2 GiB
STAGES = ("semantic", "coarse", "fine", "codec")


def export(source: Source, repository: Path, int8: bool = False, report: Callable[[str], None] = print) -> None:
    """Write `bark_<stage>/1/model.onnx` of every stage, and what `bark/1` reads: tokenizer, voices, checkpoint.json."""
    total = 0.0
    for stage in STAGES:
        path = export_stage(source, stage, repository, int8)
        total += megabytes(path)
        report(f"{path}  {megabytes(path):.1f} MB")
    folder = write_front(source, repository)
    report(f"{folder}  tokenizer, {len(source.voices)} voices")
    kind = "8-bit weights" if int8 else "float32"
    report(f"exported {source.checkpoint.name} into {repository}: {total:.1f} MB, {kind}")


def export_stage(source: Source, stage: str, repository: Path, int8: bool = False) -> Path:
    """One stage, one set of weights in memory. Returns the path of its model.onnx."""
    weights = source.weights(stage)
    description = describe(source.checkpoint, stage, weights, int8)
    model = build(source.checkpoint, stage, weights, int8)
    del weights  # with int8 the model holds less
    model.producer_name, model.producer_version = "barkstream", barkstream.__version__
    model.metadata_props.update(description)
    folder = repository / f"bark_{stage}" / "1"
    with scratch_folder(folder) as scratch:
        source.checkpoint.save(scratch / "checkpoint.json")
        save_model(model, scratch / "model.onnx")
        replace_files(scratch, folder, ["model.onnx.data", "checkpoint.json", "model.onnx"])
    return folder / "model.onnx"


def build(checkpoint: Checkpoint, stage: str, weights: Weights, int8: bool = False) -> ir.Model:
    """A stage's graph. The codec's stays in float32."""
    if stage == "semantic":
        return semantic_model(weights, checkpoint.semantic, int8)
    if stage == "coarse":
        return coarse_model(weights, checkpoint.coarse, int8)
    if stage == "fine":
        return fine_model(weights, checkpoint.fine, int8)
    return codec_model(weights, checkpoint.codec)


def describe(checkpoint: Checkpoint, stage: str, weights: Mapping[str, np.ndarray], int8: bool) -> dict[str, str]:
    """What the artifact says of itself, in ONNX's metadata_props."""
    described = {
        "format": FORMAT,
        "stage": stage,
        "checkpoint": checkpoint.name,
        "weights_sha256": fingerprint(weights),
    }
    described["weights"] = "int8" if int8 and stage != "codec" else "float32"
    return {**described, "state_size": str(state_size(checkpoint.codec))} if stage == "codec" else described


def fingerprint(weights: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, shapes and float32 values, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{weights[name].shape}".encode())
        digest.update(np.ascontiguousarray(weights[name]).data)
    return digest.hexdigest()


def save_model(model: ir.Model, path: Path) -> None:
    """`path`, and beside it `<path>.data` if the weights exceed what one protobuf should hold."""
    n_bytes = sum(x.const_value.nbytes for x in model.graph.initializers.values() if x.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if n_bytes > EXTERNAL_BYTES else None)


def write_front(source: Source, repository: Path) -> Path:
    """`bark/1`: the tokenizer, the voices and checkpoint.json. Returns the folder."""
    folder = repository / "bark" / "1"
    with scratch_folder(folder) as scratch:
        source.checkpoint.save(scratch / "checkpoint.json")
        shutil.copyfile(source.tokenizer, scratch / "tokenizer.json")
        for name, voice in source.voices.items():
            write_voice(scratch / "voices" / f"{name}.npz", voice)
        shutil.rmtree(folder / "voices", ignore_errors=True)
        replace_files(scratch, folder, ["tokenizer.json", "voices", "checkpoint.json"])
    return folder


def write_voice(path: Path, voice: Voice) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **voice)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, so that moving out of it is a rename; gone afterwards, whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
        yield Path(scratch)


def replace_files(scratch: Path, folder: Path, names: list[str]) -> None:
    """Move `names` in that order. The last goes first from `folder`: while it is there, the others belong to it."""
    (folder / names[-1]).unlink(missing_ok=True)
    for name in names:
        if (scratch / name).exists():
            os.replace(scratch / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def megabytes(path: Path) -> float:
    """Size of a model.onnx with its external data."""
    data = path.with_name(f"{path.name}.data")
    return (path.stat().st_size + (data.stat().st_size if data.exists() else 0)) / 1e6
