"""What the server counts, and the dashboard that shows it."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from barkstream.clients import BarkstreamError, Client
from barkstream.metrics import Metric

pytestmark = pytest.mark.server

DASHBOARD = Path(__file__).resolve().parents[1] / "docker/grafana-dashboard.json"
METRIC = re.compile(r"\b(?:barkstream|nv)_\w+")


def metrics(server) -> dict[str, float]:
    """Values by name and labels."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@pytest.fixture
def grown(server):
    """How much each metric has grown since the test began, once a condition on that holds."""
    before = metrics(server)

    def ask(condition):
        end = time.monotonic() + 30
        while True:
            growth = {name: value - before.get(name, 0) for name, value in metrics(server).items()}
            if condition(growth):
                return growth
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.05)

    return ask


@pytest.fixture(scope="module")
def client(server):
    with Client(server.grpc_url) as client:
        yield client


class Told:
    """A metric of Triton's."""

    def __init__(self, fails: int = 0):
        self.increments, self.observed, self.fails = [], [], fails

    def increment(self, by: float) -> None:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("not taken")
        self.increments.append(by)

    def observe(self, value: float) -> None:
        self.observed.append(value)


def eventually(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def test_what_adds_up_is_told_together_and_what_is_observed_one_by_one():
    told, other = Told(), Told()
    counter, gauge = Metric(told), Metric(other)
    for by in (1, 2, 3):
        counter.increment(by)
        counter.observe(by)
        gauge.increment(-by)
    eventually(lambda: sum(told.increments) == 6 and len(told.observed) == 3 and sum(other.increments) == -6)
    assert told.observed == [1, 2, 3] and len(told.increments) < 3


def test_an_update_that_is_not_taken_is_not_the_last(capsys):
    told = Told(fails=1)
    counter = Metric(told)
    counter.increment(5)
    eventually(lambda: not told.fails)
    counter.increment(2)
    eventually(lambda: told.increments == [2])
    assert "not taken" in capsys.readouterr().err


def queries() -> list[str]:
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("query", queries())
def test_every_query_of_the_dashboard_names_what_the_server_exposes(server, query):
    exposed = {name.partition("{")[0] for name in metrics(server)}
    assert METRIC.findall(query)
    assert set(METRIC.findall(query)) <= exposed


def test_every_metric_of_ours_is_on_the_dashboard(server):
    shown = {name for query in queries() for name in METRIC.findall(query)}
    ours = {name.partition("{")[0] for name in metrics(server) if name.startswith("barkstream_")}
    assert ours - shown <= {"barkstream_first_chunk_seconds_count", "barkstream_first_chunk_seconds_sum"}


def test_a_speech_is_counted(client, grown):
    said = len(client.speak("Good morning.", voice="heart_0", seed=1, max_seconds=1)) / client.sample_rate
    growth = grown(lambda growth: growth["barkstream_semantic_kv_slots"] == growth["barkstream_live_streams"] == 0)
    assert growth["barkstream_audio_seconds_total"] == pytest.approx(said)
    assert growth["barkstream_first_chunk_seconds_count"] == 1
    assert growth['barkstream_first_chunk_seconds_bucket{le="+Inf"}'] == 1
    assert growth["barkstream_first_chunk_seconds_sum"] > 0
    for stage in ("semantic", "coarse"):
        assert growth[f"barkstream_{stage}_rows_total"] == growth[f"barkstream_{stage}_calls_total"] > 0  # one alone


def test_a_listener_who_has_enough_in_hand_waits_for_no_first_chunk(client, grown):
    assert client.speak("It is a fine day.", voice="heart_0", max_seconds=1, lead_s=3.0).any()
    growth = grown(lambda growth: growth["barkstream_audio_seconds_total"] > 0.5)
    assert growth["barkstream_first_chunk_seconds_count"] == growth["barkstream_underruns_total"] == 0


def test_an_offline_request_has_no_listener_to_keep_waiting(client, grown):
    client.speak("Good morning. It is late.", voice="heart_0", seed=1, max_seconds=3, streaming=False)
    growth = grown(lambda growth: growth["barkstream_audio_seconds_total"] > 1)
    for name in ("underruns_total", "paced_seconds_total", "first_chunk_seconds_count"):
        assert growth[f"barkstream_{name}"] == 0


@pytest.mark.parametrize("options", [dict(text=""), dict(voice="nobody")])
def test_a_bad_request_is_counted_as_the_callers(client, grown, options):
    with pytest.raises(BarkstreamError):
        client.speak(**{"text": "Hello.", **options})
    growth = grown(lambda growth: growth['barkstream_failed_total{stage="request"}'] == 1)
    assert sum(value for name, value in growth.items() if name.startswith("barkstream_failed_total")) == 1


def test_errors_are_told_apart_by_stage(server):
    stages = {re.search(r'stage="(\w+)"', name)[1] for name in metrics(server) if "barkstream_failed_total" in name}
    assert stages == {"request", "bark_semantic", "bark_coarse", "bark_fine", "bark_codec", "bark"}


def test_a_request_that_was_refused_is_counted(server, client, grown):
    streams = [client.stream("This takes a while to be said. " * 4, voice="heart_0") for _ in range(17)]
    chunks = [iter(stream) for stream in streams]
    with ThreadPoolExecutor(17) as pool:
        first = [pool.submit(next, chunk, None) for chunk in chunks]
        wait(first, timeout=30, return_when=FIRST_EXCEPTION)  # the refused one hears of it, and only then all leave
        for stream in streams:
            stream.close()
        errors = [future.exception() for future in first]
    assert any(error is not None and error.retry_after_s for error in errors)
    growth = grown(lambda growth: growth["barkstream_live_streams"] == 0)
    assert growth["barkstream_refused_total"] == 1
    assert growth["barkstream_cancelled_total"] == 16
