"""Semantic tokens to coarse codes, window by window, exactly as the reference cuts them."""

from __future__ import annotations

from collections.abc import Iterator

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
) -> Iterator[Ints]:
    """Coarse codes [2, t] as they come, at most schedule.coarse_call tokens at a time.

    Each window waits for the semantic tokens that the reference would read (up to the end of its semantic window), or for
    `lookahead` tokens beyond what the window itself says, if that is less.
    """
    past_semantic, past_coarse = coarse_history(history, layout)
    generated = NO_TOKENS
    while True:
        n = len(generated)
        start = n - n % layout.window
        read, first = _semantic_window(start, len(past_semantic), layout)
        needed = read if lookahead is None else min(read, _said_by(start + layout.window, layout) + 1 + lookahead)
        semantic.ensure(needed)
        new_semantic = semantic.tokens[:needed]  # what came early must not be seen early
        n_steps = n_coarse_tokens(len(new_semantic), layout)
        if n >= n_steps:
            return
        known = np.concatenate([past_semantic, new_semantic])
        prefix = np.concatenate(
            [window_prefix(known[first:], past_coarse, generated[:start], layout), generated[start:]]
        )
        n_call = min(start + layout.window - n, schedule.coarse_call, n_steps - n)
        new = stages.coarse(prefix, n_call, n, sampling, stream)
        generated = np.concatenate([generated, new])
        yield codes_from_tokens(new, layout)


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


def window_prefix(semantic: Ints, past_coarse: Ints, generated: Ints, layout: CoarseLayout) -> Ints:
    """[semantic window | infer | history] of a window. semantic: known tokens from the window's first on."""
    window = np.full(layout.n_semantic_window, layout.semantic_pad, np.int32)
    visible = semantic[: layout.n_semantic_window]
    window[: len(visible)] = visible
    return np.concatenate(
        [window, [layout.infer], np.concatenate([past_coarse, generated])[-layout.max_history :]]
    ).astype(np.int32)


def tokens_from_codes(codes: Ints, layout: CoarseLayout) -> Ints:
    """Codes [2, t] as interleaved ids [2 t]."""
    offsets = layout.first_id + layout.codebook_size * np.arange(layout.n_codebooks)
    return (codes + offsets[:, None]).T.reshape(-1).astype(np.int32)


def codes_from_tokens(tokens: Ints, layout: CoarseLayout) -> Ints:
    """Interleaved ids [2 t], the first one of codebook 0, as codes [2, t]."""
    offsets = layout.first_id + layout.codebook_size * np.arange(layout.n_codebooks)
    return (tokens.reshape(-1, layout.n_codebooks) - offsets).T.astype(np.int32)


def _said_by(n_coarse: int, layout: CoarseLayout) -> int:
    """Index of the semantic token that the coarse token n_coarse belongs to."""
    return round(n_coarse / layout.tokens_per_semantic)


def _semantic_window(start: int, n_past: int, layout: CoarseLayout) -> tuple[int, int]:
    """For the window at coarse token `start`: new semantic tokens it reads up to, and its first index in past + new ones."""
    first = max(0, n_past + _said_by(start, layout) - layout.max_semantic_history)
    return first + layout.n_semantic_window - n_past, first
