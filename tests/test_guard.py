"""A guard acts on what goes wrong, and only on that."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from fake_stages import SAMPLES_PER_FRAME, FakeStages

from barkstream.guard import (
    CUT,
    KEPT_SILENCE_S,
    LONGEST_SILENCE_S,
    LOOP,
    NOISE,
    RETRIED,
    RUNAWAY,
    SILENCE,
    Guard,
    is_loop,
)
from barkstream.options import SpeechOptions
from barkstream.pipeline import NothingSaid

RATE = 24_000
FIRST, SECOND = "This is the first sentence of all.", "And this is the second one of them."
RNG = np.random.default_rng(0)


def speech(seconds):
    """Noise whose loudness moves as a voice's does, four times a second."""
    n = round(seconds * 75) * SAMPLES_PER_FRAME
    swing = 10 ** (np.sin(2 * np.pi * 4 * np.arange(n) / RATE) * 8 / 20)
    return (0.05 * swing * RNG.standard_normal(n)).astype(np.float32)


def silence(seconds):
    return np.zeros(round(seconds * 75) * SAMPLES_PER_FRAME, np.float32)


def noise(seconds):
    return (0.1 * RNG.standard_normal(round(seconds * 75) * SAMPLES_PER_FRAME)).astype(np.float32)


def hum(seconds):
    n = round(seconds * 75) * SAMPLES_PER_FRAME
    return (0.1 * np.sin(2 * np.pi * 100 * np.arange(n) / RATE)).astype(np.float32)


def listen(pipeline, *parts):
    """(what a guard lets pass, the guard), for chunks of 30 frames."""
    guard = Guard(FIRST, pipeline.checkpoint, is_last_try=True)
    audio = np.concatenate(parts)
    chunks = (audio[i : i + 30 * SAMPLES_PER_FRAME] for i in range(0, len(audio), 30 * SAMPLES_PER_FRAME))
    passed = list(guard.listen(chunks))
    return np.concatenate(passed) if passed else np.zeros(0, np.float32), guard


# --- audio -----------------------------------------------------------------------------------------------------------


def test_speech_with_pauses_passes_whole(pipeline):
    audio = np.concatenate([speech(2), silence(1), speech(3)])
    heard, guard = listen(pipeline, audio)
    np.testing.assert_array_equal(heard, audio)
    assert guard.fault is None


def test_silence_before_and_after_the_speech_is_dropped(pipeline):
    heard, guard = listen(pipeline, silence(1.5), speech(1), silence(1.5))
    assert len(heard) / RATE == pytest.approx(1 + 2 * KEPT_SILENCE_S, abs=0.1)
    assert guard.fault is None


def test_audible_samples_are_never_held_back(pipeline):
    guard, chunk = Guard(FIRST, pipeline.checkpoint, is_last_try=False), speech(0.4)
    assert np.array_equal(next(guard.listen(iter([chunk, speech(0.4)]))), chunk)


def test_a_long_silence_ends_the_sentence(pipeline):
    heard, guard = listen(pipeline, speech(1), silence(LONGEST_SILENCE_S + 1), speech(1))
    assert len(heard) / RATE < 1 + 2 * KEPT_SILENCE_S
    assert (guard.fault, guard.heard) == (SILENCE, True)


@pytest.mark.parametrize("steady", [noise, hum])
def test_noise_and_hum_end_the_sentence(pipeline, steady):
    heard, guard = listen(pipeline, speech(2), steady(6), speech(1))
    assert len(heard) / RATE < 2 + 2
    assert (guard.fault, guard.heard) == (NOISE, True)


def test_noise_from_the_beginning_was_no_speech(pipeline):
    _, guard = listen(pipeline, noise(5))
    assert (guard.fault, guard.heard) == (NOISE, False)


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 7, 40])
def test_a_loop_is_seen_though_a_token_in_twenty_differs(period):
    tokens = np.concatenate([RNG.integers(0, 700, 60), np.resize(RNG.integers(0, 700, period), 160)])
    tokens[60::20] = 701
    assert is_loop(tokens, 100, 100)


def test_fresh_tokens_are_no_loop():
    assert not any(is_loop(RNG.integers(0, 12, 300), 100, 100) for _ in range(20))


# --- in the pipeline -------------------------------------------------------------------------------------------------


