"""Coarse codes to all codebooks: offline as the reference does it, or chunk by chunk with a bounded look-ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from barkstream.options import Schedule
from barkstream.sampling import FINE, Floats, Ints, uniforms_of_positions
from barkstream.stages import Stages
from barkstream.tokens import FineLayout
from barkstream.voices import HistoryPrompt

# Frames whose draws are made together: .3 ms in NumPy, and a single one's take .25. A sentence's chunks share them.
DRAWN_AT_ONCE = 512


def generate_fine(
    coarse: Iterator[Ints],
    history: HistoryPrompt | None,
    layout: FineLayout,
    seed: int,
    temperature: float,
    schedule: Schedule,
    stages: Stages,
    draws: Draws | None = None,
) -> Iterator[Ints]:
    """Codes [8, n] in chunks of schedule.chunk(0), (1), ... frames while coarse codes [2, t] come in.

    A chunk [a, b) is filled in one window: up to schedule.fine_context frames that are filled already (the preset's, then
    our own; more, if the window is to reach schedule.fine_window), the chunk, and up to schedule.lookahead(index) coarse
    frames after it, which the next chunks' windows fill anew. Where that is less than fine_window, unknown frames follow,
    as the reference has them behind the end of speech. What a chunk sees depends on its place alone, not on how many
    coarse frames have come already. draws: the seed's, if some of them may have been made already.
    """
    filled, draws = _history(history, layout), draws or Draws(seed, layout)
    known = np.zeros((layout.n_given, 0), np.int32)  # coarse frames not yet filled
    ended, index, a = False, 0, 0
    while True:
        n_chunk = schedule.chunk(index)
        n_seen = n_chunk + schedule.lookahead(index)
        while not ended and known.shape[1] < n_seen:
            piece = next(coarse, None)
            ended = piece is None
            known = known if piece is None else np.concatenate([known, piece], axis=1)
        n_chunk = min(n_chunk, known.shape[1])
        if n_chunk == 0:
            return
        n_context = min(max(schedule.fine_context, schedule.fine_window - n_seen), filled.shape[1])
        window = np.concatenate([filled[:, filled.shape[1] - n_context :], _unknown(known[:, :n_seen], layout)], axis=1)
        window = _at_least(schedule.fine_window, window, layout)
        codes = stages.fine(window, n_context, draws.of(a - n_context, window.shape[1]), temperature)
        chunk = codes[:, n_context : n_context + n_chunk]
        yield chunk
        filled = np.concatenate([filled, chunk], axis=1)[:, -layout.max_history :]
        known, a, index = known[:, n_chunk:], a + n_chunk, index + 1


def fill_offline(
    coarse: Ints,
    history: HistoryPrompt | None,
    layout: FineLayout,
    seed: int,
    temperature: float,
    stages: Stages,
    n_a_call: int = 1,
) -> Ints:
    """All codes [8, t] of coarse codes [2, t], in the reference's windows of 1,024 frames with a hop of 512.

    n_a_call: windows that a call of the stage has, at most.
    """
    past = _history(history, layout)
    n_past, n_new = past.shape[1], coarse.shape[1]
    codes = np.concatenate([past, _unknown(coarse, layout)], axis=1)
    codes = _at_least(layout.window, codes, layout)
    spans, draws = _offline_spans(n_past, n_new, codes.shape[1], layout), Draws(seed, layout)
    for i in range(0, len(spans), n_a_call):
        start, end = spans[i, 0], spans[i : i + n_a_call][-1, 0] + layout.window
        windows = spans[i : i + n_a_call] - [start, 0]
        uniforms = draws.of(start - n_past, end - start)
        if len(windows) == 1:
            filled = stages.fine(codes[:, start:end], int(windows[0, 1]), uniforms, temperature)
        else:
            filled = stages.fine_windows(codes[:, start:end], windows.astype(np.int32), uniforms, temperature)
        codes[:, start:end] = filled
    return codes[:, n_past : n_past + n_new]


def _offline_spans(n_past: int, n_new: int, n_frames: int, layout: FineLayout) -> Ints:
    """Of the reference's windows over n_frames of codes [k, 2]: the first frame and, counted from there, the first one to fill."""
    n_windows = max(0, -(-(n_new - (layout.window - n_past)) // layout.hop)) + 1
    hops = layout.hop * np.arange(n_windows)
    starts = np.minimum(hops, n_frames - layout.window)
    return np.stack([starts, np.minimum(n_past + hops, n_frames - layout.hop) - starts], axis=1)


def _history(history: HistoryPrompt | None, layout: FineLayout) -> Ints:
    if history is None:
        return np.zeros((layout.n_codebooks, 0), np.int32)
    return history.fine[:, -layout.max_history :]


def _unknown(coarse: Ints, layout: FineLayout) -> Ints:
    """Codes [8, t] of which only the given codebooks are known."""
    codes = np.full((layout.n_codebooks, coarse.shape[1]), layout.unknown, np.int32)
    codes[: layout.n_given] = coarse
    return codes


def _at_least(n_frames: int, codes: Ints, layout: FineLayout) -> Ints:
    """The codes [8, t], and unknown frames behind them if there are fewer than n_frames."""
    n_padding = max(0, n_frames - codes.shape[1])
    return np.pad(codes, ((0, 0), (0, n_padding)), constant_values=layout.unknown)


class Draws:
    """Uniforms of a sentence's frames, whose draws are their own, whatever window they are filled in. Threads may share it."""

    def __init__(self, seed: int, layout: FineLayout):
        self._seed, self._n_drawn = seed, layout.n_codebooks - layout.n_given
        self._blocks: list[Floats] = []  # of DRAWN_AT_ONCE frames each, one behind the other
        self._drawing = threading.Lock()

    def begin(self) -> None:
        """Make the first ones: while somebody waits for something else."""
        self._draw_up_to(1)

    def of(self, first_frame: int, n_frames: int) -> Floats:
        """[6, n_frames]. Frames before the generation's first, which are below 0, are known: nobody uses theirs."""
        start, end = max(0, first_frame), max(0, first_frame + n_frames)
        self._draw_up_to(end)
        parts = [np.full((self._n_drawn, n_frames - (end - start)), 0.5, np.float32)]
        for i in range(start // DRAWN_AT_ONCE, -(-end // DRAWN_AT_ONCE)):
            parts.append(self._blocks[i][:, max(0, start - i * DRAWN_AT_ONCE) : end - i * DRAWN_AT_ONCE])
        return np.concatenate(parts, axis=1)

    def _draw_up_to(self, end: int) -> None:
        with self._drawing:
            while (start := len(self._blocks) * DRAWN_AT_ONCE) < end:
                positions = np.arange(start, start + DRAWN_AT_ONCE)
                uniforms = uniforms_of_positions(self._seed, FINE, positions, self._n_drawn)
                self._blocks.append(np.ascontiguousarray(uniforms.T))
