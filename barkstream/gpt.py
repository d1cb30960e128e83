"""Bark's networks in plain PyTorch: the oracle of every fast engine and exported artifact, never the default.

The modules' names are Hugging Face's, so a stage's weights (`barkstream.export.checkpoint`) load as they are:
`build("coarse", checkpoint, source.weights("coarse"))`. D width, H heads, S tokens, T frames, K codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barkstream.tokens import Checkpoint, CodecLayout, FineLayout, GPTSize

Cache = list[tuple[Tensor, Tensor]]  # per layer keys and values [B, H, tokens, Dh]


class Attention(nn.Module):
    def __init__(self, size: GPTSize, bias: bool) -> None:
        super().__init__()
        self.n_heads = size.n_heads
        self.att_proj = nn.Linear(size.width, 3 * size.width, bias)
        self.out_proj = nn.Linear(size.width, size.width, bias)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, causal: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in self.att_proj(x).chunk(3, dim=2))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mask = (
            torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
            if causal
            else None
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, size: GPTSize, bias: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(size.width, 4 * size.width, bias)
        self.out_proj = nn.Linear(4 * size.width, size.width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.gelu(self.in_proj(x)))


class Block(nn.Module):
    def __init__(self, size: GPTSize, bias: bool, norm_bias: bool) -> None:
        super().__init__()
        self.layernorm_1 = nn.LayerNorm(size.width, bias=norm_bias)
        self.attn = Attention(size, bias)
        self.layernorm_2 = nn.LayerNorm(size.width, bias=norm_bias)
        self.mlp = MLP(size, bias)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, causal: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, kv = self.attn(self.layernorm_1(x), past, causal)
        x = x + attended
        return x + self.mlp(self.layernorm_2(x)), kv


class CausalGPT(nn.Module):
    """Semantic and coarse."""

    def __init__(self, size: GPTSize, bias: bool = False) -> None:
        super().__init__()
        self.input_embeds_layer = nn.Embedding(size.n_input_ids, size.width)
        self.position_embeds_layer = nn.Embedding(size.block_size, size.width)
        self.layers = nn.ModuleList(Block(size, bias, norm_bias=bias) for _ in range(size.n_layers))
        self.layernorm_final = nn.LayerNorm(size.width, bias=bias)
        self.lm_head = nn.Linear(size.width, size.n_output_ids, bias=False)

    def forward(self, token_ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """token_ids [B, S], or [B, S, C] whose C ids of a position are summed (n_input_ids counts as nothing).

        Returns logits [B, S, n_output_ids] and the cache, now S tokens longer.
        """
        table = F.pad(self.input_embeds_layer.weight, (0, 0, 0, 1))
        x = F.embedding(token_ids.reshape(*token_ids.shape[:2], -1), table).sum(2)
        n_past = cache[0][0].shape[2] if cache else 0
        x = x + self.position_embeds_layer.weight[n_past : n_past + x.shape[1]]
        grown: Cache = []
        for i, block in enumerate(self.layers):
            x, kv = block(x, cache[i] if cache else None, causal=True)
            grown.append(kv)
        return self.lm_head(self.layernorm_final(x)), grown


class FineGPT(nn.Module):
    def __init__(self, layout: FineLayout, n_heads: int, bias: bool = False) -> None:
        super().__init__()
        size, self.layout = layout.size, layout
        self.input_embeds_layers = nn.ModuleList(
            nn.Embedding(size.n_input_ids, size.width) for _ in range(layout.n_codebooks)
        )
        self.position_embeds_layer = nn.Embedding(size.block_size, size.width)
        self.layers = nn.ModuleList(Block(size, bias, norm_bias=True) for _ in range(size.n_layers))
        self.layernorm_final = nn.LayerNorm(size.width)
        self.lm_heads = nn.ModuleList(nn.Linear(size.width, size.n_output_ids, bias=False) for _ in range(n_heads))

    def forward(self, codes: Tensor, k: int) -> Tensor:
        """codes [B, K, T] -> logits of codebook k [B, T, n_output_ids], from codebooks 0..k."""
        x = sum(self.input_embeds_layers[j](codes[:, j]) for j in range(k + 1))
        x = x + self.position_embeds_layer.weight[: x.shape[1]]
        for block in self.layers:
            x, _ = block(x, None, causal=False)
        return self.lm_heads[k - self.layout.n_codebooks + len(self.lm_heads)](self.layernorm_final(x))

    def fill(self, codes: Tensor, fill_from: int, uniforms: Tensor, temperature: float) -> Tensor:
        """Fill codebooks n_given.. in order, from a frame on: argmax at temperature 0, else by uniforms [B, 6, T]."""
        codes = codes.clone()
        for i, k in enumerate(range(self.layout.n_given, self.layout.n_codebooks)):
            logits = self(codes, k)[..., : self.layout.codebook_size]
            drawn = draw(logits, uniforms[:, i], temperature) if temperature else logits.argmax(-1)
            codes[:, k, fill_from:] = drawn[:, fill_from:]
        return codes


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """logits [..., V], uniform [...] -> how many steps of the cumulative distribution lie below uniform."""
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    return (cdf < uniform[..., None] * cdf[..., -1:]).sum(-1)


class Conv(nn.Module):
    """Sees only the past. The left side is padded by reflection; a shorter input first gets zeros on its right."""

    def __init__(self, n_in: int, n_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.context = (kernel - 1) * dilation
        self.conv = nn.Conv1d(n_in, n_out, kernel, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        n_zeros = max(0, self.context + 1 - x.shape[2])
        padded = F.pad(F.pad(x, (0, n_zeros)), (self.context, 0), mode="reflect")
        return self.conv(padded[..., : padded.shape[2] - n_zeros])


class Upsample(nn.Module):
    def __init__(self, n_in: int, n_out: int, ratio: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(n_in, n_out, 2 * ratio, stride=ratio)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., : -self.ratio]


class Residual(nn.Module):
    def __init__(self, width: int, a: CodecLayout, dilation: int) -> None:
        super().__init__()
        hidden = width // a.compress
        inner = Conv(width, hidden, a.residual_kernel_size, dilation)
        self.block = nn.Sequential(nn.ELU(), inner, nn.ELU(), Conv(hidden, width, 1))
        self.shortcut = Conv(width, width, 1) if a.use_conv_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class SkipLSTM(nn.Module):
    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, n_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.permute(2, 0, 1))[0].permute(1, 2, 0) + x


class CodecDecoder(nn.Module):
    """EnCodec's decoder, all frames at once."""

    def __init__(self, a: CodecLayout) -> None:
        super().__init__()
        self.codebooks = nn.ModuleList(nn.Embedding(a.codebook_size, a.codebook_width) for _ in range(a.n_codebooks))
        width = a.n_filters * 2 ** len(a.upsampling_ratios)
        layers = [Conv(a.codebook_width, width, a.kernel_size), SkipLSTM(width, a.n_lstm_layers)]
        for ratio in a.upsampling_ratios:
            layers += [nn.ELU(), Upsample(width, width // 2, ratio)]
            width //= 2
            layers += [Residual(width, a, a.dilation_growth**j) for j in range(a.n_residual_layers)]
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*layers, nn.ELU(), Conv(width, 1, a.last_kernel_size))})

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B, K, n] -> samples [B, samples_per_frame * n]"""
        x = sum(table(codes[:, k]) for k, table in enumerate(self.codebooks))
        return self.decoder["layers"](x.transpose(1, 2))[:, 0]


def build(stage: str, checkpoint: Checkpoint, weights: Mapping[str, np.ndarray]) -> nn.Module:
    """The twin of a stage (semantic, coarse, fine, codec) with its weights, in eval mode and float32."""
    if stage == "codec":
        twin: nn.Module = CodecDecoder(checkpoint.codec)
        weights = {
            _codebook_name(name): x
            for name, x in weights.items()
            if name.startswith("decoder.") or name.endswith(".embed")
        }
    elif stage == "fine":
        bias = "layers.0.mlp.in_proj.bias" in weights
        twin = FineGPT(checkpoint.fine, sum(name.startswith("lm_heads.") for name in weights), bias)
    else:
        twin = CausalGPT(getattr(checkpoint, stage).size, "layers.0.mlp.in_proj.bias" in weights)
    twin.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, assign=True)
    return twin.eval().requires_grad_(False)


def _codebook_name(name: str) -> str:
    return name.replace("quantizer.layers.", "codebooks.").replace(".codebook.embed", ".weight")
