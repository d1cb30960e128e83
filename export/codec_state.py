"""What the codec decoder carries from chunk to chunk, and how it lies in the flat `state` tensor."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

from barkstream.tokens import CodecLayout


@dataclass(frozen=True)
class Part:
    """A piece of the state: for a convolution the last `shape[1]` inputs of its `shape[0]` channels."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


def state_parts(layout: CodecLayout) -> list[Part]:
    """In order of the state tensor. Layer names are Hugging Face's (`decoder.<name>`)."""
    channels = layout.n_filters * 2 ** len(layout.upsampling_ratios)
    lstm = (layout.n_lstm_layers, channels)
    parts = [Part("started", (1,)), Part("layers.0", (layout.codebook_width, layout.kernel_size - 1))]
    parts += [Part("layers.1.h", lstm), Part("layers.1.c", lstm)]
    layer = 2
    for _ in layout.upsampling_ratios:
        parts.append(Part(f"layers.{layer + 1}", (channels, 1)))  # transposed: the previous frame reaches into this one
        channels //= 2
        for j in range(layout.n_residual_layers):
            context = (layout.residual_kernel_size - 1) * layout.dilation_growth**j
            parts.append(Part(f"layers.{layer + 2 + j}.block.1", (channels, context)))
        layer += 2 + layout.n_residual_layers
    parts.append(Part(f"layers.{layer + 1}", (channels, layout.last_kernel_size - 1)))
    return [part for part in parts if part.size]


@functools.cache
def state_size(layout: CodecLayout) -> int:
    """N of the graph's `state` [B, N]. All zeros start a stream."""
    return sum(part.size for part in state_parts(layout))
