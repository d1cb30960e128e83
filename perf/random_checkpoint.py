"""A model repository in Bark's true sizes with random weights: for speed, which does not depend on their values.

    python3 perf/random_checkpoint.py large build/bark-large-random     # or small

Everything else is Bark's: vocabularies, special ids, windows, EnCodec 24 kHz. The voice `random` has 6 s of history.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from barkstream.export.checkpoint import Source, Voice, Weights
from barkstream.export.tensors import expected_shapes
from barkstream.export.write import export
from barkstream.tokens import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "large": dict(num_layers=24, num_heads=16, hidden_size=1024),
    "small": dict(num_layers=12, num_heads=12, hidden_size=768),
    "tiny": dict(num_layers=2, num_heads=1, hidden_size=64),  # where nothing is computed (pretended_gpu.py)
}
VOICE = "random"
N_POOL = 9_999_991  # random numbers that all tensors are cut from


def write_repository(model: str, folder: Path) -> Path:
    """The repository, unless it is there. model: large, small or tiny."""
    if (folder / "bark" / "1" / "checkpoint.json").exists():
        return folder
    exports = shutil.ignore_patterns("*.onnx*", "checkpoint.json", "voices", "tokenizer.json", "__pycache__", ".*")
    shutil.copytree(ROOT / "model_repository", folder, dirs_exist_ok=True, ignore=exports)
    with tempfile.TemporaryDirectory() as scratch:
        export(random_source(model, Path(scratch)), folder, report=lambda line: None)
    return folder


def random_source(model: str, scratch: Path) -> Source:
    checkpoint = Checkpoint.from_configs(config(model), generation_config(), f"bark-{model}-random")
    pool = np.random.default_rng(0).standard_normal(N_POOL, np.float32)
    letters_tokenizer().save(str(scratch / "tokenizer.json"))
    return Source(
        checkpoint=checkpoint,
        read=lambda stage: random_weights(expected_shapes(checkpoint, stage), pool),
        tokenizer=scratch / "tokenizer.json",
        voices={VOICE: random_voice(checkpoint)},
    )


def random_weights(shapes: dict[str, tuple[int, ...]], pool: np.ndarray) -> Weights:
    """Of a variance that keeps activations in range: norms are one, biases zero, the rest falls with the inputs."""
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            weights[name] = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        else:
            n_inputs = np.prod(shape[1:])
            weights[name] = np.resize(np.roll(pool, 1009 * i), shape) * np.float32(n_inputs**-0.5)
    return weights


def random_voice(checkpoint: Checkpoint, seconds: float = 6.0) -> Voice:
    random = np.random.default_rng(1)
    n_semantic, n_frames = round(seconds * checkpoint.semantic.rate_hz), round(seconds * checkpoint.coarse.rate_hz)
    fine = random.integers(0, checkpoint.fine.codebook_size, (checkpoint.fine.n_codebooks, n_frames), np.int32)
    return {
        "semantic_prompt": random.integers(0, checkpoint.semantic.n_tokens, n_semantic, np.int32),
        "coarse_prompt": fine[: checkpoint.fine.n_given],
        "fine_prompt": fine,
    }


def letters_tokenizer() -> Tokenizer:
    """Spells: the text tokens' values do not matter here."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate(["[UNK]", *letters, *(f"##{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


def config(model: str) -> dict[str, Any]:
    """config.json of suno/bark (large) or suno/bark-small, as far as it is read."""
    size = {**SIZES[model], "block_size": 1024, "bias": False}
    codec = dict(sampling_rate=24_000, upsampling_ratios=[8, 5, 4, 2], codebook_size=1024, codebook_dim=128)
    codec |= dict(num_filters=32, num_lstm_layers=2, num_residual_layers=1, kernel_size=7, last_kernel_size=7)
    codec |= dict(residual_kernel_size=3, dilation_growth_rate=2, compress=2, use_conv_shortcut=True)
    return {
        "semantic_config": dict(input_vocab_size=129_600, output_vocab_size=10_048, **size),
        "coarse_acoustics_config": dict(input_vocab_size=12_096, output_vocab_size=12_096, **size),
        "fine_acoustics_config": dict(input_vocab_size=1_056, output_vocab_size=1_056, **size),
        "codec_config": codec,
    }


def generation_config() -> dict[str, Any]:
    """suno/bark's generation_config.json."""
    sampled = dict(do_sample=True, temperature=0.7, renormalize_logits=True)
    semantic = dict(eos_token_id=10_000, pad_token_id=10_000, semantic_pad_token=10_000, text_encoding_offset=10_048)
    semantic |= dict(text_pad_token=129_595, semantic_infer_token=129_599, semantic_vocab_size=10_000)
    semantic |= dict(max_input_semantic_length=256, semantic_rate_hz=49.9, max_new_tokens=768)
    coarse = dict(coarse_semantic_pad_token=12_048, coarse_infer_token=12_050, coarse_rate_hz=75)
    coarse |= dict(n_coarse_codebooks=2, max_coarse_input_length=256, max_coarse_history=630, sliding_window_len=60)
    fine = dict(temperature=0.5, max_fine_history_length=512, max_fine_input_length=1024, n_fine_codebooks=8)
    return {
        "model_type": "bark",
        "codebook_size": 1024,
        "sample_rate": 24_000,
        "semantic_config": semantic | sampled,
        "coarse_acoustics_config": coarse | sampled,
        "fine_acoustics_config": fine,
    }


if __name__ == "__main__":
    print(write_repository(sys.argv[1], Path(sys.argv[2])))
