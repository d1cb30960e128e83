"""The four stage calls that a pipeline makes. Each is a pure function of its arguments.

`barkstream.bls.TritonStages` sends them to Triton's models; `barkstream.local.LocalStages` runs them in this process.
"""

from __future__ import annotations

from typing import Protocol

from barkstream.sampling import Floats, Ints, Sampling


class Stages(Protocol):
    def semantic(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int, due_s: float | None = None
    ) -> tuple[Ints, bool]:
        """The next <= n_tokens semantic tokens after prefix [text | history | infer | generated], and whether speech ended.

        position: index of the first new token in the generation. stream: key of the KV cache kept between calls, 0 for none. due_s:
        seconds of the sentence's audio before the part that waits for these tokens, if the caller knows; tokens do not depend on it.
        """
        ...

    def coarse(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int, heads: Ints, windows: Ints
    ) -> Ints:
        """The next n_tokens coarse tokens (ids, interleaved) after prefix [semantic window | infer | history | window's tokens].

        heads [k, n_semantic_window + 1]: [semantic window | infer] of k windows that follow. windows [k, 2]: of each, the tokens wanted,
        which n_tokens counts, too, and those of history before it, at most; they are made of the prefix and what is drawn. Fewer tokens
        come if the stream is released meanwhile.
        """
        ...

    def fine(self, codes: Ints, fill_from: int, uniforms: Floats, temperature: float) -> Ints:
        """codes [8, T] with the fine codebooks of frames fill_from.. drawn (anew); uniforms [6, T] decide the draws."""
        ...

    def fine_windows(self, codes: Ints, spans: Ints, uniforms: Floats, temperature: float) -> Ints:
        """codes [8, T] of which windows are filled as by as many calls of `fine`, one after the other. spans [k, 2]: of each, its first
        frame and, counted from there, the first one to fill; a window has as many frames as the model takes."""
        ...

    def codec(self, codes: Ints, state: Floats) -> tuple[Floats, Floats]:
        """Samples [320 n] of codes [8, n] and the decoder's next state; a state of zeros starts a stream."""
        ...

    def codec_state(self) -> Floats:
        """The state that starts a stream: zeros."""
        ...

    def release(self, stream: int) -> None:
        """Free what the stages keep for a stream."""
        ...
