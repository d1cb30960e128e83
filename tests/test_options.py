"""What a request may ask for, and what it hears otherwise."""

import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from barkstream.options import BadRequest, Schedule, SpeechOptions
from barkstream.pacing import Hold
from barkstream.sampling import Sampling
from barkstream.tokens import GPTSize


def test_defaults_are_sunos_and_a_fresh_seed():
    first, second = SpeechOptions.parse({}), SpeechOptions.parse({})
    assert (first.temperature, first.fine_temperature, first.top_k, first.top_p, first.min_eos_p) == (
        0.7,
        0.5,
        0,
        1,
        0.2,
    )
    assert first.seed != second.seed


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", math.nan, "at least 0 and at most 5, got nan"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", 1e9, "at most 5"),
        ("temperature", math.inf, "at most 5"),
        ("fine_temperature", -1.0, "fine_temperature must be at least 0"),
        ("top_k", 0, "leave top_k out"),
        ("top_k", 1.5, "whole number"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 2.0, "above 0 and at most 1"),
        ("min_eos_p", 0.0, "above 0"),
        ("max_seconds", 0.0, "above 0"),
        ("lead_s", -0.5, "at least 0"),
        ("lead_s", float("nan"), "at least 0, got nan"),
        ("max_seconds", -3.0, "above 0"),
        ("seed", -1, "seed must be 0 to 9223372036854775807, got -1"),
        ("seed", True, "whole number"),
        ("streaming", 1, "true or false"),
        ("lookahead", -1, "lookahead"),
        ("language", "xx", "language must be one of de, en, es"),
        ("normalize", 1, "true or false"),
        ("tempo", 1.0, "no option 'tempo'; options: seed, temperature"),
    ],
)
def test_a_bad_value_is_refused_with_what_would_be_right(name, value, said):
    with pytest.raises(BadRequest, match=r".*") as refused:
        SpeechOptions.parse({name: value})
    assert said in str(refused.value)


def test_a_schedule_reads_triton_parameters():
    schedule = Schedule.parse({"chunk_frames": "15, 30", "fine_lookahead": "8", "sample_rate": "24000"})
    assert [schedule.chunk(i) for i in range(3)] == [15, 30, 30]
    assert [schedule.lookahead(i) for i in range(3)] == [8, 8, 8]  # one number holds for all chunks


