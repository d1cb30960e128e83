"""Stages that cost nothing and say what a test wants."""

from __future__ import annotations

import numpy as np

N_TOKENS = 100  # semantic tokens of a sentence: 2 s
SAMPLES_PER_FRAME = 320


class FakeStages:
    """Every sentence is 2 s of sound; remembers the prompts it was asked with."""

    def __init__(self, checkpoint):
        self._layouts = checkpoint
        self.prompts = []
        self.released = []

    def semantic(self, prefix, n_tokens, position, sampling, stream, due_s=None):
        if position == 0:
            self.prompts.append(prefix.copy())
        n = max(0, min(n_tokens, N_TOKENS - position))
        return np.full(n, len(self.prompts) % 500, np.int32), position + n >= N_TOKENS

    def coarse(self, prefix, n_tokens, position, sampling, stream, heads, windows):
        layout = self._layouts.coarse
        return (layout.first_id + layout.codebook_size * (np.arange(n_tokens) % 2)).astype(np.int32)

    def fine(self, codes, fill_from, uniforms, temperature):
        return codes % self._layouts.fine.codebook_size

    def codec(self, codes, state):
        return np.full(SAMPLES_PER_FRAME * codes.shape[1], 0.1, np.float32), state

    def codec_state(self):
        return np.zeros(1, np.float32)

    def release(self, stream):
        self.released.append(stream)

    def histories(self):
        """Which history each sentence was given, as bytes."""
        n = self._layouts.semantic.n_text
        return [prompt[n : 2 * n].tobytes() for prompt in self.prompts]
