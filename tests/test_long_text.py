"""Books: read as they are said, in one voice, with flat memory. Over stages that cost nothing."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from fake_stages import FakeStages

from barkstream.options import Schedule, SpeechOptions
from barkstream.voices import HistoryPrompt, choose_speakers

PARAGRAPH = (
    "The rain had been falling since the morning, and nobody went out. They sat by the fire and told stories.\n\n"
)
TEN_MINUTES = PARAGRAPH * 86  # 9,000 characters


@pytest.fixture
def fake(pipeline):
    stages = FakeStages(pipeline.checkpoint)
    return replace(pipeline, stages=stages), stages


def test_the_first_chunk_of_a_book_costs_one_sentence(fake, voices):
    pipeline, stages = fake
    chunks = pipeline.stream(PARAGRAPH * 8_000, SpeechOptions(), voices["heart_0"])
    assert next(chunks).size
    assert len(stages.prompts) == 1
    chunks.close()
    assert stages.released == [0]


def test_ten_minutes_are_said_with_flat_memory_and_one_voice(fake):
    pipeline, stages = fake
    held = []
    tracemalloc.start()
    whole_sentences = replace(pipeline, schedule=replace(pipeline.schedule, chunk_frames=(150,)))
    for i, _ in enumerate(whole_sentences.stream(TEN_MINUTES, SpeechOptions())):
        if i % 20 == 0:
            stages.prompts[2:-1] = []  # the test's own memory
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(held) >= 5
    assert max(held[1:]) - held[1] < 100_000  # bytes; the audio is 58 MB
    assert len(set(stages.histories()[1:])) == 1


def test_every_sentence_is_said_once_and_pauses_are_as_documented(fake, voices):
    pipeline, stages = fake
    audio = pipeline.speak(PARAGRAPH * 3, SpeechOptions(), voices["heart_0"])
    assert len(stages.prompts) == 6
    silence = (audio == 0).sum() / pipeline.checkpoint.codec.sample_rate
    assert silence == pytest.approx(3 * 0.25 + 2 * 0.6)


def test_a_pause_is_sent_before_any_work_for_what_follows_it(fake, voices):
    pipeline, stages = fake
    n_pause = round(0.25 * pipeline.checkpoint.codec.sample_rate)
    n_prompts = [
        len(stages.prompts)
        for chunk in pipeline.stream(PARAGRAPH, SpeechOptions(), voices["heart_0"])
        if len(chunk) == n_pause and not chunk.any()
    ]
    assert n_prompts == [1]  # between the two, and none at the end


def test_a_sentence_is_no_longer_than_the_schedule_lets_it_be(fake, voices):
    pipeline, stages = fake
    bounded = replace(pipeline, schedule=replace(pipeline.schedule, max_sentence_s=(0.4, 0.8)))
    audio = bounded.speak(PARAGRAPH * 2, SpeechOptions(), voices["heart_0"])
    seconds = len(audio) / pipeline.checkpoint.codec.sample_rate  # in place of 2 s a sentence
    assert seconds == pytest.approx(
        0.4 + 3 * 0.8 + 2 * 0.25 + 0.6, abs=4 * (1 / pipeline.checkpoint.semantic.rate_hz + 0.015)
    )
    assert len(stages.prompts) == 4


@pytest.mark.parametrize("later", [(), (54, 90)])
def test_a_later_sentence_is_cut_as_its_schedule_says(fake, voices, later):
    pipeline, _ = fake
    schedule = replace(pipeline.schedule, chunk_frames=(24, 30, 60), later_chunk_frames=later)
    chunks = replace(pipeline, schedule=schedule).stream(PARAGRAPH, SpeechOptions(), voices["heart_0"])
    frames = [len(chunk) // pipeline.checkpoint.codec.samples_per_frame for chunk in chunks]
    first, pause, second = frames[:4], frames[4], frames[5:]  # 2 s each
    assert first == [24, 30, 60, 36] and pause == 18
    assert second == ([54, 90, 6] if later else first)


@pytest.mark.parametrize(("second_s", "is_later"), [(0.4, False), (0.5, True)])
def test_a_sentence_behind_short_ones_is_cut_as_a_first_one(fake, voices, second_s, is_later):
    """What its listener has in hand would be over before a longer chunk is there."""
    pipeline, _ = fake
    schedule = replace(
        pipeline.schedule, chunk_frames=(24, 30, 60), later_chunk_frames=(54, 90), max_sentence_s=(0.3, second_s, 2.0)
    )
    chunks = replace(pipeline, schedule=schedule).stream(PARAGRAPH * 2, SpeechOptions(), voices["heart_0"])
    frames = [len(chunk) // pipeline.checkpoint.codec.samples_per_frame for chunk in chunks]
    assert frames[frames.index(18) + 1] == 24  # behind the first pause
    assert frames[frames.index(45) + 1] == (54 if is_later else 24)  # behind the second, of .6 s


class Telling(FakeStages):
    """Sentences of 500 tokens; keeps what semantic calls are told."""

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.told = []

    def semantic(self, prefix, n_tokens, position, sampling, stream, due_s=None):
        self.told.append((position, due_s))
        return np.ones(n_tokens, np.int32), position + n_tokens >= 500


def test_semantic_calls_say_which_window_waits_for_them(pipeline):
    stages = Telling(pipeline.checkpoint)
    schedule = Schedule(semantic_ahead=60, semantic_least=60, sliding_window_len=(0, 0, 120, 360))
    talking = replace(pipeline, stages=stages, schedule=schedule)
    voice = HistoryPrompt(np.zeros(400, np.int32), np.zeros((2, 600), np.int32), np.zeros((8, 600), np.int32))
    list(talking.stream("It is a fine day.", SpeechOptions(), voice))
    # Windows begin at 0, 60, 120, 240, 600 coarse tokens, 150 a second, and read 47, 67, 107, 227, 347 semantic ones or one less.
    by_position = dict(stages.told)
    assert [by_position[n] for n in (0, 47, 107, 167, 227)] == [0.0, 0.4, 1.6, 1.6, 4.0]
    # Without a preset the first window reads 256, and somebody waits for all of them.
    stages.told.clear()
    list(talking.stream("It is a fine day.", SpeechOptions()))
    assert {due_s for position, due_s in stages.told if position < 256} == {0.0}
    assert all(due_s > 0 for position, due_s in stages.told if position >= 256)


@pytest.mark.parametrize(("lead_s", "is_later"), [(0.0, False), (1.55, False), (1.6, True)])
def test_a_text_for_a_listener_with_enough_in_hand_begins_as_a_later_sentence(fake, voices, lead_s, is_later):
    pipeline, _ = fake
    schedule = replace(pipeline.schedule, chunk_frames=(24, 30, 60), later_chunk_frames=(54, 90))
    options = SpeechOptions(lead_s=lead_s)
    chunks = replace(pipeline, schedule=schedule).stream("It is a fine day.", options, voices["heart_0"])
    assert len(next(chunks)) // pipeline.checkpoint.codec.samples_per_frame == (54 if is_later else 24)
    chunks.close()


def test_no_pause_is_left_at_the_end_where_max_seconds_ends_it(fake, voices):
    pipeline, _ = fake
    rate = pipeline.checkpoint.codec.sample_rate
    whole = pipeline.speak(PARAGRAPH, SpeechOptions(), voices["heart_0"])
    n_first = int(np.flatnonzero(whole == 0)[0])  # where the pause begins
    for room_s, is_said in ((0.26, False), (0.5, True)):
        cut = pipeline.speak(PARAGRAPH, SpeechOptions(max_seconds=n_first / rate + room_s), voices["heart_0"])
        assert (len(cut) > n_first) == is_said and cut[-1] != 0


def test_each_speaker_keeps_a_voice(fake, voices):
    pipeline, stages = fake
    text = "\n".join(["A: This is what I have to say.", "B: And that is what I think.", "C: I have no voice yet."] * 2)
    speakers = choose_speakers(["A=heart_0", "B=deep_0", "C"], voices)
    pipeline_chunks = pipeline.stream(text, SpeechOptions(), speakers=speakers)
    assert sum(1 for _ in pipeline_chunks) > 6
    a, b, c, *again = stages.histories()
    assert again[:2] == [a, b]
    assert a != b != c
    assert again[2] not in (a, b, c)  # the third speaker goes on in the voice of their own first sentence


def test_numbers_reach_the_model_as_words_only_where_asked(fake, voices):
    pipeline, stages = fake
    for options in (SpeechOptions(), SpeechOptions(normalize=True)):
        pipeline.speak("It was 1999.", options, voices["heart_0"])
    n = pipeline.checkpoint.semantic.n_text
    plain, spelled = (prompt[:n] for prompt in stages.prompts)
    np.testing.assert_array_equal(plain, pipeline.tokenizer.encode("It was 1999."))
    np.testing.assert_array_equal(spelled, pipeline.tokenizer.encode("It was nineteen ninety-nine."))
