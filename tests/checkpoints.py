"""Small random Bark checkpoints, in Hugging Face's and in Suno's format. Nothing in them has nano-bark's sizes or ids.

random_checkpoint(tmp_path / "tiny")                      # odd little vocabularies, 36 samples a frame
random_checkpoint(tmp_path / "tiny", bark_ids=True)       # Bark's own vocabularies, windows, rates and codec clock
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_checkpoint(
    directory: Path,
    *,
    width: int = 48,
    n_heads: int = 3,
    n_layers: int = 2,
    n_filters: int = 2,
    bark_ids: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a Hugging Face BarkModel directory: configs, weights, toy tokenizer, a voice "v2/en_test_0". Returns it.

    bark_ids: Bark's true vocabularies and windows (the semantic input table alone is 129,600 rows), else tiny ones.
    dtype: float32, float16 or bfloat16, of the file. Weights are drawn so that logits spread by a few units.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config, generation = configs(width, n_heads, n_layers, n_filters, bark_ids)
    rng = np.random.default_rng(seed)
    save_file({name: _as(x, dtype) for name, x in random_weights(config, rng).items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=1))
    write_tokenizer(directory)
    write_random_voice(directory, "v2/en_test_0", generation, rng)
    return directory


def configs(width: int, n_heads: int, n_layers: int, n_filters: int, bark_ids: bool) -> tuple[dict, dict]:
    """config.json and generation_config.json."""
    codebook_size, n_codebooks, ratios, kernel = (1024, 8, [8, 5, 4, 2], 7) if bark_ids else (40, 6, [4, 3, 3], 5)
    block = 1024 if bark_ids else 96
    generation = dict(model_type="bark", codebook_size=codebook_size, **(_bark_ids() if bark_ids else _tiny_ids()))
    frame_rate = generation["coarse_acoustics_config"]["coarse_rate_hz"]

    def gpt(n_input: int, n_output: int, **more) -> dict:
        size = {
            "hidden_size": width,
            "num_heads": n_heads,
            "num_layers": n_layers,
            "block_size": block,
            "bias": False,
            "dropout": 0.0,
        }
        return dict(**size, input_vocab_size=n_input, output_vocab_size=n_output, **more)

    vocabularies = (
        ((129_600, 10_048), (12_096, 12_096), (1_056, 1_056)) if bark_ids else ((90, 60), (140, 134), (44, 43))
    )
    codec = {
        "model_type": "encodec",
        "audio_channels": 1,
        "codebook_dim": 16,
        "codebook_size": codebook_size,
        "compress": 2,
        "dilation_growth_rate": 2,
        "hidden_size": 16,
        "kernel_size": kernel,
        "last_kernel_size": 7,
        "norm_type": "weight_norm",
        "normalize": False,
        "num_filters": n_filters,
        "num_lstm_layers": 2,
        "num_residual_layers": 1 if bark_ids else 2,
        "pad_mode": "reflect",
        "residual_kernel_size": 3,
        "sampling_rate": frame_rate * prod(ratios),
        "target_bandwidths": [n_codebooks * frame_rate / 100],
        "trim_right_ratio": 1.0,
        "upsampling_ratios": ratios,
        "use_causal_conv": True,
        "use_conv_shortcut": bark_ids,
    }
    config = {
        "model_type": "bark",
        "architectures": ["BarkModel"],
        "semantic_config": gpt(*vocabularies[0], model_type="semantic"),
        "coarse_acoustics_config": gpt(*vocabularies[1], model_type="coarse_acoustics"),
        "fine_acoustics_config": gpt(
            *vocabularies[2], model_type="fine_acoustics", n_codes_total=n_codebooks, n_codes_given=1
        ),
        "codec_config": codec,
    }
    return config, generation


def _bark_ids() -> dict:
    return _ids(
        semantic=(10_000, 10_000, 10_048, 129_595, 129_599, 49.9),
        windows=(256, 768),
        coarse=(12_048, 12_050, 75),
        spans=(256, 630, 60),
        fine=(512, 1024, 8),
    )


def _tiny_ids() -> dict:
    return _ids(
        semantic=(50, 53, 55, 88, 89, 20.0),
        windows=(12, 48),
        coarse=(136, 137, 30),
        spans=(16, 24, 6),
        fine=(14, 32, 6),
    )


def _ids(semantic: tuple, windows: tuple, coarse: tuple, spans: tuple, fine: tuple) -> dict:
    n_tokens, end, text_offset, text_pad, infer, rate = semantic
    return {
        "semantic_config": {
            "semantic_vocab_size": n_tokens,
            "eos_token_id": end,
            "semantic_pad_token": end,
            "text_encoding_offset": text_offset,
            "text_pad_token": text_pad,
            "semantic_infer_token": infer,
            "semantic_rate_hz": rate,
            "max_input_semantic_length": windows[0],
            "max_new_tokens": windows[1],
            "temperature": 0.7,
        },
        "coarse_acoustics_config": {
            "coarse_semantic_pad_token": coarse[0],
            "coarse_infer_token": coarse[1],
            "coarse_rate_hz": coarse[2],
            "n_coarse_codebooks": 2,
            "max_coarse_input_length": spans[0],
            "max_coarse_history": spans[1],
            "sliding_window_len": spans[2],
            "temperature": 0.7,
        },
        "fine_acoustics_config": {
            "max_fine_history_length": fine[0],
            "max_fine_input_length": fine[1],
            "n_fine_codebooks": fine[2],
            "temperature": 0.5,
        },
    }


def random_weights(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All tensors by Hugging Face name; the fine heads are tied, so only its input tables are stored."""
    weights = {}
    for stage in ("semantic", "coarse_acoustics"):
        c = config[f"{stage}_config"]
        tables = {
            "input_embeds_layer": c["input_vocab_size"],
            "position_embeds_layer": c["block_size"],
            "lm_head": c["output_vocab_size"],
        }
        weights |= {f"{stage}.{name}.weight": _normal(rng, n, c["hidden_size"], gain=0.3) for name, n in tables.items()}
        weights |= _random_blocks(stage, c, rng, norm_bias=False)
    fine = config["fine_acoustics_config"]
    for k in range(fine["n_codes_total"]):
        weights[f"fine_acoustics.input_embeds_layers.{k}.weight"] = _normal(
            rng, fine["input_vocab_size"], fine["hidden_size"], gain=0.3
        )
    if fine["output_vocab_size"] != fine["input_vocab_size"]:  # then they cannot be tied
        for i in range(fine["n_codes_total"] - fine["n_codes_given"]):
            weights[f"fine_acoustics.lm_heads.{i}.weight"] = _normal(
                rng, fine["output_vocab_size"], fine["hidden_size"], gain=0.3
            )
    weights["fine_acoustics.position_embeds_layer.weight"] = _normal(
        rng, fine["block_size"], fine["hidden_size"], gain=0.3
    )
    weights |= _random_blocks("fine_acoustics", fine, rng, norm_bias=True)
    return weights | _random_codec(config["codec_config"], fine["n_codes_total"], rng)


