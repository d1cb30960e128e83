"""Claims about the clients and the command line: first without a server, then on a live one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import wave
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from barkstream.clients import AsyncClient, BarkstreamError, Client
from barkstream.clients.cli import main
from barkstream.clients.playback import Arrival, simulate_playback, time_to_first_audio
from barkstream.clients.plot import plot_speech, spectrogram_db
from barkstream.clients.protocol import Received, build_request
from barkstream.clients.wav import write_wav
from barkstream.server import Server

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Good morning, how are you today?"
LONG_TEXT = "And so it went on and on, all through the day and the night. " * 20
RATE = 1000  # Hz: a sample is a millisecond


# --- a player's clock -----------------------------------------------------------------------------------------------


def arrivals(*chunks: tuple[float, int]) -> list[Arrival]:
    return [Arrival(at_s, n_samples, 0.5) for at_s, n_samples in chunks]


def test_chunks_in_time_are_no_underrun():
    playback = simulate_playback(arrivals((0.5, 400), (0.8, 400), (1.3, 400)), RATE)
    assert (playback.n_underruns, playback.underrun_s) == (0, 0)
    assert playback.smallest_lead_s == pytest.approx(0.0)


def test_a_late_chunk_is_an_underrun_as_long_as_it_is_late_and_moves_the_clock():
    playback = simulate_playback(arrivals((0.5, 400), (1.0, 400), (1.3, 400), (2.0, 100)), RATE)
    assert playback.n_underruns == 2  # due at .9, 1.4, 1.8
    assert playback.underrun_s == pytest.approx(0.1 + 0.2)
    assert playback.smallest_lead_s == pytest.approx(-0.2)


def test_one_chunk_or_none_cannot_run_dry():
    for chunks in (arrivals((3.0, 10)), []):
        assert simulate_playback(chunks, RATE).n_underruns == 0
        assert simulate_playback(chunks, RATE).smallest_lead_s is None


def test_a_silent_first_chunk_is_not_the_first_audio():
    assert time_to_first_audio([Arrival(0.1, 300, 1e-4), Arrival(0.4, 300, 0.2)]) == 0.4
    assert time_to_first_audio([Arrival(0.1, 300, 0.0)]) is None


# --- files ----------------------------------------------------------------------------------------------------------


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()


def test_a_wav_holds_the_samples_and_clips_beyond_one(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([0, 0.5, -1, 1, 7, -7], np.float32), 24_000)
    samples, rate = read_wav(tmp_path / "a.wav")
    assert rate == 24_000
    assert samples.tolist() == [0, 16384, -32767, 32767, 32767, -32767]


def test_a_plot_is_a_png_of_a_whole_stream(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000).astype(np.float32)
    plot_speech(tmp_path / "a.png", tone, [Arrival(0.3, 9600, 1), Arrival(0.6, 14_400, 1)], 24_000, "a $title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_spectrogram_shows_a_tone_where_it_is():
    tone = np.sin(2 * np.pi * 3000 * np.arange(24_000) / 24_000).astype(np.float32)
    picture = spectrogram_db(tone, 24_000)
    loudest = picture[:, picture.shape[1] // 2].argmax() / (picture.shape[0] - 1) * 12_000
    assert loudest == pytest.approx(3000, abs=32)


# --- a request and its responses ------------------------------------------------------------------------------------


def test_options_that_are_none_are_not_sent():
    request = build_request("Hello", {"voice": None, "seed": 0, "temperature": None, "streaming": False})
    assert [tensor.name for tensor in request.inputs] == ["text", "seed", "streaming"]


def test_an_option_that_does_not_exist_is_a_type_error():
    with pytest.raises(TypeError, match="no option 'temprature'"):
        Client().stream("Hello", temprature=1.0)


def test_strings_go_one_by_one_and_speakers_with_their_voices():
    request = build_request("Hello", {"language": "de", "speakers": {"Ann": "heart_0", "B": None}, "normalize": True})
    assert [(tensor.name, list(tensor.shape)) for tensor in request.inputs] == [
        ("text", [1]), ("language", [1]), ("speakers", [2]), ("normalize", [1]),
    ]  # fmt: skip
    assert request.raw_input_contents[2] == b"\x0b\0\0\0Ann=heart_0\x02\0\0\0B="


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2**40},
        {"top_k": 1.5},
        {"top_k": True},
        {"seed": 2**63},
        {"temperature": "warm"},
        {"streaming": 1},
    ],
)
def test_what_does_not_fit_on_the_wire_is_refused_by_name(options):
    with pytest.raises(BarkstreamError, match=f"{next(iter(options))} must be one") as refused:
        build_request("Hello", options)
    assert refused.value.status == "INVALID_ARGUMENT"


def test_a_history_prompt_is_a_mapping_or_its_file(tmp_path):
    prompt = {
        "semantic_prompt": np.arange(3),
        "coarse_prompt": np.zeros((2, 4), np.int64),
        "fine_prompt": np.ones((8, 4), np.int32),
    }
    np.savez(tmp_path / "voice.npz", **prompt)
    sent = build_request("Hello", {"history_prompt": prompt})
    assert sent == build_request("Hello", {"history_prompt": tmp_path / "voice.npz"})
    assert [list(tensor.shape) for tensor in sent.inputs[1:]] == [[3], [2, 4], [8, 4]]
    assert {tensor.datatype for tensor in sent.inputs[1:]} == {"INT32"}


def test_a_history_prompt_that_is_none_is_refused(tmp_path):
    (tmp_path / "voice.npz").write_text("not a voice")
    floats = {name: np.zeros(3) for name in ("semantic_prompt", "coarse_prompt", "fine_prompt")}
    for prompt, said in [
        (tmp_path / "voice.npz", "is no history prompt"),
        (tmp_path / "none.npz", "No such file"),
        ({"semantic_prompt": np.zeros(3, int)}, "lacks coarse_prompt, fine_prompt"),
        (floats, "semantic_prompt must hold 32-bit integers, not float64"),
    ]:
        with pytest.raises(BarkstreamError, match=said):
            build_request("Hello", {"history_prompt": prompt})


def response(audio: list[float] | None = None, error: str = "", final: bool = False) -> pb.ModelStreamInferResponse:
    message = pb.ModelStreamInferResponse(error_message=error)
    message.infer_response.parameters["triton_final_response"].bool_param = final
    if audio is not None:
        message.infer_response.outputs.add(name="audio", datatype="FP32", shape=[len(audio)])
        message.infer_response.raw_output_contents.append(np.array(audio, np.float32).tobytes())
    return message


def test_a_stream_that_ends_without_final_raises():
    received = Received()
    assert received._take(response([0.25, -0.5]), 1.0).tolist() == [0.25, -0.5]
    with pytest.raises(BarkstreamError, match="before the speech was complete"):
        received._finish()


def test_an_error_response_carries_its_status_before_the_sentence():
    for message, sentence, status in [
        ("INVALID_ARGUMENT: text is blank", "text is blank", "INVALID_ARGUMENT"),
        ("UNAVAILABLE: all streams are busy", "all streams are busy", "UNAVAILABLE"),
        ("unexpected inference input 'x'", "unexpected inference input 'x'", "UNKNOWN"),
    ]:
        received = Received()
        received._take(response(error=message), 1.0)
        received._take(response(final=True), 1.1)
        with pytest.raises(BarkstreamError) as raised:
            received._finish()
        assert (str(raised.value), raised.value.status) == (sentence, status)


# --- servers that are not there --------------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def mute_port():
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def speak_async(client: AsyncClient, *args, **options):
    async with client:
        return await client.speak(*args, **options)


def test_where_no_server_is_the_request_raises_at_once(closed_port):
    url, start = f"127.0.0.1:{closed_port}", time.monotonic()
    for ask in (
        lambda: Client(url).speak("Hello"),
        lambda: Client(url).sample_rate,
        lambda: asyncio.run(speak_async(AsyncClient(url), "Hello")),
    ):
        with pytest.raises(BarkstreamError, match=f"no Barkstream server answers at {url}") as raised:
            ask()
        assert raised.value.status == "UNAVAILABLE"
    assert time.monotonic() - start < 10


def test_a_server_that_says_nothing_raises_after_the_stall_timeout(mute_port):
    url = f"127.0.0.1:{mute_port}"
    for ask in (
        lambda: Client(url, stall_timeout_s=0.3).speak("Hello"),
        lambda: asyncio.run(speak_async(AsyncClient(url, stall_timeout_s=0.3), "Hello")),
    ):
        start = time.monotonic()
        with pytest.raises(BarkstreamError, match="no answer from the server for 0.3 s") as raised:
            ask()
        assert raised.value.status == "DEADLINE_EXCEEDED"
        assert time.monotonic() - start < 5


# --- the command line ------------------------------------------------------------------------------------------------


def run_cli(*arguments: str) -> subprocess.Popen[str]:
    """`barkstream ...` as a process of its own."""
    command = [sys.executable, "-m", "barkstream.clients.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "arguments",
    [[], ["sing"], ["say", "Hello", "--temprature", "1"], ["say", "Hello", "--seed", "x"], ["serve", "--port", "x"]],
)
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: barkstream" in capsys.readouterr().err


def test_a_failure_is_one_sentence_and_exits_with_one(tmp_path, closed_port, capsys):
    url = f"127.0.0.1:{closed_port}"
    for arguments, said in [
        (["say", "Hello", "--url", url, "-o", str(tmp_path / "a.wav")], f"no Barkstream server answers at {url}"),
        (["say", "Hello", "-o", str(tmp_path / "no/a.wav")], "there is no folder"),
        (
            ["say", "Hello", "--url", url, "--history-prompt", str(tmp_path / "x.npz")],
            "no Barkstream server|no history",
        ),
        (["voices", "--model-repository", str(tmp_path)], "no voices in"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("barkstream: ")
        assert error.count("\n") == 1
        assert any(part in error for part in said.split("|"))
    assert not (tmp_path / "a.wav").exists()


def test_plotting_without_matplotlib_is_refused_before_any_work(tmp_path, closed_port, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["say", "Hello", "--url", f"127.0.0.1:{closed_port}", "--plot", str(tmp_path / "a.png")]) == 1
    assert "pip install 'barkstream[plot]'" in capsys.readouterr().err


def test_voices_are_listed_by_name(repository, capsys):
    assert main(["voices", "--model-repository", str(repository)]) == 0
    assert first_voice(repository) in capsys.readouterr().out.splitlines()


def test_a_reader_that_leaves_is_no_traceback(repository):
    process = run_cli("voices", "--model-repository", str(repository))
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1


def test_export_has_its_own_arguments(capsys):
    with pytest.raises(SystemExit) as left:
        main(["export", "--help"])
    assert left.value.code == 0
    assert "usage: barkstream export" in capsys.readouterr().out


# --- a live server ---------------------------------------------------------------------------------------------------


def first_voice(repository: Path) -> str:
    return min(path.stem for path in (repository / "bark/1/voices").glob("*.npz"))


@pytest.fixture(scope="module")
def voice(repository) -> str:
    return first_voice(repository)


@pytest.fixture
def client(server):
    with Client(server.grpc_url) as client:
        yield client


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def one_cancelled(server: Server):
    """The block leaves exactly one request, and the server notices."""
    before = metric(server, "barkstream_cancelled_total")
    yield
    end = time.monotonic() + 10
    while metric(server, "barkstream_cancelled_total") < before + 1 or metric(server, "barkstream_live_streams"):
        assert time.monotonic() < end, "the server did not hear that the client left"
        time.sleep(0.05)  # a metrics page has no way to tell us
    assert metric(server, "barkstream_cancelled_total") == before + 1


@pytest.mark.server
def test_a_stream_knows_its_seed_its_chunks_and_its_rate(client, voice):
    stream = client.stream(TEXT, voice=voice, max_seconds=2.0)
    chunks = list(stream)
    assert all(chunk.dtype == np.float32 and chunk.ndim == 1 and chunk.flags.writeable for chunk in chunks)
    assert [arrival.n_samples for arrival in stream.arrivals] == [len(chunk) for chunk in chunks]
    assert stream.seed >= 0
    assert 0 < stream.arrivals[0].at_s <= stream.ttfa_s
    assert client.sample_rate == 24_000
    assert stream.history_prompt is None
    with pytest.raises(RuntimeError, match="read already"):
        list(stream)


@pytest.mark.server
def test_speaking_is_streaming_joined(client, voice):
    whole = client.speak(TEXT, voice=voice, seed=5, max_seconds=1.5)
    chunks = list(client.stream(TEXT, voice=voice, seed=5, max_seconds=1.5))
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-4)


@pytest.mark.server
def test_async_says_the_same_as_sync_for_the_same_seed(server, client, voice):
    expected = client.speak(TEXT, voice=voice, seed=7, max_seconds=1.5)
    got = asyncio.run(speak_async(AsyncClient(server.grpc_url), TEXT, voice=voice, seed=7, max_seconds=1.5))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.server
def test_one_async_client_carries_several_streams_at_once(server, voice):
    async def collected():
        async with AsyncClient(server.grpc_url) as client:
            streams = [client.stream(TEXT, voice=voice, seed=seed, max_seconds=1.0) for seed in (1, 2)]

            async def read(stream):
                return [chunk async for chunk in stream]

            parts = await asyncio.gather(*map(read, streams))
            return await client.sample_rate(), [stream.seed for stream in streams], [len(part) for part in parts]

    rate, seeds, n_chunks = asyncio.run(collected())
    assert (rate, seeds) == (24_000, [1, 2])
    assert min(n_chunks) >= 1


def by_break(stream):
    for _ in stream:
        break


def by_an_exception(stream):
    with contextlib.suppress(ZeroDivisionError):
        for _ in stream:
            1 / 0  # noqa: B018


def by_closing(stream):
    for _ in stream:
        stream.close()  # the loop ends by itself


def by_dropping_the_iterator(stream):
    chunks = iter(stream)
    next(chunks)
    del chunks


def by_closing_from_another_thread(stream):
    threading.Timer(0.3, stream.close).start()
    for _ in stream:
        pass


@pytest.mark.server
@pytest.mark.parametrize(
    "leave", [by_break, by_an_exception, by_closing, by_dropping_the_iterator, by_closing_from_another_thread]
)
def test_leaving_the_loop_cancels(server, client, voice, leave):
    stream = client.stream(LONG_TEXT, voice=voice)  # kept: what cancels is leaving, not forgetting it
    with one_cancelled(server):
        leave(stream)
    assert stream.seed is None or stream.seed >= 0


@pytest.mark.server
def test_turns_language_and_numbers_are_the_servers_to_read(client, voice):
    play = "A: It is 5 o'clock.\nB: No."
    heard = client.speak(play, speakers={"A": voice.upper(), "B": None}, language="en", normalize=True, seed=1)
    assert heard.size > client.sample_rate
    for wrong, said in [
        ({"speakers": {"A": "nobody"}}, "no voice 'nobody'"),
        ({"language": "xx"}, "must be one of de"),
    ]:
        with pytest.raises(BarkstreamError, match=said) as refused:
            client.speak(play, **wrong)
        assert refused.value.status == "INVALID_ARGUMENT"


@pytest.mark.server
def test_a_guard_counts_what_it_does(server, client, voice):
    assert client.speak(TEXT, voice=voice, seed=5, guard=True).size > client.sample_rate
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        text = page.read().decode()
    for fault in ("runaway", "loop", "silence", "noise"):
        assert re.search(rf'barkstream_guard_total{{[^}}]*fault="{fault}"', text)


async def async_by_break(stream):
    async for _ in stream:
        break


async def async_by_closing(stream):
    async for _ in stream:
        stream.close()


async def async_by_cancelling_the_task(stream):
    first = asyncio.Event()

    async def listen():
        async for _ in stream:
            first.set()

    task = asyncio.create_task(listen())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.server
@pytest.mark.parametrize("leave", [async_by_break, async_by_closing, async_by_cancelling_the_task])
def test_leaving_an_async_loop_cancels_while_the_client_lives_on(server, voice, leave):
    before = metric(server, "barkstream_cancelled_total")

    async def leave_then_go_on():
        async with AsyncClient(server.grpc_url) as client:
            stream = client.stream(LONG_TEXT, voice=voice)
            await leave(stream)
            return await client.speak("Hello.", voice=voice, seed=1, max_seconds=1.0)

    assert asyncio.run(leave_then_go_on()).size
    assert metric(server, "barkstream_cancelled_total") == before + 1


@pytest.mark.server
def test_an_unknown_voice_reaches_the_caller_with_the_servers_sentence(server, client, voice):
    for ask in (
        lambda: client.speak(TEXT, voice=f"{voice}x"),
        lambda: asyncio.run(speak_async(AsyncClient(server.grpc_url), TEXT, voice=f"{voice}x")),
    ):
        with pytest.raises(BarkstreamError, match=f"no voice '{voice}x'; did you mean '{voice}'") as refused:
            ask()
        assert refused.value.status == "INVALID_ARGUMENT"


@pytest.mark.server
def test_a_server_that_dies_in_mid_speech_raises_and_does_not_hang(repository, voice):
    with Server(repository) as doomed, Client(doomed.grpc_url) as client:
        chunks = iter(client.stream(LONG_TEXT, voice=voice))
        assert next(chunks).size
        doomed.stop()
        with pytest.raises(BarkstreamError) as raised:
            list(chunks)
        assert raised.value.status in ("UNAVAILABLE", "INTERNAL", "CANCELLED")
        with pytest.raises(BarkstreamError, match="no Barkstream server answers"):
            client.speak(TEXT)


@pytest.mark.server
def test_the_command_line_writes_a_playable_wav_and_says_how_it_went(server, voice, tmp_path, capsys):
    out = tmp_path / "a.wav"
    options = ["--url", server.grpc_url, "--voice", voice, "--seed", "3", "--max-seconds", "2", "-o", str(out)]
    assert main(["say", TEXT, *options, "--json", "--plot", str(tmp_path / "a.png")]) == 0
    printed = capsys.readouterr()
    measured = json.loads(printed.out)
    samples, rate = read_wav(out)
    assert rate == 24_000
    assert (
        measured["audio_s"]
        == pytest.approx(len(samples) / rate, abs=1e-3)
        == pytest.approx(sum(measured["chunks_s"]), abs=1e-2)
    )
    assert np.abs(samples).max() > 1000
    assert measured["seed"] == 3
    assert measured["ttfa_ms"] >= measured["first_chunk_ms"] > 0
    assert printed.err.count("s of speech") == measured["n_chunks"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.server
def test_a_text_from_standard_input_and_a_voice_kept_for_the_next(server, tmp_path, capsys, monkeypatch):
    options = ["--url", server.grpc_url, "--seed", "4", "--max-seconds", "2", "-o", str(tmp_path / "a.wav")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert main(["say", "-", *options, "--save-voice", str(tmp_path / "me.npz")]) == 0
    assert "seed       4" in capsys.readouterr().out
    assert main(["say", TEXT, *options, "--history-prompt", str(tmp_path / "me.npz")]) == 0


@pytest.mark.server
def test_the_servers_refusal_is_the_command_lines_sentence(server, tmp_path, capsys):
    blank = ["say", " ", "--url", server.grpc_url, "-o", str(tmp_path / "a.wav")]
    assert main(blank) == 1
    assert capsys.readouterr().err.startswith("barkstream: text is blank")
    assert not (tmp_path / "a.wav").exists()


@pytest.mark.server
def test_ctrl_c_ends_the_command_and_the_request_quietly(server, voice, tmp_path):
    with one_cancelled(server):
        arguments = ["say", LONG_TEXT, "--url", server.grpc_url, "--voice", voice, "-o", str(tmp_path / "a.wav")]
        process = run_cli(*arguments)
        assert "s of speech" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=30)[1]
    assert process.returncode == 130


@pytest.mark.server
def test_the_ttfa_benchmark_keeps_failures_in_its_table(server, voice):
    script = [sys.executable, str(ROOT / "perf/ttfa.py"), "--url", server.grpc_url, "--n", "1", "--text", "short"]
    result = subprocess.run(
        [*script, "--voice", voice, "--voice", "nobody"], capture_output=True, text=True, timeout=200
    )
    good, bad = json.loads(result.stdout.splitlines()[-1])["cases"]
    assert (good["n_failed"], bad["n_failed"]) == (0, 1)
    assert good["ttfa_ms_p50"] > 0
    assert bad["ttfa_ms_p50"] is None
    assert "no voice 'nobody'" in bad["errors"][0]
    assert result.returncode == 1
