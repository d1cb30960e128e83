"""Claims about the HTTP gateway: first without a speech server, then on a live one, spoken to by OpenAI's own client."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

pytest.importorskip("av", reason="the gateway extra is not installed: make .venv/gateway")
openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: make .venv/test")
from decode import RATE, decode  # noqa: E402
from gateways import metrics, one_more_cancelled, running_gateway, scripted_server, wait_until  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from barkstream.clients import Client  # noqa: E402
from barkstream.clients.aio import AsyncClient  # noqa: E402
from barkstream.clients.cli import main  # noqa: E402
from barkstream.clients.encode import FORMATS  # noqa: E402
from barkstream.clients.gateway.access import RateLimiter  # noqa: E402
from barkstream.clients.gateway.conversation import Turn, Voicing  # noqa: E402
from barkstream.clients.gateway.errors import ApiError, from_server  # noqa: E402
from barkstream.clients.gateway.sentences import SentenceBuffer  # noqa: E402
from barkstream.clients.gateway.settings import read_keys  # noqa: E402
from barkstream.clients.gateway.voices import OPENAI_VOICES, alias_voices  # noqa: E402
from barkstream.clients.protocol import BarkstreamError, Options  # noqa: E402
from barkstream.options import Schedule  # noqa: E402
from barkstream.text import PARAGRAPH_PAUSE, split_sentences  # noqa: E402
from barkstream.voices import list_voices  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Good morning, how are you today?"
LONG_TEXT = "And so it went on and on, all through the day and the night. " * 20
SPEECH = "/v1/audio/speech"
GOOD = {"model": "bark", "input": TEXT, "voice": "heart_0"}


# --- sentences of a text that is still being written ----------------------------------------------------------------


def english(text: str) -> str:
    return "en"


@pytest.mark.parametrize("n_letters", [1, 3, 50])
@pytest.mark.parametrize(
    "text",
    [
        "It costs 3.14 dollars, e.g. this one. Is that much? I do not think so! And on",
        "“Go away, all of you!” she said. “Now!” And then... she left. No. Yes. Well, who knows what comes?",
        "Chapter 1\n\nIt was a dark and stormy night.\n\n- One\n- Two\n- Three of them\n\nThe end of it all.",
        "今天天气很好，我们去公园走走。「你明天还会再来这里吗？」",
        "M. Dupont est arrivé ce matin. « Bonjour ! » dit-il à tout le monde.",
        "and then there was another thing to say, " * 12,
    ],
)
def test_piece_by_piece_gives_the_sentences_and_pauses_of_the_whole(text, n_letters):
    buffer = SentenceBuffer(english)
    pieces = [text[i : i + n_letters] for i in range(0, len(text), n_letters)]
    given = [sentence for piece in pieces for sentence in buffer.push(piece)]
    whole = list(split_sentences(text))
    assert given == whole[:-1]
    assert buffer.flush() == whole[-1:]
    assert len(buffer) == 0
    assert buffer.flush() == []


def test_a_sentence_is_given_when_the_next_begins():
    buffer = SentenceBuffer(english)
    assert buffer.push("This is the very first one. ") == []
    assert [sentence.text for sentence in buffer.push("T")] == ["This is the very first one."]


def test_a_text_is_read_in_the_language_of_its_session():
    german = "Das war am 3. Oktober bei uns. Danach ging er."
    voicing = Voicing.parse({"voice": "v2/de_speaker_3"}, {})
    buffer = SentenceBuffer(voicing.language_of)
    assert [sentence.text for sentence in buffer.push(german)] == ["Das war am 3. Oktober bei uns."]
    assert Voicing.parse({"voice": "v2/de_speaker_3", "language": "fr"}, {}).language_of(german) == "fr"
    assert voicing.language_of("今日はとてもいい天気ですね。") == "ja"


# --- who may speak, and how often -----------------------------------------------------------------------------------


def test_a_bucket_empties_refills_and_is_forgotten():
    now = [100.0]
    limiter = RateLimiter(3, clock=lambda: now[0])
    for _ in range(3):
        limiter.admit("a")
    limiter.admit("b")
    with pytest.raises(ApiError) as refused:
        limiter.admit("a")
    assert refused.value.status == 429
    assert refused.value.headers["Retry-After"] == "20"
    now[0] += 20
    limiter.admit("a")
    now[0] += 1000
    limiter.admit("c")
    assert list(limiter._full_at) == ["c"]


def test_a_file_of_keys_must_hold_one(tmp_path):
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert read_keys(tmp_path / "keys") == ("one", "two")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_keys(tmp_path / "keys")


def test_openais_voices_stand_for_presets_english_ones_first():
    assert alias_voices([]) == {}
    assert set(alias_voices(["v2/de_speaker_0", "v2/en_speaker_0"]).values()) == {"v2/en_speaker_0"}
    assert alias_voices(["a", "b"])["ash"] == "b"
    assert "alloy" not in alias_voices(["alloy"])


@pytest.mark.parametrize(
    ("status", "ready", "answer"),
    [
        ("INVALID_ARGUMENT", True, 400),
        ("UNAVAILABLE", True, 429),
        ("UNAVAILABLE", False, 503),
        ("UNKNOWN", False, 503),
        ("DEADLINE_EXCEEDED", True, 504),
        ("INTERNAL", True, 500),
    ],
)
def test_what_went_wrong_upstream_has_its_status(status, ready, answer):
    assert from_server(BarkstreamError("it went wrong", status), ready).status == answer


def test_a_full_servers_own_guess_is_when_to_come_back():
    busy = BarkstreamError("all 16 streams of this server are busy; retry after 7 s", "UNAVAILABLE")
    assert from_server(busy, True).headers["Retry-After"] == "7"


# --- a gateway without a speech server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """HTTP client of a gateway whose speech server is not there."""
    repository = tmp_path_factory.mktemp("empty")
    with running_gateway(repository=repository, max_body_bytes=10_000) as url, httpx.Client(base_url=url) as http:
        yield http


def error_of(response: httpx.Response) -> dict:
    """The error in OpenAI's shape, all of whose fields must be there."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"model": "gpt-9"}, "model", "must be one of bark"),
        ({"model": None}, "model", "must be one of bark"),
        ({"input": None}, "input", "some words to say"),
        ({"input": " \n"}, "input", "some words to say"),
        ({"input": "a" * 4097}, "input", "at most 4,096 characters, got 4,097"),
        ({"voice": 3}, "voice", "a name from /v1/audio/voices"),
        ({"response_format": "midi"}, "response_format", "mp3, opus"),
        ({"response_format": ["mp3"]}, "response_format", "mp3, opus"),
        ({"stream_format": "tape"}, "stream_format", "audio, sse"),
        ({"speed": 5}, "speed", "from 0.25 to 4"),
        ({"speed": "fast"}, "speed", "from 0.25 to 4"),
        ({"instructions": "sound sad"}, "instructions", "follows no instructions"),
        ({"seed": 1.5}, "seed", "a whole number"),
        ({"seed": True}, "seed", "a whole number"),
        ({"seed": 2**70}, "seed", "seed must be one int64"),
        ({"top_p": "half"}, "top_p", "a number"),
        ({"top_p": float("nan")}, "top_p", "a number"),
        ({"temperature": 10**400}, "temperature", "a number"),
        ({"guard": "yes"}, "guard", "true or false"),
        ({"normalize": 1}, "normalize", "true or false"),
        ({"language": ["de"]}, "language", "a text"),
        ({"speakers": ["A"]}, "speakers", "an object"),
        ({"speakers": {"A": 1}}, "speakers", "a name from /v1/audio/voices"),
        ({"temprature": 1}, "temprature", "no field 'temprature'"),
        ({"input": "\ud800"}, None, "lone surrogate"),
    ],
)
def test_a_bad_field_is_named_with_what_would_be_right(scripted, change, param, said):
    response = scripted.post(
        SPEECH, content=json.dumps({**GOOD, **change}), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert said in error_of(response)["message"]
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", ["", "{", "[]", '"hello"', "\xff", "[" * 9000])
def test_a_body_that_is_no_json_object_is_refused(alone, body):
    response = alone.post(SPEECH, content=body.encode("latin-1"), headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


def test_other_wrong_requests_have_their_own_status(alone):
    assert alone.post(SPEECH, content=json.dumps(GOOD)).status_code == 415  # what a page of another site may send
    assert alone.post(SPEECH, json={**GOOD, "input": "a" * 10_001}).status_code == 413
    assert alone.get(SPEECH).status_code == 405
    assert alone.get("/v1/nothing").status_code == 404
    assert alone.get("/v1/models/gpt-9").status_code == 404
    for response in (alone.get(SPEECH), alone.get("/v1/nothing"), alone.get("/page/../settings.py")):
        error_of(response)


def test_until_the_server_is_ready_the_answer_is_503(alone):
    for response in (alone.get("/health"), alone.post(SPEECH, json=GOOD)):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["code"] == "not_ready"


def test_no_page_of_another_site_may_call_unless_it_is_allowed(alone):
    there = {"origin": "https://there.example"}
    assert "access-control-allow-origin" not in alone.get("/v1/models", headers=there).headers
    with running_gateway(cors_origins=("https://there.example",)) as url, httpx.Client(base_url=url) as http:
        assert http.get("/v1/models", headers=there).headers["access-control-allow-origin"] == there["origin"]
        other = {"origin": "https://other.example"}
        assert "access-control-allow-origin" not in http.get("/v1/models", headers=other).headers
        asked = {**there, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        assert http.options(SPEECH, headers=asked).status_code == 200


def test_with_keys_the_api_needs_one_and_the_page_does_not():
    with running_gateway(api_keys=("first", "second")) as url, httpx.Client(base_url=url) as http:
        for header in (
            {},
            {"authorization": "Bearer third"},
            {"authorization": "Basic first"},
            {"authorization": "Bearer"},
        ):
            refused = http.post(SPEECH, json=GOOD, headers=header)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"authorization": "Bearer second"}).status_code == 200
        assert http.get("/").status_code == 200
        assert http.get("/health").status_code == 503
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        with pytest.raises(InvalidStatus, match="401"):
            connect(socket_of(url))


def test_above_the_rate_a_caller_is_told_to_wait():
    with running_gateway(requests_per_minute=2) as url, httpx.Client(base_url=url) as http:
        assert [http.post(SPEECH, json=GOOD).status_code for _ in range(3)] == [503, 503, 429]
        refused = http.post(SPEECH, json=GOOD)
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert http.get("/v1/models").status_code == 200


def test_a_websocket_from_another_site_is_refused(alone):
    with pytest.raises(InvalidStatus, match="403"):
        connect(socket_of(str(alone.base_url)), origin="https://there.example")


def socket_of(url: str) -> str:
    return url.replace("http://", "ws://").rstrip("/") + f"{SPEECH}/stream"


# --- a speech server that fails half-way ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripted():
    """HTTP client of a gateway whose speech server sends a second of a tone, and then an error."""
    with (
        scripted_server("INTERNAL: bark_fine failed: out of luck") as server,
        running_gateway(url=server) as url,
        httpx.Client(base_url=url) as http,
    ):
        yield http


def test_audio_that_fails_half_way_is_not_taken_for_complete(scripted):
    with scripted.stream("POST", SPEECH, json={**GOOD, "response_format": "pcm"}) as response:
        assert response.status_code == 200
        parts = response.iter_raw()
        assert len(next(parts)) > 0
        with pytest.raises(httpx.RemoteProtocolError):
            list(parts)


def test_events_that_fail_half_way_end_with_the_error(scripted):
    response = scripted.post(SPEECH, json={**GOOD, "stream_format": "sse"})
    *audio, last = [json.loads(line[6:]) for line in response.text.split("\n\n") if line]
    assert {event["type"] for event in audio} == {"speech.audio.delta"}
    assert "bark_fine failed" in last["error"]["message"]


# --- a live speech server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(server, repository):
    with running_gateway(url=server.grpc_url, repository=repository) as url:
        yield url


@pytest.fixture(scope="module")
def speaker(url):
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("response_format", FORMATS)
def test_openais_client_gets_every_format(speaker, response_format):
    speech = speaker.audio.speech.create(
        model="bark",
        voice="heart_0",
        input=TEXT,
        response_format=response_format,
        extra_body={"seed": 1, "max_seconds": 1},
    )
    heard, rate = decode(speech.content, response_format)
    assert 0.5 < len(heard) / rate < 1.2
    assert np.abs(heard).max() > 0.05


def test_openais_clients_defaults_are_mp3_of_a_voice_of_theirs(speaker):
    speech = speaker.audio.speech.create(model="tts-1", voice="alloy", input="Hello.")
    assert speech.response.headers["content-type"] == "audio/mpeg"
    assert int(speech.response.headers["x-seed"]) >= 0


def test_openais_client_hears_the_first_audio_long_before_the_last(speaker):
    start = time.monotonic()
    with speaker.audio.speech.with_streaming_response.create(
        model="bark", voice="heart_0", input=TEXT, response_format="pcm"
    ) as speech:
        heard_at = [time.monotonic() - start for _ in speech.iter_bytes()]
    assert len(heard_at) >= 3
    assert heard_at[0] < 0.7 * heard_at[-1]


def test_server_sent_events_carry_the_same_audio(speaker, url):
    wanted = {**GOOD, "response_format": "pcm", "seed": 5, "max_seconds": 1.2}
    plain = httpx.post(url + SPEECH, json=wanted, timeout=60).content
    with speaker.audio.speech.with_streaming_response.create(
        model="bark",
        voice="heart_0",
        input=TEXT,
        response_format="pcm",
        stream_format="sse",
        extra_body={"seed": 5, "max_seconds": 1.2},
    ) as speech:
        events = [json.loads(line.removeprefix("data: ")) for line in speech.iter_lines() if line]
    *audio, done = events
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["input_tokens"] == len(TEXT)
    assert len(audio) >= 3
    assert_same_speech(b"".join(base64.b64decode(event["audio"]) for event in audio), plain)


def assert_same_speech(first: bytes, second: bytes) -> None:
    """Of one seed; a near-tie may fall the other way with other thread counts."""
    assert len(first) == len(second)
    difference = np.frombuffer(first, "<i2").astype(float) - np.frombuffer(second, "<i2")
    assert np.abs(difference).mean() < 33


@pytest.mark.parametrize(
    "options",
    [
        {"voice": "heart_0", "max_seconds": 1.0},
        {"voice": "Heart 0", "language": "de", "normalize": True, "guard": True, "max_seconds": 2.0},
        {"speakers": {"Ann": "heart_0", "Bob": None}, "max_seconds": 3.0},
    ],
)
def test_the_gateway_says_what_the_server_says(server, url, options):
    text = "ANN: It is 3 o'clock.\nBOB: So it is."
    wanted = {"model": "bark", "input": text, "response_format": "pcm", "seed": 11, **options}
    heard = httpx.post(url + SPEECH, json=wanted, timeout=60).content
    with Client(server.grpc_url) as client:
        spoken = client.speak(text, seed=11, **options)
    assert_same_speech(heard, np.rint(np.clip(spoken, -1, 1) * 32767).astype("<i2").tobytes())


def test_it_lists_the_models_and_the_voices(speaker, url, repository):
    assert "bark" in [model.id for model in speaker.models.list()]
    assert speaker.models.retrieve("bark").object == "model"
    voices = httpx.get(f"{url}/v1/audio/voices").json()["voices"]
    presets = list(list_voices(repository / "bark/1/voices"))
    assert [voice["id"] for voice in voices if "alias_of" not in voice] == presets
    assert "heart_0" in presets
    assert [voice["id"] for voice in voices if "alias_of" in voice] == list(OPENAI_VOICES)
    assert httpx.get(f"{url}/health").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"voice": "hart_0"}, "voice", "did you mean 'heart_0'"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_k": 0}, "top_k", "leave top_k out"),
        ({"language": "xx"}, "language", "must be one of de, en"),
        ({"speakers": {"A": "nobody"}}, "voice", "no voice 'nobody'"),
    ],
)
def test_what_the_server_refuses_is_a_bad_request_that_names_the_field(speaker, options, param, said):
    voice = options.pop("voice", "heart_0")
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        speaker.audio.speech.create(model="bark", voice=voice, input=TEXT, extra_body=options)
    assert refused.value.param == param


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
def test_a_listener_who_leaves_cancels_the_request(server, url, stream_format):
    wanted = {**GOOD, "input": LONG_TEXT, "stream_format": stream_format}
    with one_more_cancelled(server), httpx.stream("POST", url + SPEECH, json=wanted, timeout=60) as response:
        next(response.iter_bytes())


