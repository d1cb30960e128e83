"""Claims about the whole service, on a live tritonserver with the embedded checkpoint."""

from __future__ import annotations

import re
import shutil
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from barkstream.clients import BarkstreamError, Client
from barkstream.clients.protocol import build_request
from barkstream.options import SpeechOptions
from barkstream.profiles import with_parameters
from barkstream.server import Server

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.server

TEXT = "Good morning, how are you today?"
MAX_STREAMS = 16  # bark/config.pbtxt


@pytest.fixture(scope="module")
def client(server):
    with Client(server.grpc_url) as client:
        yield client


def metrics(server) -> dict[str, float]:
    """Barkstream's metrics and Triton's execution counts, by name and labels."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def wait_until(condition, seconds=10.0):
    """Asks until it holds; the metrics have no way to tell us."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def test_speech_over_grpc_is_the_speech_of_the_library(client, pipeline, voices):
    streamed = client.speak(TEXT, voice="heart_0", seed=11)
    local = pipeline.speak(TEXT, SpeechOptions.parse({"seed": 11}), voices["heart_0"])
    assert streamed.shape == local.shape
    assert np.abs(streamed - local).mean() < 1e-3  # a near-tie may fall the other way with other thread counts


def test_the_first_chunk_comes_long_before_the_last(client):
    stream = client.stream(TEXT, voice="heart_0", seed=1)
    chunks = list(stream)
    assert len(chunks) >= 3
    assert stream.ttfa_s < 0.7 * stream.arrivals[-1].at_s
    assert all(chunk.dtype == np.float32 and np.abs(chunk).max() <= 1.5 for chunk in chunks)


def test_a_fresh_seed_is_told_and_says_the_same_again(client):
    stream = client.stream("Hello there.", voice="heart_0")
    first = np.concatenate(list(stream))
    np.testing.assert_allclose(client.speak("Hello there.", voice="heart_0", seed=stream.seed), first, atol=1e-5)


def test_streamed_and_offline_requests_say_the_same_tokens(client):
    prompts = []
    for streaming in (True, False):
        stream = client.stream(TEXT, voice="deep_1", seed=3, streaming=streaming, return_prompt=True)
        list(stream)
        prompts.append(stream.history_prompt)
    for name in ("semantic_prompt", "coarse_prompt"):
        np.testing.assert_array_equal(prompts[0][name], prompts[1][name])


def test_what_was_said_is_a_voice_for_what_comes(client):
    stream = client.stream(TEXT, seed=4, return_prompt=True)
    list(stream)
    prompt = stream.history_prompt
    assert {name: array.ndim for name, array in prompt.items()} == {
        "semantic_prompt": 1,
        "coarse_prompt": 2,
        "fine_prompt": 2,
    }
    np.testing.assert_array_equal(prompt["fine_prompt"][:2], prompt["coarse_prompt"])
    assert len(client.speak("And on it goes.", history_prompt=prompt, seed=4)) > 6000


