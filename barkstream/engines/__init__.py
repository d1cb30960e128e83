"""Engines: what runs the stages. One interface: a batch in, as many results out.

The causal GPTs take rows (which may differ in length and position) and give generations; the fine GPT takes windows and
gives codes; the codec takes chunks and gives samples and states.
"""

from __future__ import annotations

from dataclasses import dataclass

from barkstream.sampling import COARSE, SEMANTIC, Floats, Ints, Sampling
from barkstream.tokens import CoarseLayout, SemanticLayout


@dataclass(frozen=True)
class Row:
    """One stream's share of a batch."""

    ids: Ints  # [S, C]: the whole prefix; the C ids of a position are summed
    n_tokens: int  # new tokens wanted
    position: int  # index of the first new token in the generation: the noise's counter
    sampling: Sampling
    stream: int = 0  # key of the KV cache kept between calls; 0: keep none


@dataclass(frozen=True)
class Generation:
    tokens: Ints  # [n], n <= n_tokens
    ended: bool  # the end-of-speech rule stopped it


@dataclass(frozen=True)
class Window:
    """One stream's share of a batch of the fine stage."""

    codes: Ints  # [K, T]
    fill_from: int  # the first frame to fill
    uniforms: Floats  # [K - given, T]: decide the draws
    temperature: float  # 0: argmax

    @property
    def n_frames(self) -> int:
        return self.codes.shape[1]


Chunk = tuple[Ints, Floats]  # one stream's share of a batch of the codec: codes [K, n], state [N]


@dataclass(frozen=True)
class Head:
    """Which logits a token may be drawn from, and the ids they stand for."""

    stage: int  # the noise's key
    first_id: int  # id of logit 0
    n_codebooks: int  # taken in turn, position after position
    size: int  # logits of one codebook
    end: int | None  # logit of the end token

    @classmethod
    def semantic(cls, layout: SemanticLayout) -> Head:
        return cls(SEMANTIC, first_id=0, n_codebooks=1, size=layout.n_tokens + 1, end=layout.n_tokens)

    @classmethod
    def coarse(cls, layout: CoarseLayout) -> Head:
        return cls(COARSE, layout.first_id, layout.n_codebooks, layout.codebook_size, end=None)

    def eligible(self, logits: Floats, position: int) -> tuple[Floats, int]:
        """The logits [size] that count at a position, of logits [n_codebooks * size], and the id of the first of them."""
        first = position % self.n_codebooks * self.size
        return logits[first : first + self.size], self.first_id + first
