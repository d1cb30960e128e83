"""Offline, several fine windows in one call: they are filled as by as many calls, through every way to an engine."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from barkstream import fine
from barkstream.engines import Window, Windows, one_by_one
from barkstream.engines.turns import Turns
from barkstream.engines.workers import POLICIES, FineWorker, at_once
from barkstream.fine import DRAWN_AT_ONCE, Draws, fill_offline
from barkstream.options import SpeechOptions
from barkstream.pipeline import Speech
from barkstream.sampling import FINE, uniforms
from barkstream.tokens import FineLayout, GPTSize

SIZE = GPTSize(n_layers=1, n_heads=1, width=64, block_size=32, n_input_ids=101, n_output_ids=100)
LAYOUT = FineLayout(SIZE, n_codebooks=4, n_given=2, codebook_size=100, window=32, max_history=16, unknown=100)
RNG = np.random.default_rng(7)
LONG = SimpleNamespace(fine=RNG.integers(0, 100, (4, 25)).astype(np.int32))
SHORT = SimpleNamespace(fine=LONG.fine[:, :9])


class Attentive:
    """A fine stage's engine: what it fills depends on all that the window holds, on its place in it, and on the draws. Remembers its
    batches; seed 13 is unlucky."""

    def __init__(self):
        self.batches = []

    def fill(self, windows):
        self.batches.append(windows)
        if any(window.temperature == 13 for window in windows):
            raise RuntimeError("unlucky")
        return [self._filled(window) for window in windows]

    def _filled(self, window):
        window.check(LAYOUT)
        seen = int((window.codes * np.arange(1, window.codes.size + 1).reshape(window.codes.shape)).sum())
        drawn = np.arange(window.codes.shape[1]) * 3 + seen + (1000 * window.uniforms).astype(int)
        filled = window.codes.copy()
        filled[2:, window.fill_from :] = (drawn % 100)[:, window.fill_from :]
        return filled


class Stages:
    """Fine calls as windows of an engine, by `run`."""

    def __init__(self, run):
        self._run, self.n_windows = run, []

    def fine(self, codes, fill_from, uniforms, temperature):
        self.n_windows.append(1)
        return self._run(Window(codes, fill_from, uniforms, temperature))

    def fine_windows(self, codes, spans, uniforms, temperature):
        windows = Windows(codes, spans, LAYOUT.window, uniforms, temperature)
        windows.check(LAYOUT)
        self.n_windows.append(len(spans))
        return self._run(windows)


def in_one_process(call):
    return one_by_one(Attentive().fill, [call])[0]


def plainly(coarse, history, seed, temperature, stages):
    """The reference's loop, a call a window: the twin of `fill_offline`."""
    past = np.zeros((LAYOUT.n_codebooks, 0), np.int32) if history is None else history.fine[:, -LAYOUT.max_history :]
    n_past, n_new = past.shape[1], coarse.shape[1]
    codes = np.full((LAYOUT.n_codebooks, max(LAYOUT.window, n_past + n_new)), LAYOUT.unknown, np.int32)
    codes[:, :n_past], codes[: LAYOUT.n_given, n_past : n_past + n_new] = past, coarse
    n_windows = max(0, -(-(n_new - (LAYOUT.window - n_past)) // LAYOUT.hop)) + 1
    for i in range(n_windows):
        start = min(i * LAYOUT.hop, codes.shape[1] - LAYOUT.window)
        fill_from = min(n_past + i * LAYOUT.hop, codes.shape[1] - LAYOUT.hop) - start
        window = slice(start, start + LAYOUT.window)
        uniforms = Draws(seed, LAYOUT).of(start - n_past, LAYOUT.window)
        codes[:, window] = stages.fine(codes[:, window], fill_from, uniforms, temperature)
    return codes[:, n_past : n_past + n_new]


def some_coarse(n):
    return np.random.default_rng(n).integers(0, 100, (2, n)).astype(np.int32)


@pytest.fixture
def worker():
    """One over an attentive engine (`.engine`)."""
    engine = Attentive()
    worker = FineWorker(at_once(engine.fill), 4, Turns(), POLICIES["fine"])
    worker.engine = engine
    thread = threading.Thread(target=worker.work)
    thread.start()
    yield worker
    worker.close()
    thread.join()


@pytest.mark.parametrize("history", [None, SHORT, LONG])
@pytest.mark.parametrize("n_a_call", [1, 2, 3, 64])
def test_windows_of_any_length_are_filled_as_by_single_calls(history, n_a_call):
    for n in range(1, 150):
        single, several = Stages(in_one_process), Stages(in_one_process)
        expected = plainly(some_coarse(n), history, n, 0.5, single)
        codes = fill_offline(some_coarse(n), history, LAYOUT, n, 0.5, several, n_a_call)
        np.testing.assert_array_equal(codes, expected)
        n_windows = len(single.n_windows)
        assert several.n_windows == [min(n_a_call, n_windows - i) for i in range(0, n_windows, n_a_call)]


@pytest.mark.parametrize("history", [None, SHORT, LONG])
def test_a_worker_fills_them_one_after_the_other(worker, history):
    for n in (1, 17, 32, 33, 100):
        codes = fill_offline(
            some_coarse(n), history, LAYOUT, n, 0.5, Stages(lambda c: worker.submit([c])[0].result(10)), 9
        )
        np.testing.assert_array_equal(codes, plainly(some_coarse(n), history, n, 0.5, Stages(in_one_process)))


def some_windows(k, seed=1, temperature=0.5):
    n = LAYOUT.window + LAYOUT.hop * (k - 1)
    codes = np.random.default_rng(seed).integers(0, 101, (4, n)).astype(np.int32)
    spans = np.array([(LAYOUT.hop * i, 5 + i) for i in range(k)], np.int32)
    return Windows(codes, spans, LAYOUT.window, np.full((2, n), 0.3, np.float32), temperature)


def test_calls_of_several_windows_share_batches_with_others_and_each_has_its_own(worker):
    calls = [some_windows(3), some_windows(1).first, some_windows(2, seed=2)]
    with worker._turns.turn(lambda: -1):
        answers = worker.submit(calls)
    for call, answer in zip(calls, answers, strict=True):
        np.testing.assert_array_equal(answer.result(10), in_one_process(call))
    assert [len(batch) for batch in worker.engine.batches] == [3, 2, 1]


def test_a_window_that_somebody_waits_for_is_not_behind_all_of_them(worker):
    """It goes along with the next one."""
    fill, first = worker.engine.fill, []

    def asked_meanwhile(windows):
        if not first:
            first.append(worker.submit([replace(some_windows(1).first, fill_from=30)])[0])
        return fill(windows)

    worker._start = at_once(asked_meanwhile)
    worker.submit([some_windows(3)])[0].result(10)
    first[0].result(10)
    assert [len(batch) for batch in worker.engine.batches] == [1, 2, 1]


def test_a_failure_is_its_callers_and_the_next_call_works(worker):
    with pytest.raises(RuntimeError, match="unlucky"):
        worker.submit([some_windows(3, temperature=13)])[0].result(10)
    assert worker.submit([some_windows(2)])[0].result(10).shape == (4, 48)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(spans=np.zeros((0, 2), np.int32)), r"windows must be \[k, 2\], got \[0, 2\]"),
        (dict(spans=np.zeros((1, 3), np.int32)), r"windows must be \[k, 2\]"),
        (dict(spans=np.array([[0, 5], [33, 5]])), "reach beyond the codes' 64"),
        (dict(spans=np.array([[-1, 5]])), "reach beyond the codes' 64"),
        (dict(uniforms=np.zeros((2, 63), np.float32)), "uniforms must be of 64 frames, got 63"),
        (dict(codes=np.full((4, 64), 101)), "codes must be 0 to 100"),
    ],
)
def test_windows_that_do_not_fit_are_refused(wrong, said):
    some_windows(3).check(LAYOUT)
    with pytest.raises(ValueError, match=said):
        replace(some_windows(3), **wrong).check(LAYOUT)