def test_the_same_seed_says_the_same_alone_and_among_sixteen(server, client):
    def tokens(seed):
        stream = client.stream(
            TEXT, voice=("heart_0", "deep_0", None)[seed % 3], seed=seed, max_seconds=1.2, return_prompt=True
        )
        list(stream)
        return stream.history_prompt

    alone = [tokens(seed) for seed in range(0, MAX_STREAMS, 5)]
    before = metrics(server)
    with ThreadPoolExecutor(MAX_STREAMS) as pool:
        together = list(pool.map(tokens, range(MAX_STREAMS)))
    after = metrics(server)
    for expected, got in zip(alone, together[::5], strict=True):
        np.testing.assert_array_equal(got["semantic_prompt"], expected["semantic_prompt"])
        np.testing.assert_array_equal(got["coarse_prompt"], expected["coarse_prompt"])

    def growth(name):
        return sum(after[key] - before.get(key, 0) for key in after if key.startswith(name) and "bark_coarse" in key)

    assert growth("nv_inference_count") > 1.5 * growth("nv_inference_exec_count")  # Triton batched the streams' calls


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(text=""), "text is blank"),
        (dict(text=" \n\t "), "text is blank"),
        (dict(text="a" * 2_000_000), "at most 1,000,000 characters, got 2,000,000"),
        (dict(voice="hart_0"), "did you mean 'heart_0'"),
        (dict(temperature=float("nan")), "temperature must be at least 0 and at most 5, got nan"),
        (dict(temperature=-1.0), "temperature must be at least 0"),
        (dict(temperature=1e30), "at most 5"),
        (dict(top_k=0), "leave top_k out"),
        (dict(top_p=0.0), "top_p must be above 0"),
        (dict(top_p=2.0), "at most 1"),
        (dict(min_eos_p=0.0), "min_eos_p must be above 0"),
        (dict(max_seconds=-1.0), "max_seconds must be above 0"),
        (dict(seed=-5), "seed must be 0 to"),
    ],
)
def test_a_bad_request_is_refused_with_what_would_be_right(client, options, said):
    text = options.pop("text", TEXT)
    with pytest.raises(BarkstreamError) as refused:
        client.speak(text, **options)
    assert said in str(refused.value)
    assert refused.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("semantic_prompt", np.zeros((0,), np.int32), "not be empty"),
        ("semantic_prompt", np.full(300, 99_999, np.int32), "ids from 0 to"),
        ("coarse_prompt", np.zeros((3, 450), np.int32), r"shape \[2, n\]"),
        ("coarse_prompt", np.zeros((2, 10), np.int32), "cover the same time"),
        ("fine_prompt", np.zeros((8, 449), np.int32), "as many frames"),
    ],
)
def test_a_bad_history_prompt_is_refused(client, name, array, said):
    good = dict(
        semantic_prompt=np.zeros(300, np.int32),
        coarse_prompt=np.zeros((2, 450), np.int32),
        fine_prompt=np.zeros((8, 450), np.int32),
    )
    with pytest.raises(BarkstreamError, match=said):
        client.speak(TEXT, history_prompt={**good, name: array})


def ask(server, request: pb.ModelInferRequest) -> list[pb.ModelStreamInferResponse]:
    """All responses to one request, as they are on the wire."""
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return list(stub.ModelStreamInfer(iter([request]), timeout=60))


def is_final(response) -> bool:
    return response.infer_response.parameters["triton_final_response"].bool_param


@pytest.mark.parametrize("text", ["Hello there.", ""])
def test_every_request_ends_with_one_final_response(server, text):
    responses = ask(server, build_request(text, {"voice": "heart_0", "seed": 1}))
    assert [is_final(response) for response in responses] == [False] * (len(responses) - 1) + [True]


def test_text_that_is_not_utf8_is_refused(server):
    request = build_request("Hello", {})
    request.inputs[0].contents.bytes_contents[:] = []
    del request.raw_input_contents[:]
    request.inputs[0].contents.bytes_contents.append(b"caf\xe9")
    responses = ask(server, request)
    assert "text must be UTF-8" in responses[0].error_message
    assert is_final(responses[-1])


def test_several_texts_in_one_request_are_refused(server):
    with triton.InferenceServerClient(server.grpc_url) as raw:
        texts = triton.InferInput("text", [2], "BYTES")
        texts.set_data_from_numpy(np.array([b"one", b"two"], object))
        heard: list[str] = []
        done = threading.Event()

        def take(result, error):
            if error is not None:
                heard.append(str(error))
            done.set()

        raw.start_stream(take)
        raw.async_stream_infer("bark", [texts])
        assert done.wait(10)
    assert re.search(r"shape|one value", heard[0])


