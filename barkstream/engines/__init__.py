"""Engines: what runs the stages. One interface: a batch in, as many results out.

The causal GPTs take rows (which may differ in length and position) and give generations; the fine GPT takes windows and
gives codes; the codec takes chunks and gives samples and states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from barkstream.export.codec_state import state_size
from barkstream.sampling import COARSE, SEMANTIC, Floats, Ints, Sampling
from barkstream.tokens import CoarseLayout, CodecLayout, FineLayout, GPTSize, SemanticLayout


@dataclass(frozen=True)
class Chain:
    """Coarse windows that follow a row's own in the same call: what makes their prefixes, as soon as the tokens before are there."""

    heads: Ints  # [k >= 1, H]: semantic window and infer of each
    windows: Ints  # [k, 2]: tokens wanted of each, and ids behind its head, at most

    @classmethod
    def of(cls, heads: Ints, windows: Ints, layout: CoarseLayout) -> Chain | None:
        """None for heads [0, H]. Raises ValueError for another H than the layout's, or windows that are not as many."""
        if heads.ndim != 2 or heads.shape[1] != layout.n_semantic_window + 1:
            raise ValueError(f"heads must be [k, {layout.n_semantic_window + 1}], got {list(heads.shape)}")
        if windows.shape != (len(heads), 2):
            raise ValueError(
                f"windows must be [{len(heads)}, 2], tokens and history of each head's, got {list(windows.shape)}"
            )
        return cls(heads, windows) if len(heads) else None

    @cached_property
    def n_tokens(self) -> int:
        """Wanted of all its windows."""
        return int(self.windows[:, 0].sum())

    def next_ids(self, ids: Ints) -> Ints:
        """The next window's prefix, where ids [S, 1] are a whole window's and its tokens."""
        n_head, n_history = self.heads.shape[1], int(self.windows[0, 1])
        return np.concatenate([self.heads[0][:, None], ids[max(n_head, len(ids) - n_history) :]])

    @property
    def behind(self) -> Chain | None:
        """Without the first of its windows."""
        return Chain(self.heads[1:], self.windows[1:]) if len(self.heads) > 1 else None

    def check(self, row: Row, size: GPTSize) -> None:
        """Raises ValueError for windows that do not fit their row or the model, or ids that are none."""
        n_head = self.heads.shape[1]
        if len(row.ids) < n_head or row.ids.shape[1] != 1:
            raise ValueError(f"a prefix that others follow has at least {n_head} ids, got {len(row.ids)}")
        windows = self.windows.tolist()  # a few: Python is done with them sooner than NumPy
        if min(map(min, windows)) < 1 or row.n_whole < 1:
            raise ValueError(
                f"windows that follow want at least one token each and one before it, and the row's own window one; got "
                f"{windows} and {row.n_whole}"
            )
        if (n_most := n_head + max(tokens + history for tokens, history in windows) - 1) > size.block_size:
            raise ValueError(f"a window that follows must take at most {size.block_size} positions, got {n_most}")
        if int(self.heads.view(np.uint32).max()) >= size.n_input_ids:  # one below 0 is a large one
            raise ValueError(
                f"ids of heads must be 0 to {size.n_input_ids - 1}, got {self.heads.min()} to {self.heads.max()}"
            )