def test_a_listener_who_leaves_before_the_first_audio_cancels_too(server, url):
    with one_more_cancelled(server), pytest.raises(httpx.ReadTimeout):
        httpx.post(url + SPEECH, json={**GOOD, "input": LONG_TEXT}, timeout=httpx.Timeout(60, read=0.1))


def test_a_full_server_answers_429_and_when_to_come_back(server, speaker):
    config = (ROOT / "model_repository/bark/config.pbtxt").read_text()
    n_streams = int(re.search(r'"max_streams" value: { string_value: "(\d+)"', config)[1])
    with Client(server.grpc_url) as client, ThreadPoolExecutor(n_streams) as pool:
        streams = [client.stream(LONG_TEXT, voice="heart_0") for _ in range(n_streams)]
        work = [pool.submit(lambda stream=stream: next(iter(stream), None)) for stream in streams]
        wait_until(lambda: metrics(server)["barkstream_live_streams"] == n_streams)
        with pytest.raises(openai.RateLimitError, match="streams of this server are busy") as refused:
            speaker.audio.speech.create(model="bark", voice="heart_0", input=TEXT)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        for future in work:
            future.exception()
    wait_until(lambda: metrics(server)["barkstream_live_streams"] == 0)


# --- text piece by piece --------------------------------------------------------------------------------------------