def _random_blocks(stage: str, c: dict, rng: np.random.Generator, norm_bias: bool) -> dict[str, np.ndarray]:
    d, weights = c["hidden_size"], {}
    norms = [f"{stage}.layernorm_final"]
    for i in range(c["num_layers"]):
        block = f"{stage}.layers.{i}"
        linears = {
            "attn.att_proj": (3 * d, d),
            "attn.out_proj": (d, d),
            "mlp.in_proj": (4 * d, d),
            "mlp.out_proj": (d, 4 * d),
        }
        weights |= {
            f"{block}.{name}.weight": _normal(rng, *shape, gain=shape[1] ** -0.5) for name, shape in linears.items()
        }
        norms += [f"{block}.layernorm_1", f"{block}.layernorm_2"]
    for norm in norms:
        weights[f"{norm}.weight"] = (1 + 0.2 * rng.standard_normal(d)).astype(np.float32)
        if norm_bias:
            weights[f"{norm}.bias"] = _normal(rng, d, gain=0.1)
    return weights


def _random_codec(c: dict, n_codebooks: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weight-normed convolutions as PyTorch's parametrizations store them, unit gain."""
    weights = {
        f"quantizer.layers.{k}.codebook.embed": _normal(rng, c["codebook_size"], c["codebook_dim"], gain=0.5)
        for k in range(n_codebooks)
    }

    def conv(name: str, *shape: int, n_out: int) -> None:
        v = _normal(rng, *shape, gain=1.0)
        weights[f"decoder.{name}.conv.parametrizations.weight.original0"] = np.full((shape[0], 1, 1), 1.2, np.float32)
        weights[f"decoder.{name}.conv.parametrizations.weight.original1"] = v
        weights[f"decoder.{name}.conv.bias"] = _normal(rng, n_out, gain=0.1)

    width = c["num_filters"] * 2 ** len(c["upsampling_ratios"])
    conv("layers.0", width, c["codebook_dim"], c["kernel_size"], n_out=width)
    for i in range(c["num_lstm_layers"]):
        for kind, shape in (
            ("weight_ih", (4 * width, width)),
            ("weight_hh", (4 * width, width)),
            ("bias_ih", (4 * width,)),
            ("bias_hh", (4 * width,)),
        ):
            weights[f"decoder.layers.1.lstm.{kind}_l{i}"] = _normal(rng, *shape, gain=width**-0.5)
    layer = 2
    for ratio in c["upsampling_ratios"]:
        conv(f"layers.{layer + 1}", width, width // 2, 2 * ratio, n_out=width // 2)
        width //= 2
        hidden = width // c["compress"]
        for block in (f"layers.{layer + 2 + j}" for j in range(c["num_residual_layers"])):
            conv(f"{block}.block.1", hidden, width, c["residual_kernel_size"], n_out=hidden)
            conv(f"{block}.block.3", width, hidden, 1, n_out=width)
            if c["use_conv_shortcut"]:
                conv(f"{block}.shortcut", width, width, 1, n_out=width)
        layer += 2 + c["num_residual_layers"]
    conv(f"layers.{layer + 1}", 1, width, c["last_kernel_size"], n_out=1)
    return {f"codec_model.{name}": x for name, x in weights.items()}


def write_tokenizer(directory: Path) -> None:
    """Word pieces: single letters, alone or inside a word; ids below 58."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = ["[PAD]", "[UNK]", ".", ",", *LETTERS, *(f"##{c}" for c in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_random_voice(directory: Path, name: str, generation: dict, rng: np.random.Generator) -> None:
    """speaker_embeddings_path.json and three .npy files: two seconds of random tokens."""
    semantic, coarse = generation["semantic_config"], generation["coarse_acoustics_config"]
    n_frames = 2 * coarse["coarse_rate_hz"]
    prompts = {
        "semantic_prompt": rng.integers(0, semantic["semantic_vocab_size"], int(2 * semantic["semantic_rate_hz"])),
        "coarse_prompt": rng.integers(0, generation["codebook_size"], (2, n_frames)),
        "fine_prompt": rng.integers(
            0, generation["codebook_size"], (generation["fine_acoustics_config"]["n_fine_codebooks"], n_frames)
        ),
    }
    prompts["fine_prompt"][:2] = prompts["coarse_prompt"]
    files = {kind: f"speaker_embeddings/{name}_{kind}.npy" for kind in prompts}
    for kind, file in files.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(directory / file, prompts[kind])
    (directory / "speaker_embeddings_path.json").write_text(json.dumps({"repo_or_path": ".", name: files}, indent=1))


def suno_files(
    huggingface: Path, directory: Path, *, suffix: str = "_2", prefix: str = "_orig_mod.", one_vocabulary: bool = False
) -> Path:
    """The same weights as Suno's text_2.pt, coarse_2.pt, fine_2.pt (needs PyTorch), masks and prefixes included.

    one_vocabulary: model_args hold `vocab_size` only, for the models whose two vocabularies are equal.
    """
    import torch
    from safetensors.numpy import load_file

    directory.mkdir(parents=True, exist_ok=True)
    config, weights = (
        json.loads((huggingface / "config.json").read_text()),
        load_file(huggingface / "model.safetensors"),
    )
    for file, stage in (("text", "semantic"), ("coarse", "coarse_acoustics"), ("fine", "fine_acoustics")):
        c = config[f"{stage}_config"]
        state = {
            prefix + _suno_name(name.removeprefix(f"{stage}.")): torch.from_numpy(x)
            for name, x in weights.items()
            if name.startswith(f"{stage}.")
        }
        if stage == "fine_acoustics":
            state |= {
                f"{prefix}lm_heads.{i}.weight": state[f"{prefix}transformer.wtes.{i + 1}.weight"]
                for i in range(c["n_codes_total"] - 1)
            }
        state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        checkpoint = {
            "model": state,
            "model_args": _model_args(c, one_vocabulary),
            "best_val_loss": torch.tensor(2.5),
            "iter_num": 7,
        }
        torch.save(checkpoint, directory / f"{file}{suffix}.pt")
    return directory


def _suno_name(name: str) -> str:
    parts = {
        "input_embeds_layers.": "wtes.",
        "input_embeds_layer.": "wte.",
        "position_embeds_layer.": "wpe.",
        "layers.": "h.",
        "layernorm_final": "ln_f",
        "layernorm_": "ln_",
        "att_proj": "c_attn",
        "out_proj": "c_proj",
        "in_proj": "c_fc",
    }
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"transformer.{name}"


def _model_args(c: dict, one_vocabulary: bool) -> dict:
    args = {
        "n_layer": c["num_layers"],
        "n_head": c["num_heads"],
        "n_embd": c["hidden_size"],
        "block_size": c["block_size"],
        "bias": False,
        "dropout": 0.0,
    }
    if one_vocabulary and c["input_vocab_size"] == c["output_vocab_size"]:
        args["vocab_size"] = c["input_vocab_size"]
    else:
        args |= {"input_vocab_size": c["input_vocab_size"], "output_vocab_size": c["output_vocab_size"]}
    return args | {key: c[key] for key in ("n_codes_total", "n_codes_given") if key in c}


def _normal(rng: np.random.Generator, *shape: int, gain: float) -> np.ndarray:
    return (gain * rng.standard_normal(shape)).astype(np.float32)


def _as(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)
    return x.astype(dtype)
