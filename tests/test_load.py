"""The load tools run, small, against a live server; a flood of requests and a storm of disconnects do it no harm."""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

from barkstream.clients import AsyncClient, BarkstreamError, Client
from barkstream.clients.playback import Arrival

PERF = Path(__file__).resolve().parents[1] / "perf"
sys.path.insert(0, str(PERF))

from capacity import Promise, highest_rate  # noqa: E402
from gpu_costs import COSTS  # noqa: E402
from load_report import Outcome, Request, append_row, read_rows, summarize, table  # noqa: E402
from load_test import TEXTS, Load, Plan, ask, closed_loop  # noqa: E402

RATE_HZ = 24000
MAX_STREAMS = 16  # bark/config.pbtxt
N_FLOOD = 200
COLUMNS = (
    "gpu n_gpus commit model mode rate_rps n_clients requests failed ttfa_ms_p50 ttfa_ms_p95 ttfa_ms_p99 underruns audio_s_per_s"
)  # fmt: skip


def script(name, *arguments, status=0):
    """Run one of perf/'s scripts; its last line, parsed."""
    command = [sys.executable, str(PERF / name), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == status, ran.stdout + ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def outcome(index=0, sent_s=0.0, chunks=((0.2, 1.0), (0.9, 1.0)), **failure):
    """A request whose chunks of 1 s arrived so many seconds after it was sent, with such peaks."""
    request = Request(index, sent_s, TEXTS["short"], "short", None, index)
    arrivals = [Arrival(at_s, RATE_HZ, peak) for at_s, peak in chunks]
    return Outcome(request, sent_s, arrivals, sent_s + 2, **failure)


def test_a_failed_request_stays_in_the_table_and_out_of_the_percentiles():
    refused = dict(status="UNAVAILABLE", error="all 16 streams of this server are busy; retry after 1 s")
    row = summarize([outcome(), outcome(1, 1.0, (), **refused), outcome(2, 2.0, (), status="INTERNAL")], RATE_HZ)
    assert (row["requests"], row["failed"], row["refused"]) == (3, 2, 1)
    assert row["ttfa_ms_p50"] == row["ttfa_ms_p99"] == 200
    assert row["audio_s_per_s"] == pytest.approx(2 / 4)
    assert row["streams_max"] == 2
    assert sum(row["errors"].values()) == 2


def test_time_to_first_audio_skips_silence_and_underruns_are_a_players():
    row = summarize([outcome(chunks=((0.1, 0.0), (0.5, 0.5), (2.6, 0.5)))], RATE_HZ)
    assert row["ttfa_ms_p50"] == 500  # the first chunk was silent
    assert row["underruns"] == row["underrun_requests"] == 1  # dry at .1 + 2 s
    assert row["underrun_s"] == pytest.approx(0.5)


def test_without_a_single_success_the_percentiles_are_absent():
    row = summarize([outcome(chunks=(), status="INTERNAL")], RATE_HZ)
    assert row["ttfa_ms_p95"] is None
    assert not Promise().kept(row)
    assert "-" in table([{**Load(1.0, None, 0).row(), **row}])


def test_arrivals_are_poisson_and_the_same_for_the_same_seed():
    plan = Plan(list(TEXTS), ["heart_0", None], duration_s=200, max_requests=None, max_seconds=None, timeout_s=60)
    requests = plan.arrivals(5.0, seed=1)
    assert requests == plan.arrivals(5.0, seed=1)
    assert len(requests) == pytest.approx(1000, rel=0.15)
    assert all(early.due_s < late.due_s < 200 for early, late in zip(requests, requests[1:], strict=False))
    assert len(set(Counter((request.text_name, request.voice) for request in requests).values())) <= 2
    assert len({request.seed for request in requests}) == len(requests)


class FullServer:
    """A client of a server that refuses everything."""

    def stream(self, text, **options):
        return RefusedStream()


class RefusedStream:
    arrivals, ttfa_s = (), None

    async def __aiter__(self):
        raise BarkstreamError("all 16 streams of this server are busy; retry after 1 s", "UNAVAILABLE")
        yield


def test_a_client_who_is_refused_waits_as_told_before_it_asks_again():
    plan = Plan(list(TEXTS), [None], duration_s=0.5, max_requests=None, max_seconds=None, timeout_s=60)
    outcomes = asyncio.run(closed_loop(FullServer(), n_clients=3, seed=0, plan=plan))
    assert [outcome.retry_after_s for outcome in outcomes] == [1.0] * 3


@pytest.mark.parametrize("limit", [0.3, 1.0, 7.7, 100.0])
def test_the_search_finds_the_highest_rate_within_its_resolution(limit):
    found = highest_rate(lambda rate: rate <= limit, start=1.0, resolution=0.1)
    assert limit / 1.1 <= found <= limit


def test_the_search_gives_up_where_no_rate_passes():
    assert highest_rate(lambda rate: False, start=1.0, resolution=0.1) is None


@pytest.mark.parametrize("broken", [dict(ttfa_ms_p95=251.0), dict(underruns=1), dict(failed=1), dict(ttfa_ms_p95=None)])
def test_a_promise_is_broken_by_any_of_its_parts(broken):
    row = dict(ttfa_ms_p95=249.0, underruns=0, failed=0, requests=10)
    assert Promise().kept(row)
    assert not Promise().kept({**row, **broken})


def test_rows_are_added_to_what_a_file_holds(tmp_path):
    for n in range(2):
        append_row(tmp_path / "x-load.json", {"n": n})
    assert read_rows(tmp_path / "x-load.json") == [{"n": 0}, {"n": 1}]


def test_an_export_of_perf_analyzer_becomes_the_same_table(tmp_path):
    samples = [0.0, 0.5, -0.25, 0.1]
    exported = {
        "timestamp": 10_000_000_000,
        "request_inputs": {"text": TEXTS["short"], "voice": "heart_0", "seed": 3},
        "response_timestamps": [10_100_000_000, 10_200_000_000, 10_300_000_000],
        "response_outputs": [{"audio": 0.0}, {"audio": samples}, {"audio": ""}],  # one silent sample, four, FINAL
    }
    experiment = {"experiment": {"mode": "concurrency", "value": 2}, "requests": [exported, exported]}
    (tmp_path / "export.json").write_text(json.dumps({"experiments": [experiment]}))
    output = tmp_path / "x-load.json"
    row = script("perf_analyzer.py", "--read", tmp_path / "export.json", "--output", output)[0]
    assert (row["mode"], row["n_clients"], row["requests"], row["failed"]) == ("closed", 2, 2, 0)
    assert row["ttfa_ms_p50"] == 200
    assert row["underruns"] == 2  # a sample lasts no 100 ms
    assert set(COLUMNS.split()) <= set(row)
    assert read_rows(output)[0]["tool"] == "perf_analyzer"


@pytest.mark.server
@pytest.mark.skipif(shutil.which("perf_analyzer") is None, reason="needs perf_analyzer on the PATH (docs/load.md)")
@pytest.mark.parametrize("load", [("--clients", 2), ("--rate", 1)])
def test_perf_analyzer_measures_a_live_server(server, load):
    row = script("perf_analyzer.py", "--url", server.grpc_url, *load, "--requests", 4, "--max-seconds", 0.6)[0]
    assert (row["requests"], row["failed"]) == (4, 0)
    assert row["ttfa_ms_p50"] > 0 and row["audio_s_per_s"] > 0


@pytest.mark.server
def test_closed_and_open_loop_write_a_row_a_run_and_every_chunks_arrival(server, tmp_path):
    output = tmp_path / "x-load.json"
    small = ["--url", server.grpc_url, "--max-seconds", 0.6, "--warmup", 1, "--output", output]
    closed = script("load_test.py", "--clients", 2, "--requests", 4, *small)
    opened = script("load_test.py", "--rate", 2, "--duration", 2, "--text", "short", *small)
    assert [{**row, "requests_csv": None} for row in read_rows(output)] == [
        {**row, "requests_csv": None} for row in closed + opened
    ]
    for row in read_rows(output):
        assert set(COLUMNS.split()) <= set(row)
        assert row["failed"] == 0 < row["audio_s_per_s"]
        with open(tmp_path / row["requests_csv"]) as file:
            requests = list(csv.DictReader(file))
        assert len(requests) == row["requests"]
        for request in requests:
            arrivals = [float(ms) for ms in request["chunk_at_ms"].split()]
            assert arrivals == sorted(arrivals)
            assert float(request["ttfa_ms"]) in arrivals
            assert len(request["chunk_audio_s"].split()) == len(request["chunk_peak"].split()) == len(arrivals)
    assert script_plots(output, tmp_path / "x.png")


@pytest.mark.server
def test_a_conversation_is_a_row_whose_requests_say_what_its_listener_has_in_hand(server, tmp_path):
    output = tmp_path / "x-load.json"
    small = ["--url", server.grpc_url, "--text", "medium", "--max-seconds", 0.6, "--warmup", 0, "--output", output]
    (row,) = script("load_test.py", "--clients", 1, "--requests", 1, "--by-sentence", "told", *small)
    with open(tmp_path / row["requests_csv"]) as file:
        (request,) = csv.DictReader(file)
    audio_s, arrivals = (list(map(float, request[name].split())) for name in ("chunk_audio_s", "chunk_at_ms"))
    assert audio_s.count(0.25) == 1 and sum(audio_s) == pytest.approx(2 * 0.6 + 0.25, abs=0.08)
    assert arrivals == sorted(arrivals) and row["requests"] == 1 and row["failed"] == 0


class TalkingServer:
    """A client of a server that says a second at once; it remembers what it is asked."""

    def __init__(self):
        self.asked = []

    async def sample_rate(self):
        return 24_000

    def stream(self, text, **options):
        self.asked.append((text, options.get("lead_s")))
        return SpokenStream()


class SpokenStream:
    arrivals, ttfa_s = (Arrival(0.0, 24_000, 0.5),), 0.0

    async def __aiter__(self):
        yield np.zeros(24_000, np.float32)


@pytest.mark.parametrize("by_sentence", [None, "untold", "told"])
def test_who_is_told_is_told_what_came_and_the_pause(by_sentence):
    plan = Plan(["medium"], [None], 1, None, None, timeout_s=60, by_sentence=by_sentence)
    server = TalkingServer()
    outcome = asyncio.run(ask(server, next(plan.requests(0)), plan, time.perf_counter()))
    texts, leads_s = zip(*server.asked, strict=True)
    assert " ".join(texts) == TEXTS["medium"] and len(texts) == (2 if by_sentence else 1)
    assert leads_s[0] is None and outcome.status == "OK"
    if by_sentence:
        assert outcome.audio_s(24_000) == 2.25
        assert leads_s[1] == (pytest.approx(1.25, abs=0.05) if by_sentence == "told" else None)


def script_plots(results, figure):
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, PERF / "plot_load.py", results, "--out", figure], check=True, timeout=120)
    return figure.stat().st_size > 10_000