class Session:
    """A WebSocket session, as a language model's program would use it."""

    def __init__(self, socket) -> None:
        self._socket = socket
        created = self.next()
        assert (created["type"], created["sample_rate"]) == ("session.created", RATE)

    def send(self, kind: str, **fields) -> None:
        self._socket.send(json.dumps({"type": kind, **fields}))

    def next(self) -> dict:
        return json.loads(self._socket.recv(timeout=60))

    def until(self, kind: str) -> list[dict]:
        """Messages up to the first of a kind, with it."""
        messages = [self.next()]
        while messages[-1]["type"] != kind:
            messages.append(self.next())
        return messages


@pytest.fixture
def session(url):
    with connect(socket_of(url)) as socket:
        yield Session(socket)


def audio_in(messages: list[dict]) -> bytes:
    return b"".join(base64.b64decode(m["audio"]) for m in messages if m["type"] == "speech.audio.delta")


def test_a_sentence_is_spoken_while_the_next_is_being_written(session):
    session.send("session.update", voice="heart_0", seed=1)
    assert session.next()["type"] == "session.updated"
    for piece in ("Good", " morning to", " you all. ", "It"):
        session.send("input_text.append", text=piece)
    assert session.next() == {"type": "speech.sentence", "text": "Good morning to you all."}
    first = session.until("speech.audio.delta")  # and the text is not complete yet
    session.send("input_text.append", text=" is a fine day.")
    session.send("input_text.flush")
    messages = first + session.until("speech.audio.done")
    assert [m["text"] for m in messages if m["type"] == "speech.sentence"] == ["It is a fine day."]
    assert messages[-1] == {"type": "speech.audio.done", "cancelled": False}
    assert len(audio_in(messages)) / 2 / RATE > 2