def test_leaving_the_loop_stops_the_work_and_frees_the_slots(server, client):
    before = metrics(server)["barkstream_cancelled_total"]
    for _ in client.stream("A very long sentence that goes on and on. " * 20, voice="heart_0"):
        break
    left = time.monotonic()
    wait_until(lambda: metrics(server)["barkstream_cancelled_total"] == before + 1)
    wait_until(lambda: metrics(server)["barkstream_semantic_kv_slots"] == 0)
    assert metrics(server)["barkstream_live_streams"] == 0
    assert metrics(server)["barkstream_coarse_kv_slots"] == 0
    assert time.monotonic() - left < 3  # the stage calls under way end first
    said = metrics(server)["barkstream_audio_seconds_total"]
    time.sleep(1)
    assert metrics(server)["barkstream_audio_seconds_total"] == said


def test_above_the_limit_a_request_is_refused_at_once(server, client):
    streams = [
        client.stream("This one takes its time to be spoken to the end.", voice="heart_0") for _ in range(MAX_STREAMS)
    ]
    with ThreadPoolExecutor(MAX_STREAMS) as pool:
        work = [pool.submit(lambda stream=stream: next(iter(stream), None)) for stream in streams]
        wait_until(lambda: metrics(server)["barkstream_live_streams"] == MAX_STREAMS)
        start = time.monotonic()
        with pytest.raises(BarkstreamError, match="all 16 streams of this server are busy") as refused:
            client.speak(TEXT)
        assert time.monotonic() - start < 1
        assert refused.value.status == "UNAVAILABLE"
        for stream in streams:
            stream.close()
        for future in work:
            future.exception()
    wait_until(lambda: metrics(server)["barkstream_live_streams"] == 0)


def test_a_server_that_owes_too_much_audio_refuses_until_it_has_caught_up(repository, tmp_path):
    shutil.copytree(repository, tmp_path, dirs_exist_ok=True, symlinks=True)
    config = tmp_path / "bark" / "config.pbtxt"
    # Far below a lead, 4 s, which one without audio lacks: the first one, made little faster than it plays, lacks more to its end.
    config.write_text(with_parameters(config.read_text(), {"max_backlog_s": "0.5"}))
    with Server(tmp_path) as owing, Client(owing.grpc_url) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.speak, "This one takes its time to be spoken to the end.", voice="heart_0")
        wait_until(lambda: metrics(owing)["barkstream_live_streams"] == 1)
        with pytest.raises(BarkstreamError, match="this server's streams lack more than 0.5 s of audio") as refused:
            client.speak(TEXT)
        assert refused.value.status == "UNAVAILABLE"
        assert refused.value.retry_after_s
        for lead_s in (1.0, float("nan")):  # who has too little in hand does not go on
            with pytest.raises(BarkstreamError, match="streams lack more than 0.5 s"):
                client.speak(TEXT, lead_s=lead_s)
        assert len(client.speak(TEXT, voice="heart_0", lead_s=3.0, max_seconds=1))
        assert len(first.result())
        assert len(client.speak(TEXT, voice="heart_0"))
        assert metrics(owing)["barkstream_refused_total"] == 3


def test_a_stage_is_a_pure_function_that_anyone_may_call(server, pipeline):
    layout = pipeline.checkpoint.coarse
    prefix = np.array([[*range(200), layout.infer, layout.first_id, layout.first_id + layout.codebook_size]], np.int32)
    first, second = (coarse_call(server, prefix, stream) for stream in (0, 123))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (1, 6)


def test_a_bad_stage_call_is_refused(server):
    with pytest.raises(triton.InferenceServerException, match="prefix ids must be 0 to"):
        coarse_call(server, np.array([[10**6]], np.int32), 0)
    with pytest.raises(triton.InferenceServerException, match="positions, got 2005"):
        coarse_call(server, np.zeros((1, 2000), np.int32), 0)


