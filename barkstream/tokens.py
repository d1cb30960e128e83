"""Vocabulary layout and clocks of a checkpoint: every id, rate and size, read from its configs, derived and checked once.

`Checkpoint.from_configs` reads Hugging Face's `config.json` and `generation_config.json`; `barkstream export` writes the
result beside each stage as `checkpoint.json`, and everything else reads ids and rates from there. Nothing in this
project types a vocabulary size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import floor, prod
from pathlib import Path
from typing import Any


def exact_div(a: int, b: int) -> int:
    """a / b for two integers that must divide evenly."""
    assert a % b == 0, f"{a} is not a multiple of {b}"
    return a // b


@dataclass(frozen=True)
class GPTSize:
    """Size of one of the three transformers."""

    n_layers: int
    n_heads: int
    width: int
    block_size: int  # positions: prompt + generated tokens never exceed it
    n_input_ids: int  # rows of the input embedding table
    n_output_ids: int  # rows of the output head

    @property
    def head_width(self) -> int:
        return exact_div(self.width, self.n_heads)


@dataclass(frozen=True)
class SemanticLayout:
    """Text to semantic tokens. Prefix: [text | history | infer | generated], text and history of equal length, summed."""

    size: GPTSize
    n_tokens: int  # semantic vocabulary (Bark: 10,000)
    rate_hz: float  # 49.9
    text_offset: int  # added to a tokenizer id
    text_pad: int
    history_pad: int
    end: int  # end-of-speech id; the logit right after the last semantic token
    infer: int
    n_text: int  # text tokens, and history tokens, in a prompt (256)
    max_new_tokens: int  # 768

    @property
    def n_prompt_positions(self) -> int:
        return self.n_text + 1  # text and history share positions, then the infer token

    @property
    def n_prompt_ids(self) -> int:
        return 2 * self.n_text + 1


@dataclass(frozen=True)
class CoarseLayout:
    """Semantic to coarse tokens. Prefix of a window: [semantic window | infer | coarse history | this window's tokens]."""

    size: GPTSize
    n_codebooks: int  # 2
    codebook_size: int  # 1,024
    rate_hz: float  # 75: frames a second
    first_id: int  # id of codebook 0's code 0; equals the semantic vocabulary size
    semantic_pad: int
    infer: int
    n_semantic_window: int  # 256
    max_history: int  # coarse tokens of history in a prefix (630); Suno's max_coarse_history
    window: int  # coarse tokens per window (60); Suno's sliding_window_len
    semantic_rate_hz: float

    @property
    def tokens_per_semantic(self) -> float:
        """Coarse tokens for one semantic token: 75 / 49.9 * 2 = 3.006. The codebooks' 2 matters."""
        return self.rate_hz / self.semantic_rate_hz * self.n_codebooks

    @property
    def max_positions(self) -> int:
        """Of a window: prefix and tokens (947)."""
        return self.n_semantic_window + 1 + self.max_history + self.window

    def history_before(self, window: int) -> int:
        """Coarse tokens of history in the prefix of a window of so many tokens. A longer window has as many fewer as it is longer, so
        that it takes no position that the checkpoint's own do not take."""
        return min(self.max_history, self.max_history + self.window - window)

    def semantic_history(self, n_history: int) -> int:
        """Semantic tokens [209 for 630] that cover as much time as so many coarse ones."""
        return floor(n_history / self.tokens_per_semantic)


@dataclass(frozen=True)
class FineLayout:
    """Codebooks 0..1 to all 8, non-causally over a window of frames."""

    size: GPTSize
    n_codebooks: int  # 8
    n_given: int  # codebooks that the coarse stage gives (2)
    codebook_size: int  # 1,024
    window: int  # frames (1,024)
    max_history: int  # frames of history (512)
    unknown: int  # id of "not known yet" and of padding; equals the codebook size

    @property
    def hop(self) -> int:
        return self.window - self.max_history


@dataclass(frozen=True)
class CodecLayout:
    """EnCodec's decoder: its clocks, and the shape of what `export/codec.py` builds."""

    sample_rate: int
    upsampling_ratios: tuple[int, ...]
    n_codebooks: int
    codebook_size: int
    codebook_width: int
    n_filters: int
    n_lstm_layers: int
    n_residual_layers: int
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    dilation_growth: int
    compress: int
    use_conv_shortcut: bool

    @property
    def samples_per_frame(self) -> int:
        return prod(self.upsampling_ratios)  # 320 samples, 13.3 ms

    @property
    def frame_rate_hz(self) -> int:
        return exact_div(self.sample_rate, self.samples_per_frame)  # 75

    @property
    def min_first_chunk(self) -> int:
        """Frames a stream's first codec call needs: the first convolution reflects kernel_size - 1 frames to its left."""
        return self.kernel_size


@dataclass(frozen=True)
class Checkpoint:
    """All that the serving code knows of a checkpoint."""

    name: str
    semantic: SemanticLayout
    coarse: CoarseLayout
    fine: FineLayout
    codec: CodecLayout

    def __post_init__(self) -> None:
        s, c, f, a = self.semantic, self.coarse, self.fine, self.codec
        assert s.n_prompt_positions + s.max_new_tokens <= s.size.block_size + 1, (
            "semantic prompt and tokens exceed the block"
        )
        assert s.n_tokens <= s.end < s.size.n_output_ids
        assert c.first_id == s.n_tokens, "coarse ids start after the semantic ones"
        assert c.max_positions <= c.size.block_size, "a coarse window exceeds the block"
        assert c.window % c.n_codebooks == 0
        assert f.window <= f.size.block_size and f.n_given == c.n_codebooks and f.n_codebooks <= a.n_codebooks
        assert c.rate_hz == a.frame_rate_hz, "coarse and codec clocks differ"

    @classmethod
    def from_configs(cls, config: dict[str, Any], generation: dict[str, Any], name: str) -> Checkpoint:
        """Read Hugging Face's two config files.

        config: `config.json` of a BarkModel. generation: its `generation_config.json`.
        Raises ValueError that names the missing key.
        """
        try:
            return cls(
                name=name,
                semantic=_semantic_layout(config["semantic_config"], generation["semantic_config"]),
                coarse=_coarse_layout(
                    config["coarse_acoustics_config"], generation, config["codec_config"]["codebook_size"]
                ),
                fine=_fine_layout(config["fine_acoustics_config"], generation, config["codec_config"]["codebook_size"]),
                codec=_codec_layout(config["codec_config"], generation),
            )
        except KeyError as missing:
            raise ValueError(
                f"{name} is no Bark checkpoint: its config.json / generation_config.json lack the key {missing}"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a `checkpoint.json` that `save` wrote."""
        raw = json.loads(Path(path).read_text())
        stages = dict(semantic=SemanticLayout, coarse=CoarseLayout, fine=FineLayout)
        for stage, layout in stages.items():
            raw[stage] = layout(**{**raw[stage], "size": GPTSize(**raw[stage]["size"])})
        raw["codec"] = CodecLayout(**{**raw["codec"], "upsampling_ratios": tuple(raw["codec"]["upsampling_ratios"])})
        return cls(**raw)

    def save(self, path: Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


def _size(config: dict[str, Any]) -> GPTSize:
    return GPTSize(
        n_layers=config["num_layers"],
        n_heads=config["num_heads"],
        width=config["hidden_size"],
        block_size=config["block_size"],
        n_input_ids=config["input_vocab_size"],
        n_output_ids=config["output_vocab_size"],
    )


def _semantic_layout(config: dict[str, Any], generation: dict[str, Any]) -> SemanticLayout:
    return SemanticLayout(
        size=_size(config),
        n_tokens=generation["semantic_vocab_size"],
        rate_hz=generation["semantic_rate_hz"],
        text_offset=generation["text_encoding_offset"],
        text_pad=generation["text_pad_token"],
        history_pad=generation["semantic_pad_token"],
        end=generation["eos_token_id"],
        infer=generation["semantic_infer_token"],
        n_text=generation["max_input_semantic_length"],
        max_new_tokens=generation["max_new_tokens"],
    )


def _coarse_layout(config: dict[str, Any], generation: dict[str, Any], codebook_size: int) -> CoarseLayout:
    coarse, semantic = generation["coarse_acoustics_config"], generation["semantic_config"]
    return CoarseLayout(
        size=_size(config),
        n_codebooks=coarse["n_coarse_codebooks"],
        codebook_size=codebook_size,
        rate_hz=coarse["coarse_rate_hz"],
        first_id=semantic["semantic_vocab_size"],
        semantic_pad=coarse["coarse_semantic_pad_token"],
        infer=coarse["coarse_infer_token"],
        n_semantic_window=coarse["max_coarse_input_length"],
        max_history=coarse["max_coarse_history"],
        window=coarse["sliding_window_len"],
        semantic_rate_hz=semantic["semantic_rate_hz"],
    )


def _fine_layout(config: dict[str, Any], generation: dict[str, Any], codebook_size: int) -> FineLayout:
    fine = generation["fine_acoustics_config"]
    return FineLayout(
        size=_size(config),
        n_codebooks=fine["n_fine_codebooks"],
        n_given=generation["coarse_acoustics_config"]["n_coarse_codebooks"],
        codebook_size=codebook_size,
        window=fine["max_fine_input_length"],
        max_history=fine["max_fine_history_length"],
        unknown=codebook_size,
    )


def _codec_layout(config: dict[str, Any], generation: dict[str, Any]) -> CodecLayout:
    return CodecLayout(
        sample_rate=config["sampling_rate"],
        upsampling_ratios=tuple(config["upsampling_ratios"]),
        n_codebooks=generation["fine_acoustics_config"]["n_fine_codebooks"],
        codebook_size=config["codebook_size"],
        codebook_width=config.get("codebook_dim") or config["hidden_size"],
        n_filters=config["num_filters"],
        n_lstm_layers=config["num_lstm_layers"],
        n_residual_layers=config["num_residual_layers"],
        kernel_size=config["kernel_size"],
        last_kernel_size=config["last_kernel_size"],
        residual_kernel_size=config["residual_kernel_size"],
        dilation_growth=config["dilation_growth_rate"],
        compress=config["compress"],
        use_conv_shortcut=config["use_conv_shortcut"],
    )
