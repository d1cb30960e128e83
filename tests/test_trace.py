"""A trace of batches: what is told, by whom, and the table that is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from barkstream.engines import Chunk, Generation, Row
from barkstream.engines.host import Stage
from barkstream.engines.open import Spec
from barkstream.engines.trace import TRACE, open_trace
from barkstream.engines.turns import Turns
from barkstream.engines.workers import FIRST, LAST, POLICIES, REST, CausalWorker, at_once
from barkstream.export.codec_state import state_size
from barkstream.sampling import Sampling
from barkstream.tokens import Checkpoint

REPORT = Path(__file__).resolve().parents[1] / "perf" / "trace_report.py"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_nothing_is_told_unless_a_file_is_named(monkeypatch):
    monkeypatch.delenv(TRACE, raising=False)
    assert open_trace("coarse", 0) is None


def test_what_cannot_be_written_is_said_once_and_stops_no_stage(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(TRACE, str(tmp_path / "none" / "trace"))
    assert open_trace("coarse", 0) is None
    assert "no trace of coarse: [Errno 2] No such file or directory" in capfd.readouterr().err
    monkeypatch.setenv(TRACE, "/dev/full")
    tell = open_trace("codec", 0)
    with Turns().turn(lambda: 0) as turn:
        pass
    for _ in range(2):
        tell([], turn)
    assert capfd.readouterr().err == "no more of the trace of codec: [Errno 28] No space left on device\n"


def test_a_stage_tells_of_each_batch(repository, tmp_path, monkeypatch):
    monkeypatch.setenv(TRACE, str(tmp_path / "trace"))
    folder = repository / "bark_codec" / "1"
    checkpoint = Checkpoint.load(folder / "checkpoint.json")
    spec = Spec("codec", "onnxruntime", folder / "model.onnx", checkpoint, max_batch=4)
    stage = Stage(spec, Turns(), has_begun=lambda stream: True, n_streams=lambda: 0)
    state = np.zeros(state_size(checkpoint.codec), np.float32)
    for n_frames in (29, 90):
        stage.run(Chunk(np.zeros((8, n_frames), np.int32), state)).result()
    stage.close()
    told = lines(tmp_path / "trace")
    assert [(batch["stage"], batch["gpu"], batch["is_halted"]) for batch in told] == [("codec", 0, False)] * 2
    calls = [call for batch in told for call in batch["calls"]]
    assert [(call["n_frames"], call["rank"]) for call in calls] == [(29, LAST), (90, REST)]
    for batch in told:
        assert batch["began_s"] < batch["ended_s"] and batch["calls"][0]["came_s"] <= batch["calls"][0]["since_s"]


def test_of_a_row_each_piece_is_told_with_what_it_waited_since(tmp_path, monkeypatch):
    monkeypatch.setenv(TRACE, str(tmp_path / "trace"))
    engine = at_once(lambda rows: [Generation(np.zeros(row.n_tokens, np.int32), False) for row in rows])
    # steps of 5 ms: pieces of 15 tokens
    worker = CausalWorker(engine, lambda *streams: None, 4, Turns(), POLICIES["coarse"], lambda n_rows: 0.005)
    worker.trace = open_trace("coarse", 1)
    thread = threading.Thread(target=worker.work, daemon=True)
    thread.start()
    row = Row(np.zeros((5, 1), np.int32), 30, 600, Sampling(), 7)
    assert len(worker.submit([row])[0].result(10).tokens) == 30
    worker.close()
    thread.join()
    (first,), (second,) = (batch["calls"] for batch in lines(tmp_path / "trace"))
    assert first | {"since_s": 0, "came_s": 0} == dict(
        rank=REST, came_s=0, since_s=0, stream=7, position=600, n_tokens=30
    )
    assert (second["position"], second["n_tokens"]) == (615, 15)
    assert first["since_s"] == first["came_s"] == second["came_s"] < second["since_s"]


def batch(began_s, calls, stage="codec", is_halted=False):
    """calls: rank, since when it waits, and frames."""
    said = [dict(rank=rank, came_s=since_s, since_s=since_s, n_frames=n) for rank, since_s, n in calls]
    return dict(gpu=0, stage=stage, began_s=began_s, ended_s=began_s + 0.004, is_halted=is_halted, calls=said)


def run_report(path, *options):
    return subprocess.run([sys.executable, REPORT, path, *options], capture_output=True, text=True)


def test_the_report_says_what_each_kind_of_call_waited_for(tmp_path):
    path = tmp_path / "trace.jsonl"
    batches = [batch(10 + i, [(LAST, 10 + i - 0.01, 29), (FIRST, 10 + i - 0.06, 28)]) for i in range(6)]
    batches += [batch(20.0, [(REST, 19.0, 120)] * 8, "fine"), batch(21.0, [(REST, 21.001, 120)], "fine", True)]
    path.write_text("".join(json.dumps(each) + "\n" for each in reversed(batches)))
    ran = run_report(path)
    assert not ran.returncode, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert [(each["stage"], each["rank"], each["n_frames"], each["calls"]) for each in found["calls"]] == [
        ("fine", REST, 120, 9), ("codec", LAST, 29, 6), ("codec", FIRST, 28, 6)
    ]  # fmt: skip
    assert found["calls"][1]["waited_ms"] == pytest.approx([10.0] * 4)
    assert found["calls"][2]["waited_ms"] == pytest.approx([60.0] * 4)
    assert found["stages"] == {
        "fine": dict(batches=2, rows=4.5, ms=4.0, halted=1),
        "codec": dict(batches=6, rows=2.0, ms=4.0, halted=0),
    }
    assert "codec        1     28       6" in ran.stdout
    few = json.loads(run_report(path, "--from", "9.5", "--to", "10.5").stdout.splitlines()[-1])
    assert few["stages"] == {"fine": dict(batches=1, rows=8.0, ms=4.0, halted=0)}


def test_the_report_refuses_what_is_no_trace_and_says_so_where_nothing_is(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(batch(1.0, [(0, 1.0, 29)])) + "\nno\n")
    ran = run_report(path)
    assert ran.returncode and "line 2: no batch of a trace" in ran.stderr
    path.write_text(json.dumps(batch(1.0, [(0, 1.0, 29)])) + "\n")
    ran = run_report(path, "--from", "5")
    assert ran.returncode and "no batch between 5 and inf s" in ran.stderr