def test_a_chain_is_one_call_of_the_coarse_stage_and_says_what_single_windows_say(server, pipeline):
    layout, rng = pipeline.checkpoint.coarse, np.random.default_rng(4)
    heads = np.append(rng.integers(0, 500, (3, 256)), np.full((3, 1), layout.infer), axis=1).astype(np.int32)
    one_by_one = np.zeros((1, 0), np.int32)
    for head, n, n_history in zip(heads, (60, 60, 22), (630, 630, 80), strict=True):
        prefix = np.append(head, one_by_one[:, -n_history:])[None].astype(np.int32)
        said = coarse_call(server, prefix, 5, n, position=one_by_one.shape[1])
        one_by_one = np.append(one_by_one, said, axis=1)
    behind = dict(heads=heads[None, 1:], windows=np.array([[[60, 630], [22, 80]]], np.int32))
    chained = coarse_call(server, heads[:1], 0, 142, **behind)
    np.testing.assert_array_equal(chained, one_by_one)
    with pytest.raises(triton.InferenceServerException, match=r"heads must be \[k, 257\], got \[2, 256\]"):
        coarse_call(server, heads[:1], 0, 142, **behind | dict(heads=heads[None, 1:, :256]))
    with pytest.raises(triton.InferenceServerException, match=r"windows must be \[2, 2\], .* got \[1, 2\]"):
        coarse_call(server, heads[:1], 0, 142, **behind | dict(windows=behind["windows"][:, 1:]))
    with pytest.raises(triton.InferenceServerException, match="heads and windows .* give both, or neither"):
        coarse_call(server, heads[:1], 0, 142, heads=behind["heads"])


def test_calls_share_a_batch_with_those_that_chain_as_many_windows(server, pipeline):
    """So nobody's next window waits for the end of a long chain: a batch is answered when all of it is there."""
    infer, rng = pipeline.checkpoint.coarse.infer, np.random.default_rng(4)

    def heads(n):
        return np.append(rng.integers(0, 500, (n, 256)), np.full((n, 1), infer), axis=1).astype(np.int32)

    def ask(k):
        behind = dict(heads=heads(k)[None], windows=np.array([[[60, 630]] * k], np.int32)) if k else {}
        return coarse_call(server, heads(1), 0, 2 + 60 * k, position=58, **behind)

    def n_batches(*n_chained):
        """Of calls that wait together for the stage's one instance."""
        with ThreadPoolExecutor(1 + len(n_chained)) as pool:
            long = pool.submit(coarse_call, server, heads(1), 0, 760)  # as many as fit, 1.5 s on two cores
            time.sleep(0.1)
            before = metrics(server)
            for answer in [pool.submit(ask, k) for k in n_chained]:
                assert answer.result().shape[1]
            long.result()
        growth = lambda name: executed(metrics(server), name) - executed(before, name)  # noqa: E731
        wait_until(lambda: growth("nv_inference_count") == 1 + len(n_chained))
        return growth("nv_inference_exec_count") - 1

    assert n_batches(0, 0, 0) == 1 and n_batches(1, 1, 1) == 1
    assert n_batches(0, 1) == n_batches(1, 2) == 2


def executed(found, name):
    return sum(value for key, value in found.items() if key.startswith(name + "{") and "bark_coarse" in key)


def coarse_call(server, prefix, stream, n_tokens=6, position=0, **more):
    values = dict(
        prefix=prefix,
        n_tokens=np.array([[n_tokens]], np.int32),
        position=np.array([[position]], np.int32),
        seed=np.array([[1]], np.int64),
        temperature=np.array([[0.7]], np.float32),
        top_k=np.array([[0]], np.int32),
        top_p=np.array([[1.0]], np.float32),
        stream=np.array([[stream]], np.int64),
        **more,
    )
    inputs = []
    for name, array in values.items():
        tensor = triton.InferInput(name, array.shape, TYPES[array.dtype])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    with triton.InferenceServerClient(server.grpc_url) as raw:
        return raw.infer("bark_coarse", inputs).as_numpy("tokens")


TYPES = {np.dtype(np.int32): "INT32", np.dtype(np.int64): "INT64", np.dtype(np.float32): "FP32"}


def test_the_repository_that_make_exports_speaks():
    """With 8-bit weights, as users have it; the other tests run in float32."""
    with Server(ROOT / "model_repository") as server, Client(server.grpc_url) as client:
        assert 1 < len(client.speak(TEXT, voice="heart_0", seed=1)) / client.sample_rate < 5
