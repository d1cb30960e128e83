"""One process for all stages of a GPU, here with the CPU's engines: the embedded checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from barkstream.clients import Client
from barkstream.engines import Row
from barkstream.engines.hosted import HostedStage, sockets_folder
from barkstream.engines.open import EngineError, Spec, open_stage
from barkstream.export.codec_state import state_size
from barkstream.sampling import Sampling
from barkstream.server import SOCKETS, Server
from barkstream.tokens import Checkpoint


@pytest.fixture
def spec(repository, tmp_path, monkeypatch):
    """Makes specs of stages; their process lives as long as a test's engines."""
    monkeypatch.setenv(SOCKETS, str(tmp_path / "s"))
    (tmp_path / "s").mkdir(mode=0o700)

    def spec(stage, **options):
        folder = repository / f"bark_{stage}" / "1"
        checkpoint = Checkpoint.load(folder / "checkpoint.json")
        return Spec(stage, "onnxruntime", folder / "model.onnx", checkpoint, max_batch=4, n_slots=4, **options)

    return spec


def coarse_row(n_tokens=24, seed=3, stream=7):
    prefix = np.random.default_rng(seed).integers(0, 768, 260).astype(np.int32)[:, None]
    return Row(prefix, n_tokens, 0, Sampling(seed=seed), stream)


def process_of(stage) -> int:
    """The id of the process at the other end of a stage, or of one of its engines."""
    engine = stage.engines[0] if isinstance(stage, HostedStage) else stage
    peer = socket.socket(fileno=os.dup(engine._connection.fileno()))
    with peer:
        return struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def test_instances_share_one_process_and_say_what_an_engine_of_their_own_says(spec):
    own = open_stage(spec("coarse"))
    engines = [HostedStage([spec("coarse")]) for _ in range(3)]
    rows = [coarse_row(seed=seed, stream=seed) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        hosted = list(pool.map(lambda engine, row: engine.run([row])[0], engines, rows))
    for row, generation in zip(rows, hosted, strict=True):
        assert generation.tokens.tolist() == own.generate([row])[0].tokens.tolist()
    assert len({process_of(engine) for engine in engines}) == 1
    told = [engine.take_news() for engine in engines]
    assert sum(work.n_slots for work in told) == 3 and sum(work.n_rows for work in told) >= 3
    engines[0].release(1, 2, 99)
    assert sum(engine.take_news().n_slots for engine in engines) == -2


def test_stages_share_the_process_and_a_bad_artifact_is_its_own_stages_error(spec, tmp_path):
    coarse, codec = HostedStage([spec("coarse")]), HostedStage([spec("codec")])
    assert process_of(coarse) == process_of(codec)
    missing = Spec("fine", "onnxruntime", tmp_path / "model.onnx", spec("fine").checkpoint, max_batch=1)
    with pytest.raises(FileNotFoundError, match="make export"):
        HostedStage([missing])
    with pytest.raises(EngineError, match="another coarse stage"):
        HostedStage([spec("coarse", n_threads=1)])
    assert len(coarse.run([coarse_row()])[0].tokens) == 24


def test_a_call_that_an_engine_cannot_run_is_its_callers_error_and_the_process_goes_on(spec):
    codec = HostedStage([spec("codec")])
    process, state = process_of(codec), np.zeros(state_size_of(spec), np.float32)
    bad, good = (np.zeros((3, 10), np.int32), state), (np.zeros((8, 10), np.int32), state)
    assert isinstance(codec.run([bad])[0], EngineError)
    assert len(codec.run([good])[0][0]) == 3200 and process_of(codec) == process


def test_a_process_that_was_killed_is_replaced_and_the_call_made_again(spec):
    engine = HostedStage([spec("coarse")])
    before = engine.run([coarse_row()])[0].tokens
    assert engine.take_news().n_slots == 1
    killed = process_of(engine)
    os.kill(killed, signal.SIGKILL)
    assert engine.run([coarse_row()])[0].tokens.tolist() == before.tolist()
    assert process_of(engine) != killed and engine.take_news().n_slots == 0  # one is gone, another there


def test_the_process_ends_with_its_last_connection(spec):
    engine, other = HostedStage([spec("coarse")]), HostedStage([spec("codec")])
    process = process_of(engine)
    hang_up(engine)
    assert len(other.run([(np.zeros((8, 10), np.int32), np.zeros(state_size_of(spec), np.float32))])[0][0]) == 3200
    hang_up(other)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}/stat").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "it went on"
        time.sleep(0.02)


