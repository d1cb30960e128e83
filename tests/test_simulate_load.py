"""The simulation of listeners on a GPU: what it says where the answer is known."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PERF = Path(__file__).resolve().parents[1] / "perf"
sys.path.insert(0, str(PERF))

from simulate_load import COSTS, Gpu, Policy, policy_of, recorded, simulate  # noqa: E402

INT8 = COSTS["h100-int8"]
AT_ONCE = Policy(hop_s=0.0)  # calls of several streams don't wait for one another on their way


def test_a_stream_alone_takes_what_its_calls_take():
    found = simulate(Policy(), INT8, clients=1, duration_s=0.1)
    kernels_ms = 0.95 + 46 * 0.21 + 1.65 + 60 * 0.215 + 5.9 + 1.7
    ways_ms = 8 * 1e3 * Policy().way_s
    assert kernels_ms + ways_ms < found["ttfa_ms_p50"] < kernels_ms + ways_ms + 25  # gaps, preparation, its way to us
    assert found["underruns"] == 0 and found["requests"] == 1
    assert found["stages"]["coarse"] == {
        "rows_a_batch": 1.0,
        "ms_a_second_of_audio": pytest.approx(2.5 * 14.55, abs=0.05),
    }


def test_nobody_waits_for_company_while_the_gpu_is_free():
    alone = simulate(Policy(), INT8, clients=1, duration_s=5)
    assert alone["audio_s_per_s"] > 11  # an H100: 14.4


def test_instances_that_hold_calls_back_cost_audio_and_patience():
    """What it found first: with 6 semantic instances a call waits for others that wait for company."""
    few, many = (
        simulate(replace(AT_ONCE, semantic_instances=n, fine_instances=k), INT8, clients=32, duration_s=14)
        for n, k in ((6, 4), (32, 16))
    )
    assert few["audio_s_per_s"] < 0.98 * many["audio_s_per_s"] and few["ttfa_ms_p95"] > 1.5 * many["ttfa_ms_p95"]
    assert many["stages"]["semantic"]["rows_a_batch"] > few["stages"]["semantic"]["rows_a_batch"]


def test_dearer_steps_make_less_audio_and_the_same_arrivals_the_same_figures():
    ask = dict(rate=4, duration_s=10, seed=3)
    cheap, again, dear = (simulate(Policy(), COSTS[name], **ask) for name in ("h100-int8", "h100-int8", "h100"))
    assert cheap == again and cheap["requests"] == dear["requests"]
    assert cheap["ttfa_ms_p50"] < dear["ttfa_ms_p50"]


def test_recorded_arrivals_are_played_again_and_slower_kernels_are_heard(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("index,due_s,sent_s\n" + "".join(f"{i},{0.5 * i},9\n" for i in range(6)))
    found = [simulate(Policy(slower=k), INT8, due_s=recorded(path)) for k in (1.0, 1.3)]
    assert [row["requests"] for row in found] == [6, 6]
    assert found[1]["ttfa_ms_p50"] > found[0]["ttfa_ms_p50"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="no column due_s"):
        recorded(path)


def test_first_audio_comes_sooner_where_work_is_halted_for_it():
    ask = dict(rate=4, duration_s=10, seed=3)
    waits, halts = (simulate(replace(Policy(), halts=n), INT8, **ask) for n in (0, 2))
    assert halts["ttfa_ms_p50"] < 0.85 * waits["ttfa_ms_p50"] and halts["requests"] == waits["requests"]


def test_the_gpu_idles_less_where_work_is_halted_once_what_it_is_halted_for_is_prepared():
    ask = dict(clients=32, duration_s=14)
    when_they_call, when_prepared = (simulate(replace(AT_ONCE, halts=n, prepare_s=0.003), INT8, **ask) for n in (1, 2))
    assert when_prepared["idle_percent"] < when_they_call["idle_percent"] - 0.5


def test_what_python_takes_between_two_batches_is_idle_time():
    nothing = dict(prepare_s=0.0, settle_s=0.0, row_s=0.0, gap_s=0.0)
    ask = dict(clients=8, duration_s=5)
    free, dear = (simulate(replace(Policy(), **each), INT8, **ask)["idle_percent"] for each in (nothing, {}))
    assert free < 3 and dear > free + 4


def test_a_bounded_backlog_refuses_those_whom_the_gpu_would_not_keep_up_with():
    ask = dict(rate=12, duration_s=15, seed=1)
    all_of_them, bounded = (simulate(Policy(max_backlog_s=most_s), INT8, **ask) for most_s in (float("inf"), 20.0))
    assert all_of_them["refused"] == 0 < bounded["refused"]
    assert bounded["underruns"] < all_of_them["underruns"]


def test_as_a_command():
    command = [
        sys.executable,
        PERF / "simulate_load.py",
        "--clients",
        "2",
        "--duration",
        "3",
        "--set",
        "pace_lead_s=inf",
    ]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert row["requests"] >= 2 and row["underruns"] == 0


def test_calls_that_wait_for_one_another_on_their_way_cost_audio_and_longer_chains_win_some_back():
    policies = AT_ONCE, Policy(hop_s=0.0006), Policy(hop_s=0.0006, coarse_windows=(1,))
    at_once, chains, windows = (
        simulate(policy, INT8, clients=32, duration_s=20)["audio_s_per_s"] for policy in policies
    )
    assert at_once > chains > 1.02 * windows


def test_a_client_who_is_refused_asks_again_later():
    found = simulate(policy_of(["max_streams=4"]), INT8, clients=8, duration_s=5)
    assert found["requests"] > 4 and 4 <= found["refused"] <= 4 * 6


def test_a_setting_that_is_not_there_says_which_are():
    assert policy_of(["company=4", "pace_lead_s=inf"]) == replace(Policy(), company=4, pace_lead_s=float("inf"))
    assert policy_of(["coarse_windows=1,3"]).coarse_windows == (1, 3)
    with pytest.raises(SystemExit, match="no setting 'pace': there are pace_lead_s, "):
        policy_of(["pace=1"])


def test_sentences_begin_without_gaps_where_stages_know_what_listeners_have_in_hand():
    """What it found: of some sentences all but the first came too late for many."""
    sentences = replace(Policy(), sentences=(120, 120, 120, 120), max_streams=32)
    as_before = replace(
        sentences, later_chunks=(29, 28, 60, 60, 60, 90), later_lookahead=(1, 3, 3, 33, 63, 33), tells_lead=0
    )
    before, now = (simulate(each, COSTS["h100"], rate=4.5, duration_s=30, seed=1) for each in (as_before, sentences))
    assert now["underruns"] < before["underruns"] / 4 and now["audio_s_per_s"] > before["audio_s_per_s"]
    assert now["requests"] + now["refused"] == before["requests"] + before["refused"]


def test_a_sentence_behind_a_short_one_leaves_no_gap():
    """What it found, as a GPU had: .4 s are over before a chunk of 1.6 s is there."""
    short_first = replace(Policy(), sentences=(20, 480), max_streams=32)
    as_before = replace(short_first, later_after_s=0.01, codec_due_s=-math.inf)
    before, now = (simulate(each, COSTS["h100"], rate=6.5, duration_s=30, seed=2) for each in (as_before, short_first))
    assert before["underruns"] > before["requests"] / 3 and now["underruns"] <= 1


def test_in_a_crowd_second_chunks_are_there_where_their_calls_go_first():
    """What a trace of a GPU said: their fine windows were behind longer ones, their codec's calls behind first batches of coarse."""
    crowd = policy_of(
        [
            "slower=1.04",
            "max_streams=60",
            "pace_lead_s=3",
            "semantic_instances=60",
            "coarse_instances=60",
            "sliding_window_len=60,60,120,360",
        ]
    )
    as_before = replace(crowd, shortest_first=0, halts_for_second=0, fine_first_batch=8, codec_due_s=-math.inf)
    before, now = (
        sum(simulate(each, COSTS["h100"], rate=8.5, duration_s=25, seed=seed)["underruns"] for seed in (2, 7))
        for each in (as_before, crowd)
    )
    assert before >= 8 and now <= 2


