"""Semantic tokens to coarse codes, window by window, exactly as the reference cuts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from barkstream.options import Schedule
from barkstream.sampling import Ints, Sampling
from barkstream.semantic import SemanticTokens
from barkstream.stages import Stages
from barkstream.tokens import CoarseLayout
from barkstream.voices import HistoryPrompt

NO_TOKENS = np.zeros(0, np.int32)


def generate_coarse(
    semantic: SemanticTokens,
    history: HistoryPrompt | None,
    layout: CoarseLayout,
    sampling: Sampling,
    lookahead: int | None,
    schedule: Schedule,
    stages: Stages,
    stream: int,
    may_chain: Callable[[], bool] = lambda: True,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[Ints]:
    """Coarse codes [2, t] as they come: at most schedule.coarse_call tokens of a window at a time, and the windows behind it that
    may be chained to it.

    Each window waits for the semantic tokens that the reference would read (up to the end of its semantic window), or for
    `lookahead` tokens beyond what the window itself says, if that is less. Those of a chained window are there already.
    meanwhile: told just before the first call, so that another thread may do what there is time for until it is answered.
    """
    past_semantic, past_coarse = coarse_history(history, layout)
    windows = _Windows(semantic, past_semantic, layout, lookahead)
    generated, n_calls = NO_TOKENS, 0
    while True:
        n = len(generated)
        start = n - n % layout.window
        semantic.ensure(windows.needs(start))
        end = min(windows.end(start), n + schedule.coarse_call)
        if n >= end:
            return
        prefix = np.concatenate(
            [windows.head(start), _history(past_coarse, generated[:start], layout), generated[start:]]
        )
        heads, end = windows.chain(end, schedule.windows(n_calls) - 1 if may_chain() else 0)
        if n_calls == 0:
            meanwhile()
        new = stages.coarse(prefix, end - n, n, sampling, stream, heads)
        new = new[: len(new) - len(new) % layout.n_codebooks]  # a call whose listener has left ends anywhere
        generated, n_calls = np.concatenate([generated, new]), n_calls + 1
        yield codes_from_tokens(new, layout)


@dataclass(frozen=True)
class _Windows:
    """What a sentence's windows see of its semantic tokens. start: a window's first coarse token."""

    semantic: SemanticTokens
    past: Ints  # [n], a preset's
    layout: CoarseLayout
    lookahead: int | None

    def needs(self, start: int) -> int:
        """Semantic tokens that it waits for."""
        read, _ = _semantic_window(start, len(self.past), self.layout)
        if self.lookahead is None:
            return read
        return min(read, _said_by(start + self.layout.window, self.layout) + 1 + self.lookahead)

    def end(self, start: int) -> int:
        """The coarse token behind its last one; no more than `start` if it has none."""
        return min(start + self.layout.window, n_coarse_tokens(len(self._seen(start)), self.layout))

    def head(self, start: int) -> Ints:
        """What its prefix begins with: [semantic window | infer]."""
        _, first = _semantic_window(start, len(self.past), self.layout)
        return window_head(np.concatenate([self.past, self._seen(start)])[first:], self.layout)

    def chain(self, end: int, n_most: int) -> tuple[Ints, int]:
        """Heads [k, H] of up to n_most windows from coarse token `end` on, as far as their semantic tokens are there, and their end."""
        heads: list[Ints] = []
        while len(heads) < n_most and end % self.layout.window == 0 and self._is_ready(end) and self.end(end) > end:
            heads.append(self.head(end))
            end = self.end(end)
        return np.array(heads, np.int32).reshape(len(heads), self.layout.n_semantic_window + 1), end

    def _is_ready(self, start: int) -> bool:
        return self.semantic.has(self.needs(start))

    def _seen(self, start: int) -> Ints:
        return self.semantic.tokens[: self.needs(start)]  # what came early must not be seen early


def coarse_history(history: HistoryPrompt | None, layout: CoarseLayout) -> tuple[Ints, Ints]:
    """A preset's semantic tokens [n] and coarse tokens [m], trimmed to the same time as the reference trims them."""
    if history is None:
        return NO_TOKENS, NO_TOKENS
    tokens = tokens_from_codes(history.coarse, layout)
    n_semantic = min(
        layout.max_semantic_history,
        len(history.semantic) - len(history.semantic) % 2,
        int(len(tokens) / layout.tokens_per_semantic),
    )
    n_coarse = round(n_semantic * layout.tokens_per_semantic)
    if n_semantic == 0:
        return NO_TOKENS, NO_TOKENS
    return history.semantic[-n_semantic:], tokens[-n_coarse:][
        : -layout.n_codebooks
    ]  # the reference drops the last frame


def n_coarse_tokens(n_semantic: int, layout: CoarseLayout) -> int:
    """Coarse tokens that n_semantic semantic tokens give."""
    return int(n_semantic * layout.tokens_per_semantic / layout.n_codebooks) * layout.n_codebooks


def window_head(semantic: Ints, layout: CoarseLayout) -> Ints:
    """[semantic window | infer] of a window. semantic: known tokens from the window's first on."""
    head = np.full(layout.n_semantic_window + 1, layout.semantic_pad, np.int32)
    visible = semantic[: layout.n_semantic_window]
    head[: len(visible)] = visible
    head[-1] = layout.infer
    return head


def tokens_from_codes(codes: Ints, layout: CoarseLayout) -> Ints:
    """Codes [2, t] as interleaved ids [2 t]."""
    offsets = layout.first_id + layout.codebook_size * np.arange(layout.n_codebooks)
    return (codes + offsets[:, None]).T.reshape(-1).astype(np.int32)


def codes_from_tokens(tokens: Ints, layout: CoarseLayout) -> Ints:
    """Interleaved ids [2 t], the first one of codebook 0, as codes [2, t]."""
    offsets = layout.first_id + layout.codebook_size * np.arange(layout.n_codebooks)
    return (tokens.reshape(-1, layout.n_codebooks) - offsets).T.astype(np.int32)


def _history(past_coarse: Ints, generated: Ints, layout: CoarseLayout) -> Ints:
    return np.concatenate([past_coarse, generated])[-layout.max_history :].astype(np.int32)


def _said_by(n_coarse: int, layout: CoarseLayout) -> int:
    """Index of the semantic token that the coarse token n_coarse belongs to."""
    return round(n_coarse / layout.tokens_per_semantic)


def _semantic_window(start: int, n_past: int, layout: CoarseLayout) -> tuple[int, int]:
    """For the window at coarse token `start`: new semantic tokens it reads up to, and its first index in past + new ones."""
    first = max(0, n_past + _said_by(start, layout) - layout.max_semantic_history)
    return first + layout.n_semantic_window - n_past, first