def test_a_sentence_is_asked_for_with_what_the_listener_has_in_hand(monkeypatch, session):
    """Of a turn's sentences all but the first: who listens to it does not wait for first audio."""
    asked, stream = [], AsyncClient.stream
    monkeypatch.setattr(
        AsyncClient, "stream", lambda *args, **options: asked.append(options.get("lead_s")) or stream(*args, **options)
    )
    session.send("session.update", voice="heart_0", max_seconds=1)
    for _ in range(2):
        session.send("input_text.append", text="Hello there, my friend. It is a fine day.")
        session.send("input_text.flush")
        session.until("speech.audio.done")
    assert [lead_s is None for lead_s in asked] == [True, False, True, False]
    assert all(lead_s < 1.3 for lead_s in asked if lead_s)


class Refused:
    """A stream of a server that is full."""

    async def __aiter__(self):
        raise BarkstreamError("all 16 streams of this server are busy; retry after 1 s", "UNAVAILABLE")
        yield

    def close(self) -> None: ...


@pytest.mark.parametrize(("n_refused", "is_said"), [(2, True), (100, False)])
def test_a_full_server_is_asked_again_while_the_listener_has_something_in_hand(
    monkeypatch, session, n_refused, is_said
):
    stream, texts = AsyncClient.stream, []

    def full_for_a_while(client, text, **options):
        texts.append(text)
        return Refused() if 1 < len(texts) <= 1 + n_refused else stream(client, text, **options)

    monkeypatch.setattr(AsyncClient, "stream", full_for_a_while)
    # Half as fast, so that there is something in hand, however slow this machine is today.
    session.send("session.update", voice="heart_0", max_seconds=1.5, seed=3, speed=0.5)
    session.send("input_text.append", text="Hello there, my friend. It is a fine day.")
    session.send("input_text.flush")
    messages = session.until("speech.audio.done" if is_said else "error")
    sentences = [message["text"] for message in messages if message["type"] == "speech.sentence"]
    assert sentences == ["Hello there, my friend.", "It is a fine day."]
    assert texts == [sentences[0], *[sentences[1]] * (len(texts) - 1)]
    assert len(texts) == 2 + n_refused if is_said else 2 < len(texts) < 24
    seconds = len(audio_in(messages)) / 2 / RATE
    # Of 3.5 s what makes it slow has some left where a turn ends by an error.
    assert seconds == pytest.approx(6.5, abs=0.2) if is_said else 2.5 < seconds < 3.6


