"""One process for all stages of a GPU, here with the CPU's engines: the embedded checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from barkstream.clients import BarkstreamError, Client
from barkstream.engines import Chain, Chunk, Row, by_windows
from barkstream.engines.host import Host
from barkstream.engines.hosted import HostedStage, sockets_folder
from barkstream.engines.open import EngineError, Spec, open_stage
from barkstream.export.codec_state import state_size
from barkstream.sampling import Sampling
from barkstream.server import SOCKETS, Server
from barkstream.tokens import Checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "perf"))

from served_load import shared_processes

HOLD_S = 6.0  # longer than anything that is not held takes on a busy machine


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


def test_stages_whose_calls_do_not_say_whose_they_are_hear_of_how_many_streams_there_are(spec, tmp_path):
    host = Host(tmp_path / "socket")
    codec = host._open(spec("codec"))
    assert codec._worker._n_streams() == 0  # no coarse stage
    coarse = host._open(spec("coarse"))
    for stream in (1, 2):
        coarse.run(coarse_row(stream=stream)).result()
    assert codec._worker._n_streams() == 2
    coarse.release((1,)).result()
    assert codec._worker._n_streams() == 1
    for stage in (codec, coarse):
        stage.close()


def test_a_call_that_an_engine_cannot_run_is_its_callers_error_and_the_process_goes_on(spec):
    codec = HostedStage([spec("codec")])
    process, state = process_of(codec), np.zeros(state_size_of(spec), np.float32)
    bad, good = (Chunk(np.zeros((n, 10), np.int32), state) for n in (3, 8))
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


def test_a_chain_whose_process_was_killed_is_made_again(spec):
    stage, layout = HostedStage([spec("coarse")]), spec("coarse").checkpoint.coarse
    rng = np.random.default_rng(3)
    heads = np.append(rng.integers(0, 500, (20, 256)), np.full((20, 1), layout.infer), axis=1).astype(np.int32)
    chain = Chain.of(heads[1:], np.array([[60, 630]] * 19, np.int32), layout)
    row = Row(heads[0][:, None], 20 * 60, 0, Sampling(seed=3), 7, chain)
    before, killed = by_windows(open_stage(spec("coarse")).generate, [row])[0], process_of(stage)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stage.run, [row])
        time.sleep(0.2)
        assert not answer.done()
        os.kill(killed, signal.SIGKILL)
        assert answer.result()[0].tokens.tolist() == before.tokens.tolist()
    assert process_of(stage) != killed


def test_the_process_ends_with_its_last_connection(spec):
    engine, other = HostedStage([spec("coarse")]), HostedStage([spec("codec")])
    process = process_of(engine)
    hang_up(engine)
    assert len(other.run([Chunk(np.zeros((8, 10), np.int32), np.zeros(state_size_of(spec), np.float32))])[0][0]) == 3200
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


def test_another_gpu_does_the_work_of_one_whose_process_was_killed_until_it_is_there_again(spec):
    stage = HostedStage([spec("coarse", device=device) for device in (0, 1)])
    one, other = stage.engines
    before = stage.run([coarse_row(stream=4)])[0].tokens
    assert [engine.take_news().n_slots for engine in (one, other)] == [1, 0]
    os.kill(process_of(one), signal.SIGKILL)
    assert stage.run([coarse_row(stream=4)])[0].tokens.tolist() == before.tolist()
    assert not one.is_there and other.take_news().n_slots == 1
    deadline = time.monotonic() + 60
    while not one.is_there:
        assert time.monotonic() < deadline, "it was not started anew"
        time.sleep(0.02)
    assert stage.run([coarse_row(stream=4)])[0].tokens.tolist() == before.tolist()
    assert one.take_news().n_slots == 0  # one was lost, another is there
    stage.release(4)
    assert [engine.take_news().n_slots for engine in (one, other)] == [-1, -1]


def test_a_process_that_cannot_be_started_is_its_callers_error_and_tried_again(spec, monkeypatch):
    stage = HostedStage([spec("coarse")])

    def broken(device):
        raise EngineError("no GPU any more")

    with monkeypatch.context() as patched:
        patched.setattr("barkstream.engines.hosted.connect", broken)
        os.kill(process_of(stage), signal.SIGKILL)
        for _ in range(2):
            assert str(stage.run([coarse_row()])[0]) == "no GPU any more"
    assert len(stage.run([coarse_row()])[0].tokens) == 24


def test_a_call_goes_to_the_gpu_of_its_stream(spec):
    stage = HostedStage([spec("codec", device=device) for device in (0, 1)])
    chunk = Chunk(np.zeros((8, 10), np.int32), np.zeros(state_size_of(spec), np.float32))
    stage.run([chunk, chunk, chunk], [5, 7, 9])
    assert [engine.take_news().n_rows for engine in stage.engines] == [0, 3]


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
    chains = dict(
        coarse_windows="1, 2", offline_coarse_windows=64, offline_semantic_call=768, offline_fine_windows=4, quiet=2
    )
    speaker = folder / "bark" / "config.pbtxt"
    speaker.write_text(speaker.read_text().replace("KIND_CPU count: 1", "KIND_CPU count: 2"))
    with speaker.open("a") as config:
        for name, value in (chains | dict(crowd=2, hold_until_s=HOLD_S)).items():
            config.write(f'parameters [ {{ key: "{name}" value: {{ string_value: "{value}" }} }} ]\n')
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
@pytest.mark.parametrize("voice", [None, "heart_1"])
def test_offline_speech_is_one_coarse_call_a_sentence_while_few_are_served_and_the_same_speech(
    shared_server, server, voice
):
    ask = dict(voice=voice, seed=12, streaming=False, return_prompt=True)

    def said(url):
        with Client(url) as client:
            stream = client.stream("Good morning, how are you today?", **ask)
            list(stream)
        return stream.history_prompt

    def coarse_calls(n_clients):
        before = coarse_calls_of(shared_server)
        with ThreadPoolExecutor(n_clients) as pool:
            prompts = list(pool.map(said, [shared_server.grpc_url] * n_clients))
        return prompts, coarse_calls_of(shared_server) - before

    (alone,), n_alone = coarse_calls(1)
    together, n_together = coarse_calls(3)
    default = said(server.grpc_url)
    assert n_alone == 1 + 1  # the last one frees the slot
    assert n_together > 3 * (1 + 1)  # `quiet` is 2
    for prompt in (alone, *together):
        for name in ("semantic_prompt", "coarse_prompt"):
            np.testing.assert_array_equal(prompt[name], default[name])


@pytest.mark.server
def test_fine_windows_of_one_call_are_filled_as_by_two(shared_server, spec):
    layout, rng = spec("fine").checkpoint.fine, np.random.default_rng(2)
    codes = np.full((8, layout.window + 50), layout.unknown, np.int32)
    codes[:2] = rng.integers(0, layout.codebook_size, (2, codes.shape[1]))
    uniforms = rng.random((6, codes.shape[1]), np.float32)
    spans = np.array([(0, 0), (50, layout.max_history)], np.int32)

    def fill(client, seen, fill_from, **windows):
        given = dict(
            codes=codes[:, seen], fill_from=np.array([fill_from], np.int32), uniforms=uniforms[:, seen],
            temperature=np.array([0.5], np.float32), **windows,
        )  # fmt: skip
        tensors = []
        for name, array in given.items():
            kind = "FP32" if array.dtype == np.float32 else "INT32"
            tensors.append(triton.InferInput(name, (1, *array.shape), kind))
            tensors[-1].set_data_from_numpy(np.ascontiguousarray(array[None]))
        return client.infer("bark_fine", tensors).as_numpy("filled")[0]

    with triton.InferenceServerClient(shared_server.grpc_url) as client:
        together = fill(client, slice(None), 0, windows=spans)
        for start, fill_from in spans:
            seen = slice(start, start + layout.window)
            codes[:, seen] = fill(client, seen, fill_from)
        np.testing.assert_array_equal(together, codes)
        with pytest.raises(InferenceServerException, match="reach beyond the codes' 1074"):
            fill(client, slice(None), 0, windows=spans + 1)


def coarse_calls_of(server) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        found = re.search(r'^nv_inference_count{model="bark_coarse",.*} (\S+)$', page.read().decode(), re.MULTILINE)
    return float(found[1])


@pytest.mark.server
def test_the_limit_is_for_all_instances_of_bark(shared_server):
    """Which has two, of a limit of 16 together."""

    def ask(seed):
        try:
            with Client(shared_server.grpc_url) as client:
                return bool(len(client.speak("Yes.", voice="heart_0", seed=seed, max_seconds=1)))
        except BarkstreamError as error:
            return str(error)

    with ThreadPoolExecutor(20) as pool:
        said = list(pool.map(ask, range(20)))
    refused = [each for each in said if each is not True]
    assert len(refused) == 4
    assert all("all 16 streams of this server are busy" in each for each in refused)
    assert ask(1) is True


@pytest.mark.server
def test_in_a_crowd_a_first_chunk_is_held(shared_server):
    """Of a stream, and of nobody who waits for all of it."""
    ask = dict(voice="heart_0", seed=4, max_seconds=1)
    with Client(shared_server.grpc_url) as client, ThreadPoolExecutor(4) as pool:

        def first_after_s(**more):
            began = time.monotonic()
            next(iter(client.stream("Yes.", **ask, **more)))
            return time.monotonic() - began

        assert first_after_s() < HOLD_S
        assert min(pool.map(lambda _: first_after_s(), range(4))) >= HOLD_S
        assert min(pool.map(lambda _: first_after_s(streaming=False), range(4))) < HOLD_S


@pytest.mark.server
def test_a_server_whose_shared_process_is_killed_loses_no_stream(shared_server):
    with Client(shared_server.grpc_url) as client:
        stream = iter(client.stream("We walked along the river until the sun went down.", voice="heart_0", seed=4))
        chunks = [next(stream)]
        (process,) = shared_processes(shared_server.pid)
        os.kill(process, signal.SIGKILL)
        chunks += list(stream)
    assert sum(map(len, chunks)) > 24_000
