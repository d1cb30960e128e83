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
    """Coarse codes [2, t] as they come: at most schedule.coarse_call tokens of a window at a time, and what is behind them that may be
    chained to them.

    Each window waits for the semantic tokens that the reference would read (up to the end of its semantic window), or for
    `lookahead` tokens beyond what the window itself says, if that is less. Those of a chained window are there already.
    meanwhile: told just before the first call, so that another thread may do what there is time for until it is answered.
    """
    past_semantic, past_coarse = coarse_history(history, layout, schedule.max_coarse_history(layout))
    windows = _Windows(semantic, past_semantic, layout, lookahead, schedule)
    semantic.due_s = windows.due_s
    window, generated, n_calls = windows.first, NO_TOKENS, 0
    while True:
        n = len(generated)
        while window.end <= n:
            window = windows.behind(window)
        semantic.ensure(windows.needs(window))
        n_most = schedule.windows(n_calls) if may_chain() else 1
        end = min(windows.end(window), n + n_most * schedule.coarse_call)
        if n >= end:
            return
        before = np.concatenate([past_coarse, generated[: window.start]])
        history_of_window = before[max(0, len(before) - window.n_history) :]
        prefix = np.concatenate([windows.head(window), history_of_window, generated[window.start :]])
        heads, behind = windows.chain(window, end, n + n_most * schedule.coarse_call if n_most > 1 else end)
        if n_calls == 0:
            meanwhile()
        new = stages.coarse(prefix, end - n + int(behind[:, 0].sum()), n, sampling, stream, heads, behind)
        new = new[: len(new) - len(new) % layout.n_codebooks]  # a call whose listener has left ends anywhere
        generated, n_calls = np.concatenate([generated, new]), n_calls + 1
        yield codes_from_tokens(new, layout)


@dataclass(frozen=True)
class _Window:
    """Coarse tokens that are drawn behind one prefix."""

    index: int
    start: int  # its first token
    end: int  # the token behind its last one, if speech goes on so long
    n_history: int  # tokens before it in its prefix, at most


@dataclass(frozen=True)
class _Windows:
    """A sentence's windows, and what they see of its semantic tokens."""

    semantic: SemanticTokens
    past: Ints  # [n], a preset's
    layout: CoarseLayout
    lookahead: int | None
    schedule: Schedule

    @property
    def first(self) -> _Window:
        return self._window(0, 0)

    def behind(self, window: _Window) -> _Window:
        """The next one."""
        return self._window(window.index + 1, window.end)

    def needs(self, window: _Window) -> int:
        """Semantic tokens that it waits for."""
        read, _ = self._semantic_window(window)
        if self.lookahead is None:
            return read
        return min(read, _said_by(window.end, self.layout) + 1 + self.lookahead)

    def due_s(self, n: int) -> float:
        """Seconds of audio before the first window that waits for more than n semantic tokens."""
        window = self.first
        while self.needs(window) <= n:
            window = self.behind(window)
        return window.start / (self.layout.n_codebooks * self.layout.rate_hz)

    def end(self, window: _Window) -> int:
        """The coarse token behind its last one; no more than its start if it has none."""
        return min(window.end, n_coarse_tokens(len(self._seen(window)), self.layout))

    def head(self, window: _Window) -> Ints:
        """What its prefix begins with: [semantic window | infer]."""
        _, first = self._semantic_window(window)
        return window_head(np.concatenate([self.past, self._seen(window)])[first:], self.layout)

    def chain(self, window: _Window, end: int, most: int) -> tuple[Ints, Ints]:
        """Heads [k, H] of the windows behind one, as far as their semantic tokens are there, and of each [k, 2] the tokens that a call
        brings which ends with token `most` at the latest, and the history before it. end: where the window's own part in that call ends."""
        heads, parts = list[Ints](), list[tuple[int, int]]()
        while end == window.end and end < most:
            window = self.behind(window)
            if not self.semantic.has(self.needs(window)) or self.end(window) <= end:
                break
            heads.append(self.head(window))
            parts.append((min(self.end(window), most) - end, window.n_history))
            end += parts[-1][0]
        n_head = self.layout.n_semantic_window + 1
        return np.array(heads, np.int32).reshape(-1, n_head), np.array(parts, np.int32).reshape(-1, 2)

    def _window(self, index: int, start: int) -> _Window:
        n = self.schedule.coarse_window(index, self.layout)
        return _Window(index, start, start + n, self.layout.history_before(n))

    def _semantic_window(self, window: _Window) -> tuple[int, int]:
        """New semantic tokens that it reads up to, and its first index in past + new ones."""
        n_past, n_history = len(self.past), self.layout.semantic_history(window.n_history)
        first = max(0, n_past + _said_by(window.start, self.layout) - n_history)
        return first + self.layout.n_semantic_window - n_past, first

    def _seen(self, window: _Window) -> Ints:
        return self.semantic.tokens[: self.needs(window)]  # what came early must not be seen early


def coarse_history(history: HistoryPrompt | None, layout: CoarseLayout, n_most: int) -> tuple[Ints, Ints]:
    """A preset's semantic tokens [n] and coarse tokens [m <= n_most], trimmed to the same time as the reference trims them."""
    if history is None:
        return NO_TOKENS, NO_TOKENS
    tokens = tokens_from_codes(history.coarse, layout)
    n_semantic = min(
        layout.semantic_history(n_most),
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


def _said_by(n_coarse: int, layout: CoarseLayout) -> int:
    """Index of the semantic token that the coarse token n_coarse belongs to."""
    return round(n_coarse / layout.tokens_per_semantic)