@dataclass(frozen=True)
class Row:
    """One stream's share of a batch."""

    ids: Ints  # [S, C]: the whole prefix; the C ids of a position are summed
    n_tokens: int  # new tokens wanted, those of windows that follow included
    position: int  # index of the first new token in the generation: the noise's counter
    sampling: Sampling
    stream: int = 0  # key of the KV cache kept between calls; 0: keep none
    # Engines know none, but for the cuda engine's only row: they are given a window at a time.
    chain: Chain | None = None
    is_checked: bool = False  # it is known to fit, and so does what is made of it
    lead_s: float = 0.0  # audio that its listener has in hand, where a sentence begins that is not the first
    due_s: float | None = None  # of its sentence's audio, before what waits for these tokens; None: before themselves

    @property
    def n_whole(self) -> int:
        """Tokens wanted of the row's own window."""
        return self.n_tokens - self.chain.n_tokens if self.chain else self.n_tokens

    def checked(self, size: GPTSize) -> Row:
        """The row, which nobody need look through again. Raises ValueError as `check` does."""
        self.check(size)
        return replace(self, is_checked=True)

    def check(self, size: GPTSize) -> None:
        """Raises ValueError for a row that does not fit the model."""
        if self.is_checked:
            return
        n_positions = len(self.ids) + self.n_whole - 1
        if not len(self.ids) or n_positions > size.block_size:
            raise ValueError(f"prefix and new tokens must take 1 to {size.block_size} positions, got {n_positions}")
        if int(self.ids.view(np.uint32).max()) > size.n_input_ids:  # one below 0 is a large one
            raise ValueError(
                f"prefix ids must be 0 to {size.n_input_ids - 1}, got {self.ids.min()} to {self.ids.max()}"
            )
        reals = self.sampling.temperature, self.lead_s, self.due_s or 0.0
        if min(self.n_tokens, self.position, self.sampling.seed) < 0 or not all(0 <= x < math.inf for x in reals):
            raise ValueError("n_tokens, position, seed, temperature, lead_s and due_s must be 0 or more, and finite")
        if self.chain:
            self.chain.check(self, size)

    def piece(self, n: int) -> Row:
        """At most n tokens of it, and none of another window: what an engine is given."""
        return Row(self.ids, min(n, self.n_whole), self.position, self.sampling, self.stream, None, self.is_checked)

    def ids_with(self, tokens: Ints) -> Ints:
        """The prefix [S + n, C] that this row and n tokens drawn after it make."""
        n, n_ids = self.ids.shape
        ids = np.empty((n + len(tokens), n_ids), self.ids.dtype)
        ids[:n], ids[n:, 0] = self.ids, tokens
        if n_ids > 1:
            ids[n:, 1:] = self.ids[-1, 1:]
        return ids

    def after(self, tokens: Ints, ids: Ints | None = None) -> Row:
        """What is left of the row's call once tokens [n] are drawn: the next window, where one is whole. ids: what `ids_with` makes of
        them, if somebody has it; what is left has the very same, unless its window slides."""
        n, n_whole = len(tokens), self.n_whole
        if n > n_whole:
            return self.after(tokens[:n_whole]).after(tokens[n_whole:])
        chain, ids = self.chain, self.ids_with(tokens) if ids is None else ids
        if chain and n == n_whole:
            following, chain = chain.next_ids(ids), chain.behind
            ids = ids if np.array_equal(following, ids) else following
        n_left, position = self.n_tokens - n, self.position + n
        return Row(ids, n_left, position, self.sampling, self.stream, chain, self.is_checked, due_s=self.due_s)


@dataclass(frozen=True)
class Generation:
    tokens: Ints  # [n], n <= n_tokens
    ended: bool  # the end-of-speech rule stopped it
    ids: Ints | None = None  # the row's prefix with these behind it [S + n, C], from an engine that has made it

    @classmethod
    def joined(cls, pieces: Sequence[Ints], ended: bool) -> Generation:
        """Of tokens that were drawn piece by piece."""
        return cls(pieces[0] if len(pieces) == 1 else np.concatenate([NO_TOKENS, *pieces]), ended)

    def __reduce__(self) -> tuple[Any, ...]:
        """To whoever asked, who has the prefix: bytes are pickled in a fifth of the time that an array takes."""
        return _generation, (self.tokens.astype(np.int32).tobytes(), self.ended)


NO_TOKENS = np.zeros(0, np.int32)


def _generation(tokens: bytes, ended: bool) -> Generation:
    return Generation(np.frombuffer(tokens, np.int32), ended)


def by_windows(generate: Callable[[list[Row]], list[Generation]], rows: Sequence[Row]) -> list[Generation]:
    """An engine's `generate`, which knows no chains, for rows that may be some: a window of each at a time."""
    drawn: list[list[Ints]] = [[] for _ in rows]
    ended, left = [False] * len(rows), dict(enumerate(rows))
    while left:
        pieces = generate([row.piece(row.n_whole) for row in left.values()])
        for (i, row), piece in zip(list(left.items()), pieces, strict=True):
            drawn[i].append(piece.tokens)
            ended[i], left[i] = piece.ended, row.after(piece.tokens)
        left = {i: row for i, row in left.items() if row.n_tokens and not ended[i]}
    return [Generation.joined(*said) for said in zip(drawn, ended, strict=True)]


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

    def check(self, layout: FineLayout) -> None:
        """Raises ValueError for a window that does not fit the model."""
        shape, n_ids = self.codes.shape, layout.size.n_input_ids
        if shape[0] != layout.n_codebooks or not 0 < shape[1] <= layout.size.block_size:
            raise ValueError(f"codes must be [{layout.n_codebooks}, 1 to {layout.size.block_size}], got {list(shape)}")
        if self.codes.min() < 0 or self.codes.max() >= n_ids:
            raise ValueError(f"codes must be 0 to {n_ids - 1}, got {self.codes.min()} to {self.codes.max()}")
        if self.uniforms.shape != (shape[0] - layout.n_given, shape[1]):
            raise ValueError(
                f"uniforms must be [{shape[0] - layout.n_given}, {shape[1]}], got {list(self.uniforms.shape)}"
            )