def test_who_cancels_while_the_server_is_full_is_not_spoken_to(monkeypatch, session):
    stream, texts = AsyncClient.stream, []

    def full(client, text, **options):
        texts.append(text)
        return Refused() if len(texts) == 2 else stream(client, text, **options)

    monkeypatch.setattr(AsyncClient, "stream", full)
    session.send("session.update", voice="heart_0", max_seconds=2)
    session.send("input_text.append", text="Hello there, my friend. It is a fine day.")
    session.send("input_text.flush")
    wait_until(lambda: len(texts) == 2)
    session.send("input_text.cancel")
    messages = session.until("speech.audio.done")
    assert messages[-1]["cancelled"] and len(audio_in(messages)) / 2 / RATE < 2.4


def test_what_a_listener_has_in_hand_is_what_was_sent_less_what_was_played(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    turn = Turn.begin(Voicing(Options(voice="heart_0"), speed=2.0), RATE)
    turn.tell_lead()
    assert "lead_s" not in turn.options
    turn.encode(np.zeros(2 * RATE, np.float32))
    now_s += 0.4
    turn.pause = np.zeros(RATE // 2, np.float32)
    turn.tell_lead()
    assert turn.options["lead_s"] == pytest.approx(1 - 0.4 + 0.25)
    now_s += 2
    turn.tell_lead()
    assert "lead_s" not in turn.options


def test_a_new_paragraph_is_spoken_after_a_longer_pause(session):
    session.send("session.update", voice="heart_0", max_seconds=1)
    session.send("input_text.append", text="Good morning to you all.\n\nIt is a fine day, and so it was yesterday.")
    session.send("input_text.flush")
    messages = session.until("speech.audio.done")
    second = [i for i, message in enumerate(messages) if message["type"] == "speech.sentence"][1]
    pause = round(PARAGRAPH_PAUSE * Schedule.sentence_pause_s * RATE)
    assert base64.b64decode(messages[second + 1]["audio"]) == bytes(2 * pause)


def test_a_turn_is_one_stream_of_audio_and_turns_follow_one_another(session):
    session.send("session.update", response_format="opus", max_seconds=1)
    session.next()
    for _ in range(2):
        session.send("input_text.append", text="Hello there, my friend. It is a fine day.")
        session.send("input_text.flush")
        messages = session.until("speech.audio.done")
        assert sum(m["type"] == "speech.sentence" for m in messages) == 2
        heard, rate = decode(audio_in(messages), "opus")
        assert 1 < len(heard) / rate < 2.6


def test_cancel_stops_the_speech_and_the_next_turn_speaks(server, session):
    session.send("session.update", voice="heart_0", max_seconds=30)
    session.next()
    with one_more_cancelled(server):
        session.send("input_text.append", text=LONG_TEXT)
        session.until("speech.audio.delta")
        session.send("input_text.cancel")
        assert session.until("speech.audio.done")[-1]["cancelled"] is True
    session.send("input_text.append", text=TEXT)
    session.send("input_text.flush")
    messages = session.until("speech.audio.done")
    assert messages[0] == {"type": "speech.sentence", "text": TEXT}
    assert messages[-1]["cancelled"] is False


def test_leaving_the_session_cancels_the_request(server, url):
    with one_more_cancelled(server), connect(socket_of(url)) as socket:
        session = Session(socket)
        session.send("input_text.append", text=LONG_TEXT)
        session.until("speech.audio.delta")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"type": "sing"}, "type"),
        ({"type": "input_text.append", "text": 5}, "text"),
        ({"type": "input_text.append", "text": "a" * 5000}, "text"),
        ({"type": "session.update", "speed": 9}, "speed"),
        ({"type": "session.update", "tempo": 9}, "tempo"),
    ],
)
def test_a_wrong_message_is_answered_and_the_session_goes_on(session, message, param):
    session.send(**{"kind": message.pop("type"), **message})
    answer = session.next()
    assert (answer["type"], answer["error"]["param"]) == ("error", param)
    session.send("input_text.flush")
    assert session.next()["type"] == "speech.audio.done"


