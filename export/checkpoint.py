"""A checkpoint on disk, and how to open one in Hugging Face's format. (Suno's own files: `suno.py`.)

Tensors come out by Hugging Face name without the stage's prefix, in float32, checked against the sizes in the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from barkstream.export.tensors import (
    CheckpointError,
    Weights,
    checked,
    existing,
    expected_shapes,
    fold_weight_norm,
    open_tensors,
    read_json,
    with_tied_heads,
)
from barkstream.tokens import Checkpoint

PREFIX = {"semantic": "semantic.", "coarse": "coarse_acoustics.", "fine": "fine_acoustics.", "codec": "codec_model."}
PROMPTS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
Voice = dict[str, np.ndarray]  # semantic_prompt [n], coarse_prompt [2, t], fine_prompt [8, t], INT32


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, its weights still unread."""

    checkpoint: Checkpoint
    read: Callable[[str], Weights]  # stage -> its tensors by Hugging Face name, no prefix, as stored
    tokenizer: Path  # tokenizer.json
    voices: dict[str, Voice]
    n_codes_given: int = 1  # fine: codebooks without a head

    def weights(self, stage: str) -> Weights:
        """A stage's tensors in float32. Raises CheckpointError if one is missing or misshapen."""
        tensors = {name: np.asarray(x, np.float32) for name, x in self.read(stage).items()}
        if stage == "codec":
            tensors = fold_weight_norm(tensors)
        if stage == "fine":
            tensors = with_tied_heads(tensors, self.checkpoint.fine.n_codebooks, self.n_codes_given)
        return checked(stage, tensors, expected_shapes(self.checkpoint, stage, self.n_codes_given))


def open_huggingface(directory: Path, tokenizer: Path | None = None, name: str | None = None) -> Source:
    """A directory with config.json, generation_config.json, weights, tokenizer.json and (optional) voice presets."""
    config, generation = (read_json(directory / f"{part}.json") for part in ("config", "generation_config"))
    read_tensors = open_tensors(directory)
    require_causal_codec(config.get("codec_config", {}))
    return Source(
        checkpoint=Checkpoint.from_configs(config, generation, name or directory.resolve().name),
        read=lambda stage: read_tensors(PREFIX[stage]),
        tokenizer=existing(tokenizer or directory / "tokenizer.json", "the tokenizer"),
        voices=read_voices(directory),
        n_codes_given=config["fine_acoustics_config"].get("n_codes_given", 1),
    )


def require_causal_codec(config: Mapping[str, object]) -> None:
    """Raises CheckpointError unless the codec is what `codec.py` writes: EnCodec's streamable 24 kHz kind."""
    wanted = {
        "use_causal_conv": True,
        "norm_type": "weight_norm",
        "pad_mode": "reflect",
        "trim_right_ratio": 1.0,
        "audio_channels": 1,
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"the codec has {key} = {config[key]!r}; only EnCodec's streamable kind ({value!r}) can be exported"
            )


def read_voices(directory: Path) -> dict[str, Voice]:
    """Presets by name, from speaker_embeddings_path.json and the .npy files that it names; without that file none."""
    listing = directory / "speaker_embeddings_path.json"
    entries = read_json(listing) if listing.exists() else {}
    named = {name: files for name, files in entries.items() if isinstance(files, dict)}  # else: repo_or_path
    return {name: {kind: _prompt(directory / files[kind]) for kind in PROMPTS} for name, files in named.items()}


def _prompt(path: Path) -> np.ndarray:
    return np.load(existing(path, "a voice preset's array"), allow_pickle=False).astype(np.int32)