def hang_up(stage):
    stage.engines[0]._connection.close()


def state_size_of(spec):
    return state_size(spec("codec").checkpoint.codec)


def test_streams_are_dealt_to_the_gpus_in_turn_and_each_stays_on_its_own(spec):
    stage = HostedStage([spec("coarse", device=device) for device in (0, 1)])
    one, other = stage.engines
    assert process_of(one) != process_of(other)
    for stream in (4, 5, 6, 4):
        assert len(stage.run([coarse_row(stream=stream)])[0].tokens) == 24
    assert [engine.take_news().n_slots for engine in (one, other)] == [2, 1]
    stage.release(4, 5, 6)
    assert [engine.take_news().n_slots for engine in (one, other)] == [-2, -1]
    stage.run([coarse_row(stream=0), coarse_row(stream=0)])  # those in turn, too
    assert min(engine.take_news().n_rows for engine in (one, other)) > 0


def test_a_folder_that_others_can_look_into_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    monkeypatch.setenv(SOCKETS, str(folder))
    with pytest.raises(EngineError, match="must belong to this user alone"):
        sockets_folder()


@pytest.fixture(scope="module")
def shared_server(repository, tmp_path_factory):
    """A live tritonserver whose stages share a process, as in the cuda profile, on the CPU's engines."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(repository, folder, dirs_exist_ok=True)
    for stage in ("semantic", "coarse", "fine", "codec"):
        config = (folder / f"bark_{stage}" / "configs" / "cuda.pbtxt").read_text()
        config = re.sub(r'string_value: "cuda"', 'string_value: "onnxruntime"', config)
        config = re.sub("KIND_GPU", "KIND_CPU", config)
        config = re.sub("max_batch_size: 32", "max_batch_size: 4", config)
        config = re.sub(r"count: \d+", "count: 2", config)
        (folder / f"bark_{stage}" / "config.pbtxt").write_text(config)
    with (folder / "bark" / "config.pbtxt").open("a") as config:
        config.write('parameters [ { key: "crowd" value: { string_value: "3" } } ]')
    with Server(folder) as server:
        yield server


@pytest.mark.server
def test_streams_of_a_server_whose_stages_share_a_process_are_those_of_the_default(shared_server, server):
    text = "Good morning, how are you today?"
    with Client(shared_server.grpc_url) as shared, Client(server.grpc_url) as default, ThreadPoolExecutor(3) as pool:
        speak = lambda seed: shared.speak(text, voice="heart_0", seed=seed)  # noqa: E731
        together = list(pool.map(speak, (11, 12, 13)))
        alone = default.speak(text, voice="heart_0", seed=12)
    assert together[1].shape == alone.shape
    assert np.abs(together[1] - alone).mean() < 1e-3  # a near-tie may fall the other way in another batch


@pytest.mark.server
def test_in_a_crowd_the_first_two_chunks_are_one(shared_server):
    ask = dict(voice="heart_0", seed=4)
    with Client(shared_server.grpc_url) as client, ThreadPoolExecutor(3) as pool:
        first_chunk = lambda: len(list(client.stream("Good morning, how are you today?", **ask))[0])  # noqa: E731
        long = ["We walked along the river until the sun went down behind the hills."] * 3
        others = [iter(client.stream(text, **ask)) for text in long]
        list(pool.map(next, others))
        crowded = first_chunk()
        list(pool.map(list, others))
        assert (first_chunk(), crowded) == (24 * 320, 54 * 320)


@pytest.mark.server
def test_a_server_whose_shared_process_is_killed_loses_no_stream(shared_server):
    with Client(shared_server.grpc_url) as client:
        stream = iter(client.stream("We walked along the river until the sun went down.", voice="heart_0", seed=4))
        chunks = [next(stream)]
        for process in children_of(shared_server.pid):
            if "barkstream.engines.host" in Path(f"/proc/{process}/cmdline").read_text():
                os.kill(process, signal.SIGKILL)
                break
        else:
            pytest.fail("no shared process")
        chunks += list(stream)
    assert sum(map(len, chunks)) > 24_000


def children_of(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *children_of(child)]
    return found