def test_a_sentence_that_cannot_be_spoken_ends_the_session_with_the_reason(url):
    with connect(socket_of(url)) as socket:
        session = Session(socket)
        session.send("session.update", voice="hart_0")
        session.send("input_text.append", text=TEXT)
        session.send("input_text.flush")
        assert "did you mean 'heart_0'" in session.until("error")[-1]["error"]["message"]
        with pytest.raises(ConnectionClosed) as closed:
            session.next()
        assert closed.value.rcvd.code == 1008


# --- the command, and the recipes of docs/gateway.md ----------------------------------------------------------------


def test_without_its_extra_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["gateway", "--port", "0"]) == 1
    assert "needs uvicorn: pip install 'barkstream[gateway]'" in capsys.readouterr().err


def test_the_command_starts_server_and_gateway_and_ends_both(repository):
    command = [
        sys.executable,
        "-m",
        "barkstream.clients.cli",
        "gateway",
        "--serve",
        "--url",
        "127.0.0.1:0",
        "--port",
        "0",
    ]
    with subprocess.Popen(
        [*command, "--model-repository", str(repository)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ready = process.stdout.readline()
            url = re.search(r"http://\S+:\d+", ready)[0]
            assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()


RECIPES = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "docs/gateway.md").read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_recipes():
    assert [language for language, _ in RECIPES] == ["bash", "bash", "python", "python"]


@pytest.mark.parametrize(("language", "code"), RECIPES)
def test_a_recipe_runs_as_it_is_printed(url, tmp_path, language, code):
    if language == "bash" and not shutil.which("curl"):
        pytest.skip("no curl")
    assert "//127.0.0.1:8080/" in code
    code = code.replace("127.0.0.1:8080", url.removeprefix("http://"))
    command = {"bash": ["bash", "-ec"], "python": [sys.executable, "-c"]}[language]
    ran = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    (written,) = tmp_path.iterdir()
    heard, rate = decode(written.read_bytes(), written.suffix[1:])
    assert len(heard) / rate > 0.5