class Faulty(FakeStages):
    """Sentences of random tokens, said as speech; wrong where `faults` says so, by number of the try."""

    def __init__(self, checkpoint, faults):
        super().__init__(checkpoint)
        self._faults, self._codec_fault = faults, None

    def semantic(self, prefix, n_tokens, position, *rest):
        new, ended = super().semantic(prefix, n_tokens, position, *rest)
        fault = self._faults.get(len(self.prompts) - 1)
        self._codec_fault = {SILENCE: silence, NOISE: noise}.get(fault)
        if fault == RUNAWAY:
            return RNG.integers(0, 700, n_tokens).astype(np.int32), False
        if fault == LOOP:
            return np.full(n_tokens, 5, np.int32), False
        return RNG.integers(0, 700, len(new)).astype(np.int32), ended

    def codec(self, codes, state):
        return (self._codec_fault or speech)(codes.shape[1] / 75), state


def say(pipeline, faults, text=f"{FIRST} {SECOND}", **options):
    """(number of tries, what the guard did, seconds of audio)"""
    stages, did = Faulty(pipeline.checkpoint, faults), []
    faulty = replace(pipeline, stages=stages, on_guard=lambda action, fault: did.append((action, fault)))
    audio = faulty.speak(text, SpeechOptions(guard=True, **options))
    return len(stages.prompts), did, len(audio) / RATE


def test_what_goes_well_is_left_alone(pipeline):
    assert say(pipeline, {}) == (2, [], pytest.approx(4.25, abs=0.3))


@pytest.mark.parametrize("fault", [RUNAWAY, LOOP])
def test_a_further_sentence_is_said_again_before_any_of_it_is_heard(pipeline, fault):
    assert say(pipeline, {1: fault}) == (3, [(RETRIED, fault)], pytest.approx(4.25, abs=0.3))


@pytest.mark.parametrize("fault", [SILENCE, NOISE])
def test_a_sentence_that_was_never_speech_is_said_again(pipeline, fault):
    n_tries, did, _ = say(pipeline, {0: fault}, text=FIRST)
    assert (n_tries, did) == (2, [(RETRIED, fault)])


def test_a_first_sentence_that_was_heard_is_cut(pipeline):
    n_tries, did, seconds = say(pipeline, {0: RUNAWAY}, text=FIRST)
    assert (n_tries, did) == (1, [(CUT, RUNAWAY)])
    assert seconds < 9  # twice its estimate of 2.3 s, and 3 s


def test_offline_even_the_first_sentence_is_said_again(pipeline):
    assert say(pipeline, {0: RUNAWAY}, text=FIRST, streaming=False)[:2] == (2, [(RETRIED, RUNAWAY)])


def test_the_last_try_is_said_and_cut(pipeline):
    n_tries, did, _ = say(pipeline, {1: LOOP, 2: LOOP, 3: LOOP})
    assert (n_tries, did) == (4, [(RETRIED, LOOP), (RETRIED, LOOP), (CUT, LOOP)])


def test_nothing_but_silence_is_an_error(pipeline):
    with pytest.raises(NothingSaid):
        say(pipeline, dict.fromkeys(range(3), SILENCE), text=FIRST)


def test_noise_becomes_nobodys_voice(pipeline):
    stages = Faulty(pipeline.checkpoint, {0: NOISE, 1: NOISE, 2: NOISE})
    faulty = replace(pipeline, stages=stages)
    list(faulty.stream(f"{FIRST} {SECOND} {FIRST}", SpeechOptions(guard=True)))
    tries, second, third = stages.histories()[:3], stages.histories()[3], stages.histories()[4]
    assert {*tries, second} == {tries[0]}  # still without a history
    assert third != second


class Gated(FakeStages):
    """Gives no more than 90 semantic tokens until the gate opens."""

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.gate = threading.Event()

    def semantic(self, prefix, n_tokens, position, *rest):
        assert position + n_tokens <= 90 or self.gate.wait(10), "the first chunk waits for the whole sentence"
        return super().semantic(prefix, n_tokens, position, *rest)


def test_the_first_chunk_does_not_wait_for_the_whole_sentence(pipeline, voices):
    stages = Gated(pipeline.checkpoint)
    chunks = replace(pipeline, stages=stages).stream(FIRST, SpeechOptions(guard=True), voices["heart_0"])
    assert next(chunks).size
    stages.gate.set()
    chunks.close()