def test_the_lookahead_is_a_list_as_the_chunks_are():
    schedule = Schedule.parse({"fine_lookahead": "6, 6,36"})
    assert [schedule.lookahead(i) for i in range(5)] == [6, 6, 36, 36, 36]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"chunk_frames": "0"}, "chunks and calls must be at least 1"),
        ({"fine_context": "-1"}, "windows and what is ahead at least 0"),
        ({"coarse_windows": "0"}, "chunks and calls must be at least 1"),
        ({"offline_coarse_windows": "0"}, "chunks and calls must be at least 1"),
        ({"offline_coarse_windows": "all"}, "offline_coarse_windows must be written like '1', got 'all'"),
        ({"offline_fine_windows": "0"}, "chunks and calls must be at least 1"),
        ({"offline_semantic_call": "-1"}, "windows and what is ahead at least 0"),
        ({"fine_window": "-1"}, "windows and what is ahead at least 0"),
        ({"fine_lookahead": "6, -1"}, "windows and what is ahead at least 0"),
        ({"chunk_frames": "30,x"}, "chunk_frames must be written like '24, 30, 30, 60, 60, 90, 120', got '30,x'"),
        ({"fine_lookahead": "6 36"}, "fine_lookahead must be written like '6, 6, 6, 6, 6, 6, 36', got '6 36'"),
        ({"fine_lookahead": ""}, "fine_lookahead must be written like"),
        ({"max_sentence_s": "0"}, "max_sentence_s must be seconds above 0 (inf: no bound), got 0"),
        ({"max_sentence_s": "nan"}, "max_sentence_s must be seconds above 0"),
        ({"max_sentence_s": "5 s"}, "max_sentence_s must be written like 'inf', got '5 s'"),
        ({"sliding_window_len": "0, -2"}, "windows and what is ahead at least 0"),
        ({"sliding_window_len": "long"}, "sliding_window_len must be written like '0', got 'long'"),
        ({"later_chunk_frames": "117;90"}, "later_chunk_frames must be written like '60, 90', got '117;90'"),
        ({"later_sliding_window_len": "-2"}, "windows and what is ahead at least 0"),
        ({"ahead_at_once": "yes"}, "ahead_at_once must be written like 'true', got 'yes'"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_with_what_would_be_right(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Schedule.parse(wrong)


@pytest.mark.parametrize("name", ["chunk_frames", "fine_lookahead"])
def test_a_schedule_without_a_value_is_refused(name):
    with pytest.raises(ValueError, match="must have at least one value"):
        Schedule(**{name: ()})


@pytest.mark.parametrize(
    ("n_live", "is_long", "is_ahead"), [(4, True, False), (5, False, False), (23, False, False), (24, False, True)]
)
def test_a_request_is_cut_by_how_many_are_under_way(monkeypatch, n_live, is_long, is_ahead):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Mock())
    from barkstream.bls import Speaker

    speaker = object.__new__(Speaker)
    speaker._schedule, speaker._quiet, speaker._hold = Schedule(offline_coarse_windows=64), 4, Hold(24, 0.235)
    schedule = speaker._schedule_among(n_live)
    assert (schedule.offline_coarse_windows == 64, schedule.ahead_from_window) == (is_long, is_ahead)


@pytest.mark.parametrize(("tells", "told"), [(True, [(0, 2.5), (0, 2.5)]), (False, [])])
def test_causal_stages_are_told_what_a_listener_has_where_a_later_sentence_begins(monkeypatch, tells, told):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Mock())
    from barkstream import bls

    calls, in_hand = [], []

    def infer(model, inputs, *outputs):
        calls.append((int(inputs["position"][0]), *(float(inputs[name][0]) for name in ("lead_s",) if name in inputs)))
        return [np.zeros(1, np.int32), np.array([False])][: len(outputs)]

    monkeypatch.setattr(bls, "infer", infer)
    monkeypatch.setattr(bls, "state_size", lambda codec: 1)
    stages = bls.TritonStages(Mock(), lambda: None, lead_s=in_hand.pop if tells else None)
    nothing = np.zeros((0, 2), np.int32)
    # Before the first chunk; where a later sentence begins; behind that.
    for lead_s, position in ((-math.inf, 0), (2.5, 0), (2.5, 60)):
        in_hand[:] = [lead_s, lead_s]
        stages.semantic(np.zeros(3, np.int32), 60, position, Sampling(), 1)
        stages.coarse(np.zeros(3, np.int32), 60, position, Sampling(), 1, nothing, nothing)
    assert [call for call in calls if len(call) > 1] == told
    assert [position for position, *_ in calls] == [0, 0, 0, 0, 60, 60]