@pytest.mark.server
def test_load_on_a_pretended_gpu_takes_the_way_that_it_takes_on_a_real_one(tmp_path):
    """The real shared process, told by its costs: a fine window of 256 frames takes at least what it took, alone in its batch."""
    settings = "--set", "chunk_frames=60", "later_chunk_frames=120, 60", "max_sentence_s=5"
    command = "--repository", tmp_path, *settings, "--", "--clients", 1, "--requests", 1, "--warmup", 0
    found = script("pretended_gpu.py", *command)
    (row,) = found["rows"]
    assert (row["requests"], row["failed"], row["underruns"], row["gpu"]) == (1, 0, 0, "pretended")
    # Of which the second sentence has what the first and the pause have left.
    assert row["audio_s"] == pytest.approx(10, abs=0.03)
    rows, ms = zip(*found["stages"].values(), strict=True)
    assert rows == (1, 1, 1, 1)
    n_fine = -(-5 * 75 // 60) + 1 + -(-(4.75 * 75 - 120) // 60)
    fine_ms = COSTS["h100"].fine[0]
    assert fine_ms * n_fine / 10 < ms[2] < 3 * fine_ms * n_fine / 10
    unknown = [sys.executable, PERF / "pretended_gpu.py", "--repository", tmp_path, "--set", "pace=1"]
    ran = subprocess.run(unknown, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "no parameter 'pace'" in ran.stderr


@pytest.mark.server
def test_a_gpus_process_that_is_killed_under_load_costs_no_request(tmp_path):
    load = "--clients", 4, "--duration", 6, "--warmup", 0, "--max-seconds", 5
    found = script("pretended_gpu.py", "--repository", tmp_path, "--kill-after", 4, "--", *load)
    (row,) = found["rows"]
    assert row["requests"] >= 4 and not row["failed"] and found["killed"]
    assert row["audio_s"] == pytest.approx(row["requests"] * 5, abs=row["requests"] * 0.03)


@pytest.mark.server
def test_load_on_random_weights_is_a_row_a_run(tmp_path):
    """On a GPU with Bark's sizes; here a tiny Bark in the profile for CPUs."""
    tiny = "--model", "tiny", "--profile", "default", "--repository", tmp_path, "--set", "max_streams=3"
    one = "--clients", 1, "--requests", 1, "--warmup", 0, "--max-seconds", 1
    found = script("gpu_load.py", *tiny, "--", *one, "--", *one, "--seeds", 4)
    assert [(row["requests"], row["failed"], row["seed"]) for run in found for row in run["rows"]] == [
        (1, 0, 0),
        (1, 0, 4),
    ]
    assert all(run["stages"]["semantic"][0] == 1 and run["stages"]["coarse"][1] > 0 for run in found)
    assert 'key: "max_streams" value: { string_value: "3"' in (tmp_path / "bark" / "config.pbtxt").read_text()
    ran = subprocess.run(
        [sys.executable, PERF / "gpu_load.py", *map(str, tiny)], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 2 and "give load_test.py's options behind --" in ran.stderr
    command = [sys.executable, PERF / "gpu_load.py", *map(str, (*tiny, "--kill-after", 1, "--", *one))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "--kill-after needs a cuda profile" in ran.stderr


@pytest.mark.server
def test_a_server_that_cannot_keep_the_promise_has_no_capacity(server, tmp_path):
    small = ["--url", server.grpc_url, "--max-seconds", 0.6, "--text", "short", "--warmup", 0, "--duration", 0.5]
    found = script("capacity.py", "--start", 4, "--ttfa-ms", 0, "--output", tmp_path / "x-load.json", *small, status=1)
    assert found["capacity_rps"] is None
    assert [run["kept"] for run in found["runs"]] == [False] * len(read_rows(tmp_path / "x-load.json"))
    assert found["runs"][0]["requests"] > 0


@pytest.mark.server
def test_locusts_listeners_listen(server):
    if importlib.util.find_spec("locust") is None:
        pytest.skip("needs the extra `load`")
    ran = subprocess.run(
        [sys.executable, "-m", "locust", "-f", PERF / "locustfile.py", "--host", server.grpc_url, "--headless", "-u", "2",
         "-r", "2", "-t", "3s", "--stop-timeout", "60", "--max-seconds", "0.6", "--json", "--exit-code-on-error", "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    lines = {line["name"]: line for line in json.loads(ran.stdout)}
    assert {name.split()[0] for name in lines} == {"TTFA", "speech", "playback"}
    spoken = [line for name, line in lines.items() if name.startswith("speech")]
    assert sum(line["num_requests"] for line in spoken) > 0 == sum(line["num_failures"] for line in spoken)


@pytest.mark.server
def test_a_storm_of_disconnects_leaves_nothing_behind(server):
    arguments = ["--url", server.grpc_url, "--metrics-url", server.metrics_url, "--voice", "heart_0"]
    row = script("cancel_storm.py", "--streams", 12, "--at-once", 4, "--listen", 0.5, "--commit", "0ff", *arguments)
    assert row["commit"] == "0ff" and row["streams"] == 12 and row["left_behind"] == 0 and row["answered_after"]
    print(f"freed after {row['freed_ms_p50']} ms (p50), {row['freed_ms_p95']} ms (p95)")


@pytest.mark.server
def test_a_flood_is_admitted_up_to_the_limit_and_the_rest_refused_at_once(server):
    asyncio.run(flood(server.grpc_url, 2 * MAX_STREAMS))  # memory that is taken once
    before = memory_mb(server.pid), n_threads(server.pid)
    outcomes = asyncio.run(flood(server.grpc_url, N_FLOOD))
    spoken = [error for error, _ in outcomes if error is None]
    refusals = [(error, took_s) for error, took_s in outcomes if error is not None]
    assert len(spoken) >= MAX_STREAMS
    assert {error.status for error, _ in refusals} == {"UNAVAILABLE"}
    assert all(1 <= error.retry_after_s < 60 for error, _ in refusals)
    assert max(took_s for _, took_s in refusals) < 5  # of 200 that came at once, on cores that are busy speaking
    assert memory_mb(server.pid) - before[0] < 100  # it wobbles by 30
    assert n_threads(server.pid) - before[1] < 10
    with Client(server.grpc_url) as client:
        assert client.speak("Hello there.", voice="heart_0", seed=1, max_seconds=0.5).size


@pytest.mark.server
def test_a_flood_of_stage_calls_is_cut_off_at_the_length_of_the_queue(server):
    said = asyncio.run(flood_stage(server.grpc_url, 600))
    assert said["answered"] >= 256
    assert said["refused"] > 0
    assert set(said) == {"answered", "refused"}


async def flood_stage(url, n):
    """n calls of the coarse stage at once: how many were answered, refused for the queue's length, or met something else."""
    request = coarse_request()
    async with grpc.aio.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def call():
            try:
                await stub.ModelInfer(request)
                return "answered"
            except grpc.RpcError as error:
                return "refused" if "maximum queue size" in error.details() else error.details()

        return Counter(await asyncio.gather(*(call() for _ in range(n))))


def coarse_request():
    """A call of `bark_coarse` for 60 tokens."""
    inputs = dict(
        prefix=np.zeros((1, 3), np.int32), n_tokens=np.int32(60), position=np.int32(0), seed=np.int64(1),
        temperature=np.float32(0.7), top_k=np.int32(0), top_p=np.float32(1), stream=np.int64(0),
    )  # fmt: skip
    request = pb.ModelInferRequest(model_name="bark_coarse")
    for name, value in inputs.items():
        array = np.atleast_2d(value)
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


async def flood(url, n):
    """n requests at once; for each its error, or None, and how long it took."""
    async with AsyncClient(url) as client:

        async def ask(seed):
            start = time.monotonic()
            try:
                await client.speak(TEXTS["short"], voice="heart_0", seed=seed, max_seconds=0.3)
            except BarkstreamError as error:
                return error, time.monotonic() - start
            return None, time.monotonic() - start

        return await asyncio.gather(*map(ask, range(n)))


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in descendants(int(child)))]


def memory_mb(pid):
    """Proportional set size of a process and all below it."""
    pages = (Path(f"/proc/{each}/smaps_rollup").read_text() for each in descendants(pid))
    return sum(int(re.search(r"^Pss:\s+(\d+) kB", page, re.MULTILINE)[1]) for page in pages) / 1024


def n_threads(pid):
    return sum(len(list(Path(f"/proc/{each}/task").iterdir())) for each in descendants(pid))
