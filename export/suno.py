"""Suno's original checkpoints: text_2.pt, coarse_2.pt, fine_2.pt (or text.pt, ... of the small model), codec apart.

These files carry sizes but no special ids, so Bark's documented ones are supplied here, and only here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from barkstream.export.checkpoint import PREFIX, PROMPTS, Source, Voice, require_causal_codec
from barkstream.export.tensors import CheckpointError, Weights, existing, load_pickle, open_tensors, read_json
from barkstream.tokens import Checkpoint

FILES = {"semantic": "text", "coarse": "coarse", "fine": "fine"}
GENERATION = {
    "semantic_config": {
        "semantic_vocab_size": 10_000,
        "eos_token_id": 10_000,
        "semantic_pad_token": 10_000,
        "text_encoding_offset": 10_048,
        "text_pad_token": 129_595,
        "semantic_infer_token": 129_599,
        "semantic_rate_hz": 49.9,
        "max_input_semantic_length": 256,
        "max_new_tokens": 768,
    },
    "coarse_acoustics_config": {
        "coarse_semantic_pad_token": 12_048,
        "coarse_infer_token": 12_050,
        "coarse_rate_hz": 75,
        "n_coarse_codebooks": 2,
        "max_coarse_input_length": 256,
        "max_coarse_history": 630,
        "sliding_window_len": 60,
    },
    "fine_acoustics_config": {"max_fine_history_length": 512, "max_fine_input_length": 1024, "n_fine_codebooks": 8},
}
ENCODEC_24KHZ = {
    "sampling_rate": 24_000,
    "upsampling_ratios": [8, 5, 4, 2],
    "codebook_size": 1024,
    "codebook_dim": 128,
    "num_filters": 32,
    "num_lstm_layers": 2,
    "num_residual_layers": 1,
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "compress": 2,
    "use_conv_shortcut": True,
}
# Suno's module names, and EnCodec's, in order of replacement
GPT_NAMES = {
    r"^_orig_mod\.": "",
    r"^transformer\.": "",
    r"^wte\.": "input_embeds_layer.",
    r"^wtes\.": "input_embeds_layers.",
    r"^wpe\.": "position_embeds_layer.",
    r"^h\.": "layers.",
    r"\bln_f\.": "layernorm_final.",
    r"\bln_([12])\.": r"layernorm_\1.",
    r"\.attn\.c_attn\.": ".attn.att_proj.",
    r"\.c_proj\.": ".out_proj.",
    r"\.c_fc\.": ".in_proj.",
}
CODEC_NAMES = {
    r"^codec_model\.": "",
    r"^decoder\.model\.": "decoder.layers.",
    r"\.convtr\.convtr\.": ".conv.",
    r"\.conv\.conv\.": ".conv.",
    r"^quantizer\.vq\.": "quantizer.",
    r"\._codebook\.": ".codebook.",
}


def is_suno(directory: Path) -> bool:
    return not (directory / "config.json").exists() and any(
        (directory / f"text{suffix}.pt").exists() for suffix in ("_2", "")
    )


def open_suno(directory: Path, tokenizer: Path, codec: str | None = None, name: str | None = None) -> Source:
    """directory: the three .pt files. tokenizer: bert-base-multilingual-cased's tokenizer.json.

    codec: a Hugging Face EnCodec directory, an EnCodec .th file, or None for the weights of the `encodec` package.
    """
    suffix = "_2" if (directory / "text_2.pt").exists() else ""
    files = {stage: existing(directory / f"{file}{suffix}.pt", f"Suno's {file} model") for stage, file in FILES.items()}
    codec_config, codec_weights = open_encodec(codec)
    config = {
        f"{stage}_config": suno_config(path)
        for stage, path in zip(("semantic", "coarse_acoustics", "fine_acoustics"), files.values(), strict=True)
    }
    config["codec_config"] = codec_config
    return Source(
        checkpoint=Checkpoint.from_configs(config, GENERATION, name or directory.resolve().name),
        read=lambda stage: renamed(codec_weights(), CODEC_NAMES) if stage == "codec" else suno_weights(files[stage]),
        tokenizer=existing(tokenizer, "the tokenizer"),
        voices={},
        n_codes_given=config["fine_acoustics_config"]["n_codes_given"],
    )


def suno_config(path: Path) -> dict[str, Any]:
    """A .pt file's model_args in Hugging Face's words."""
    args = _section(path, "model_args")
    one = args.get("vocab_size")  # older files: one vocabulary
    try:
        return {
            "num_layers": args["n_layer"],
            "num_heads": args["n_head"],
            "hidden_size": args["n_embd"],
            "block_size": args["block_size"],
            "input_vocab_size": args["input_vocab_size"] if one is None else one,
            "output_vocab_size": args["output_vocab_size"] if one is None else one,
            "n_codes_given": args.get("n_codes_given", 1),
        }
    except KeyError as missing:
        raise CheckpointError(f"{path} is no Bark model of Suno's: its model_args lack {missing}") from None


def suno_weights(path: Path) -> Weights:
    return renamed({name: tensor.float().numpy() for name, tensor in _section(path, "model").items()}, GPT_NAMES)


def open_encodec(codec: str | None) -> tuple[dict[str, Any], Callable[[], Weights]]:
    """The codec's config, and a function that reads its tensors."""
    if codec is None:
        return ENCODEC_24KHZ, _package_weights
    path = existing(Path(codec), "the codec")
    if path.is_file():
        return ENCODEC_24KHZ, lambda: {name: x.float().numpy() for name, x in load_pickle(path).items()}
    config = read_json(path / "config.json")
    if "codec_config" in config:  # a whole BarkModel's directory serves too
        config = config["codec_config"]
    require_causal_codec(config)
    read = open_tensors(path)
    return config, lambda: read(PREFIX["codec"]) or read("")


def _package_weights() -> Weights:
    try:
        from encodec import EncodecModel
    except ImportError:
        raise CheckpointError(
            "Suno's files hold no codec: give one with --codec (such as facebook/encodec_24khz), or pip install encodec"
        ) from None
    return {name: x.float().numpy() for name, x in EncodecModel.encodec_model_24khz().state_dict().items()}


def read_suno_voices(directory: Path) -> dict[str, Voice]:
    """Presets from Suno's assets/prompts folder, by path: en_speaker_0, v2/en_speaker_0, ..."""
    voices = {}
    for path in sorted(directory.rglob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            voices[path.relative_to(directory).with_suffix("").as_posix()] = {
                kind: arrays[kind].astype(np.int32) for kind in PROMPTS
            }
    return voices


def renamed(tensors: Weights, names: dict[str, str]) -> Weights:
    def rename(name: str) -> str:
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): x for name, x in tensors.items()}


def _section(path: Path, key: str) -> dict[str, Any]:
    content = load_pickle(path)
    if key not in content:
        raise CheckpointError(
            f"{path} is no Bark model of Suno's: it holds {sorted(map(str, content))[:5]}, not 'model' and 'model_args'"
        )
    return content[key]