def test_longer_coarse_windows_spare_prefills_and_keys_and_begin_with_the_same_first_one():
    longer = policy_of(["sliding_window_len=60,60,120,180,180,310"])
    assert longer.windows[0][:4] == [(0, 60), (60, 60), (120, 120), (240, 180)] and longer.windows[0][-1][0] < 1500
    assert longer.windows[1] == longer.windows[0]
    # Semantic tokens, as the reference's windows read.
    assert [Policy().reads(n) for n in (0, 60, 600)] == [46, 66, 246]
    assert [longer.reads(n) for n in (0, 60, 120, 600)] == [46, 66, 106, 329]
    assert Policy().spared_keys() == 0 and 0.05 < longer.spared_keys() < 0.15 and longer.prefix() < 1
    assert [longer.due_s(n) for n in (0, 46, 66, 106)] == [0, 0.4, 0.8, 1.6]  # by the window that waits
    ask = dict(clients=32, duration_s=20)
    before, after = (simulate(policy, COSTS["h100"], **ask) for policy in (Policy(), longer))
    assert after["audio_s_per_s"] > 1.1 * before["audio_s_per_s"]


def test_each_window_has_its_prefill_wherever_calls_begin():
    """Calls bring 60 tokens, or so many times that: windows of 90 begin within them."""
    policy = policy_of(["sliding_window_len=90"])
    found = simulate(policy, INT8, clients=1, duration_s=0.1)
    prefills_ms = 17 * INT8.prefill("coarse", 1) * policy.prefix()
    steps_ms = 1500 * (INT8.step("coarse", 1) - policy.spared_keys() * INT8.row_keys)
    ms = (prefills_ms + steps_ms) / policy.clip_s
    assert found["stages"]["coarse"]["ms_a_second_of_audio"] == pytest.approx(ms, abs=0.05)


def test_a_row_that_has_all_it_wants_reads_no_keys():
    async def spared_ms(stage: str) -> float:
        gpu = Gpu(Policy(), INT8)
        gpu._task.cancel()
        return gpu._unread_ms(stage, [60, 60, 10], 60)

    assert asyncio.run(spared_ms("coarse")) == pytest.approx(50 / 60 * INT8.row_keys)
    assert 0 < asyncio.run(spared_ms("semantic")) < asyncio.run(spared_ms("coarse"))