def test_a_speakers_offline_windows_go_in_calls_of_as_many_as_the_schedule_says(pipeline, voices):
    """A model that never ends, so that a sentence has more than one."""
    n_windows = []

    class Counting:
        def __getattr__(self, name):
            return getattr(pipeline.stages, name)

        def semantic(self, prefix, n_tokens, position, *rest):
            return np.arange(position, position + n_tokens, dtype=np.int32), False

        def coarse(self, prefix, n_tokens, position, *rest):
            layout = pipeline.checkpoint.coarse
            positions = position + np.arange(n_tokens)
            return (layout.first_id + layout.codebook_size * (positions % 2) + positions % 900).astype(np.int32)

        def fine(self, codes, *rest):
            n_windows.append(1)
            return codes % 1024

        def fine_windows(self, codes, spans, *rest):
            n_windows.append(len(spans))
            return codes % 1024

        def codec(self, codes, state):
            return np.full(320 * codes.shape[1], 0.1, np.float32), state

    def said(n_a_call):
        n_windows.clear()
        schedule = replace(pipeline.schedule, offline_fine_windows=n_a_call)
        options, speech = SpeechOptions.parse({"seed": 5, "streaming": False}), Speech()
        list(
            replace(pipeline, stages=Counting(), schedule=schedule).stream(
                "Hi.", options, voices["deep_1"], speech=speech
            )
        )
        return speech.history_prompt().fine

    one = said(1)
    assert n_windows == [1, 1, 1]
    np.testing.assert_array_equal(said(4), one)
    assert n_windows == [3]


def test_draws_are_the_same_whoever_made_the_first_ones(monkeypatch):
    made, slowly = [], fine.uniforms_of_positions

    def counted(*arguments):
        made.append(len(arguments[2]))
        time.sleep(0.05)
        return slowly(*arguments)

    expected = Draws(7, LAYOUT).of(3, 40)
    monkeypatch.setattr(fine, "uniforms_of_positions", counted)
    draws = Draws(7, LAYOUT)
    with ThreadPoolExecutor(4) as pool:
        begun = [pool.submit(draws.begin) for _ in range(2)]
        found = [pool.submit(draws.of, 3, 40) for _ in range(2)]
    assert not any(each.exception() for each in begun) and made == [DRAWN_AT_ONCE]
    for each in found:
        np.testing.assert_array_equal(each.result(), expected)


def test_a_frames_draws_are_its_own():
    """Whatever it is drawn with, and whatever was drawn before."""
    draws = Draws(7, LAYOUT)
    for first, n in ((0, 30), (-100, 256), (-40, 30), (500, 24), (511, 1), (1000, 1100), (3, 5)):
        drawn = draws.of(first, n)
        assert drawn.shape == (2, n) and drawn.dtype == np.float32
        for i in range(n):
            expected = uniforms(7, FINE, first + i, 2) if first + i >= 0 else 0.5
            np.testing.assert_array_equal(drawn[:, i], expected)