@dataclass(frozen=True)
class Windows:
    """Windows of one stream in one call: each is filled when those before it are, and sees what they say."""

    codes: Ints  # [K, T]
    spans: Ints  # [k >= 1, 2]: of each window, its first frame and, counted from there, the first one to fill
    n_frames: int  # of a window
    uniforms: Floats  # [K - given, T]
    temperature: float

    @property
    def fill_from(self) -> int:
        """The first window's."""
        return int(self.spans[0, 1])

    @property
    def first(self) -> Window:
        """What an engine is given."""
        seen = self._seen
        return Window(self.codes[:, seen], self.fill_from, self.uniforms[:, seen], self.temperature)

    def after(self, filled: Ints) -> Windows:
        """What is left of the call once its first window is filled: [K, n_frames]. Without spans, it is whole."""
        codes = self.codes.copy()
        codes[:, self._seen] = filled
        return replace(self, codes=codes, spans=self.spans[1:])

    def check(self, layout: FineLayout) -> None:
        """Raises ValueError for windows that do not fit the model, or reach beyond the codes."""
        if self.spans.ndim != 2 or not len(self.spans) or self.spans.shape[1] != 2:
            raise ValueError(f"windows must be [k, 2], got {list(self.spans.shape)}")
        n_codes = self.codes.shape[1]
        if self.spans.min() < 0 or self.spans[:, 0].max() + self.n_frames > n_codes:
            raise ValueError(
                f"windows of {self.n_frames} frames reach beyond the codes' {n_codes}: {self.spans.tolist()}"
            )
        if self.uniforms.shape[1] != n_codes:
            raise ValueError(f"uniforms must be of {n_codes} frames, got {self.uniforms.shape[1]}")
        for i in range(len(self.spans)):
            replace(self, spans=self.spans[i:]).first.check(layout)

    @property
    def _seen(self) -> slice:
        start = int(self.spans[0, 0])
        return slice(start, start + self.n_frames)


def one_by_one(fill: Callable[[list[Window]], list[Ints]], calls: Sequence[Window | Windows]) -> list[Ints]:
    """An engine's `fill`, which knows windows only, for calls that may have several: one of each at a time."""
    results: list[Ints] = [call.codes for call in calls]
    left = dict(enumerate(calls))
    while left:
        filled = fill([call.first if isinstance(call, Windows) else call for call in left.values()])
        for (i, call), codes in zip(list(left.items()), filled, strict=True):
            if isinstance(call, Windows):
                left[i] = rest = call.after(codes)
                results[i] = rest.codes
                if len(rest.spans):
                    continue
            else:
                results[i] = codes
            del left[i]
    return results


class Chunk(NamedTuple):
    """One stream's share of a batch of the codec."""

    codes: Ints  # [K, n]
    state: Floats  # [N]
    lead_s: float = math.inf  # audio that its listener has in hand; infinity: there is none yet, or nobody said


def check_chunk(chunk: Chunk, layout: CodecLayout) -> None:
    """Raises ValueError for a chunk that does not fit the model."""
    codes, state, lead_s = chunk
    if codes.shape[0] != layout.n_codebooks or not codes.shape[1]:
        raise ValueError(f"codes must be [{layout.n_codebooks}, n >= 1], got {list(codes.shape)}")
    if codes.min() < 0 or codes.max() >= layout.codebook_size:
        raise ValueError(f"codes must be 0 to {layout.codebook_size - 1}, got {codes.min()} to {codes.max()}")
    if state.shape != (state_size(layout),):
        raise ValueError(f"state must be [{state_size(layout)}], got {list(state.shape)}")
    if math.isnan(lead_s):
        raise ValueError("lead_s must be the seconds that the listener has in hand, got nan")


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