@pytest.mark.parametrize(("lead_s", "told"), [(None, math.inf), (-math.inf, math.inf), (-0.5, -0.5), (2.5, 2.5)])
def test_the_codec_is_told_what_a_listener_has_in_hand(monkeypatch, pipeline, lead_s, told):
    """-inf: nothing was sent yet."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Mock())
    from barkstream import bls

    asked = []
    monkeypatch.setattr(bls, "infer", lambda model, inputs, *outputs: asked.append(inputs) or [None, None])
    monkeypatch.setattr(bls, "state_size", lambda codec: 4)
    stages = bls.TritonStages(Mock(), lambda: None, lead_s=None if lead_s is None else lambda: lead_s)
    stages.codec(np.zeros((8, 28), np.int32), np.ones(4, np.float32))
    stage = bls.CodecStage.__new__(bls.CodecStage)
    stage._layout = pipeline.checkpoint.codec
    monkeypatch.setattr("barkstream.engines.state_size", lambda codec: 4)
    assert stage._chunk(asked[0]).lead_s == told
    with pytest.raises(ValueError, match="lead_s must be"):
        stage._chunk(asked[0] | dict(lead_s=np.array([math.nan], np.float32)))


@pytest.mark.parametrize("due_s", [None, 0.0, 1.6])
def test_semantic_is_told_when_its_tokens_are_due(monkeypatch, due_s):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Mock())
    from barkstream import bls

    told, answer = [], [np.zeros(0, np.int32), [False]]
    monkeypatch.setattr(bls, "infer", lambda model, inputs, *outputs: told.append(inputs.get("due_s")) or answer)
    monkeypatch.setattr(bls, "state_size", lambda codec: 1)
    stages = bls.TritonStages(Mock(), lambda: None)
    stages.semantic(np.zeros(3, np.int32), 60, 105, Sampling(), 1, *[due_s] * (due_s is not None))
    assert told == [None if due_s is None else np.float32([due_s])]
    # and hands it on
    call = dict(bls._causal_inputs(np.zeros(514, np.int32), 60, 105, Sampling(), 1))
    call |= {} if due_s is None else dict(due_s=told[0])
    size = GPTSize(n_layers=1, n_heads=1, width=64, block_size=1024, n_input_ids=10, n_output_ids=10)
    stage = object.__new__(bls.CausalStage)
    stage._is_semantic, stage._size = True, size
    stage._semantic = SimpleNamespace(n_text=256, n_prompt_ids=513, size=size)
    assert stage._row(call).due_s == (None if due_s is None else pytest.approx(due_s))
    if due_s is not None:
        with pytest.raises(ValueError, match="due_s must be 0 or more, and finite"):
            stage._row(call | dict(due_s=np.float32([math.nan])))


def test_a_later_sentence_may_be_cut_otherwise(pipeline):
    schedule = Schedule.parse({"later_chunk_frames": "117, 90", "later_fine_lookahead": "3, 33"})
    schedule.check(pipeline.checkpoint)
    later = schedule.later()
    assert Schedule.parse({"later_chunk_frames": "", "later_sliding_window_len": " "}) == Schedule()
    assert replace(schedule, later_sliding_window_len=(120, 180)).later().sliding_window_len == (120, 180)
    with pytest.raises(ValueError, match="sliding_window_len must be multiples of 2"):
        replace(schedule, later_sliding_window_len=(121,)).check(pipeline.checkpoint)
    assert [(later.chunk(i), later.lookahead(i)) for i in (0, 1, 5)] == [(117, 3), (90, 33), (90, 33)]
    assert schedule.chunk(0) == Schedule().chunk(0) and Schedule().later() == Schedule()
    with pytest.raises(ValueError, match="chunk 1 of a later sentence takes 128 \\+ 900 \\+ 33"):
        replace(schedule, later_chunk_frames=(117, 900)).check(pipeline.checkpoint)
    with pytest.raises(ValueError, match="chunks and calls must be at least 1"):
        replace(schedule, later_chunk_frames=(0,))


def test_only_who_does_not_stream_makes_long_calls_and_only_while_few_are_served():
    schedule = Schedule(offline_coarse_windows=64, offline_semantic_call=768, offline_fine_windows=4)
    assert (schedule.offline_fine_windows, schedule.in_company().offline_fine_windows) == (4, 1)
    calls = lambda schedule: (schedule.coarse_windows[0], schedule.semantic_call)  # noqa: E731
    assert calls(schedule) == (1, 64)
    assert calls(schedule.offline(is_guarded=False)) == (64, 768)
    assert calls(schedule.offline(is_guarded=True)) == (64, 64)
    assert calls(schedule.in_company().offline(is_guarded=False)) == (1, 64)
    assert calls(Schedule().offline(is_guarded=False)) == (1, 64)
