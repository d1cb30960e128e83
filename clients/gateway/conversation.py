"""The WebSocket: text comes in piece by piece, from a language model, and speech goes out sentence by sentence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.websockets import WebSocket, WebSocketDisconnect

from barkstream.clients.aio import AsyncStream
from barkstream.clients.encode import FORMATS, Encoder, open_encoder
from barkstream.clients.gateway.errors import ApiError, bad_field
from barkstream.clients.gateway.sentences import SentenceBuffer
from barkstream.clients.gateway.speech import audio_message, first_of
from barkstream.clients.gateway.speech_request import (
    BARK_FIELDS,
    FASTEST,
    SLOWEST,
    check_names,
    read_choice,
    read_number,
    read_object,
    read_options,
)
from barkstream.clients.gateway.upstream import Upstream
from barkstream.clients.protocol import BarkstreamError, Options
from barkstream.languages import choose_language, language_of_voice
from barkstream.options import Schedule
from barkstream.text import Sentence

SESSION_FIELDS = ("type", "voice", "response_format", "speed", *BARK_FIELDS)
CLOSE_CODES = {400: 1008, 429: 1013, 503: 1013}  # RFC 6455: refused; try again later
RETRY_S = 0.25  # a full server is asked again for a turn's next sentence, while its listener has so much in hand


@dataclass(frozen=True)
class Voicing:
    """How a session speaks: what `session.update` sets."""

    options: Options
    response_format: str = "pcm"
    speed: float = 1.0

    @classmethod
    def parse(cls, given: dict[str, Any], aliases: dict[str, str]) -> Voicing:
        """Raises ApiError (400) with the field that is wrong."""
        check_names(given, SESSION_FIELDS)
        return cls(
            read_options(given, aliases),
            read_choice(given, "response_format", FORMATS, "pcm"),
            read_number(given, "speed", SLOWEST, FASTEST, 1.0),
        )

    def language_of(self, text: str) -> str:
        """The language to read a text in, as the server chooses it."""
        voice = self.options.get("voice")
        return choose_language(self.options.get("language"), language_of_voice(voice) if voice else None, text)


@dataclass
class Turn:
    """The speech of one turn, up to now."""

    encoder: Encoder
    options: Options  # of the next sentence
    pause: NDArray[np.float32]  # silence before it
    rate_hz: float  # samples of it that a listener hears a second
    dry_at: float = 0.0  # when a player that began with the first chunk has played it (time.monotonic)

    @classmethod
    def begin(cls, voicing: Voicing, sample_rate: int) -> Turn:
        encoder = open_encoder(voicing.response_format, sample_rate, voicing.speed)
        options = Options(**voicing.options)
        options["return_prompt"] = not options.get("voice")  # the first sentence's own voice, for the others
        return cls(encoder, options, np.zeros(0, np.float32), sample_rate * voicing.speed)

    def encode(self, samples: NDArray[np.float32]) -> bytes:
        """What is sent of samples [n]; a player has them from now on."""
        self.dry_at = max(self.dry_at, time.monotonic()) + len(samples) / self.rate_hz
        return self.encoder.encode(samples)

    @property
    def lead_s(self) -> float:
        """What the listener has in hand, with the pause that is sent next; below 0 it has been silent so long."""
        return self.dry_at - time.monotonic() + len(self.pause) / self.rate_hz

    def tell_lead(self) -> None:
        """The next request says what the listener has in hand, so that it is not served as one who waits for first audio."""
        if (lead_s := self.lead_s) > 0:
            self.options["lead_s"] = lead_s
        else:
            self.options.pop("lead_s", None)

    def take_pause(self) -> bytes:
        """What is sent of it, once."""
        pause, self.pause = self.pause, np.zeros(0, np.float32)
        return self.encode(pause)

    def go_on(self, sentence: Sentence, stream: AsyncStream, sample_rate: int) -> None:
        """A sentence has been spoken; the next comes after its pause, with its voice, and a seed of its own."""
        self.pause = np.zeros(round(sentence.pause * Schedule.sentence_pause_s * sample_rate), np.float32)
        if stream.history_prompt is not None:
            self.options["history_prompt"], self.options["return_prompt"] = stream.history_prompt, False
        if (seed := self.options.get("seed")) is not None:
            self.options["seed"] = seed + 1


class Conversation:
    """One WebSocket, from `session.created` to its end. A turn is the text up to a flush: one voice, one stream of audio.

    Two tasks share it: one listens and queues sentences, the other speaks them.
    """

    def __init__(self, socket: WebSocket, upstream: Upstream, aliases: dict[str, str], max_characters: int) -> None:
        self._socket = socket
        self._client = upstream.client
        self._upstream = upstream
        self._aliases = aliases
        self._max_characters = max_characters
        self._voicing = Voicing(Options())
        self._buffer = SentenceBuffer(lambda text: self._voicing.language_of(text))
        self._sentences: asyncio.Queue[Sentence | None] = asyncio.Queue()  # None: the turn ends
        self._n_queued = 0  # characters in it
        self._stream: AsyncStream | None = None  # the sentence being spoken
        self._cancelled = False

    async def run(self) -> None:
        """Serve the session until the caller leaves, or until a sentence cannot be spoken (error, then close)."""
        try:
            await self._send("session.created", sample_rate=await self._client.sample_rate())
            await first_of(self._listen(), self._speak())
        except WebSocketDisconnect:
            pass
        except BarkstreamError as error:
            refused = await self._upstream.explain(error)
            await self._send_error(refused)
            await self._socket.close(CLOSE_CODES.get(refused.status, 1011))

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._socket.send_json({"type": kind, **fields})

    async def _send_error(self, error: ApiError) -> None:
        await self._send("error", **error.body)

    # --- listening ------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Take messages until WebSocketDisconnect; one that is wrong is answered and changes nothing."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect
            try:
                await self._take(read_object(message.get("text") or message.get("bytes") or ""))
            except ApiError as error:
                await self._send_error(error)

    async def _take(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "session.update":
            self._voicing = Voicing.parse(message, self._aliases)
            await self._send("session.updated")
        elif kind == "input_text.append":
            self._append(message.get("text"))
        elif kind == "input_text.flush":
            self._queue([*self._buffer.flush(), None])
        elif kind == "input_text.cancel":
            self._cancel()
        else:
            kinds = "session.update, input_text.append, input_text.flush, input_text.cancel"
            raise bad_field("type", f"type must be one of {kinds}, got {kind!r}")

    def _append(self, text: Any) -> None:
        if not isinstance(text, str):
            raise bad_field("text", f"text must be a string, got {text!r}")
        if len(self._buffer) + self._n_queued + len(text) > self._max_characters:
            raise bad_field("text", f"at most {self._max_characters:,} characters may wait to be spoken")
        self._queue(self._buffer.push(text))

    def _queue(self, sentences: Sequence[Sentence | None]) -> None:
        for sentence in sentences:
            self._n_queued += len(sentence.text) if sentence else 0
            self._sentences.put_nowait(sentence)

    def _cancel(self) -> None:
        """Stop speaking and forget what was to be said; the turn ends here."""
        self._buffer.flush()
        while not self._sentences.empty():
            self._sentences.get_nowait()
        self._n_queued = 0
        self._cancelled = True
        if self._stream is not None:
            self._stream.close()
        self._queue([None])

    # --- speaking -------------------------------------------------------------------------------------------------

    async def _speak(self) -> None:
        """Turn after turn. Raises BarkstreamError for a sentence that cannot be spoken."""
        sample_rate = await self._client.sample_rate()
        while True:
            await self._speak_turn(sample_rate)
            cancelled, self._cancelled = self._cancelled, False
            await self._send("speech.audio.done", cancelled=cancelled)

    async def _speak_turn(self, sample_rate: int) -> None:
        turn: Turn | None = None
        while (sentence := await self._sentences.get()) is not None:
            self._n_queued -= len(sentence.text)
            turn = turn or Turn.begin(self._voicing, sample_rate)  # as the session is set when the turn begins
            turn.tell_lead()
            # No await before this: _cancel closes the stream.
            stream = self._stream = self._client.stream(sentence.text, **turn.options)
            await self._send("speech.sentence", text=sentence.text)
            await self._send_audio(turn.take_pause())
            while not await self._is_said(stream, turn):
                await asyncio.sleep(RETRY_S)
                turn.tell_lead()
                stream = self._stream = self._client.stream(sentence.text, **turn.options)
                if self._cancelled:
                    stream.close()
            turn.go_on(sentence, stream, sample_rate)
        if turn:
            await self._send_audio(turn.encoder.finish())

    async def _is_said(self, stream: AsyncStream, turn: Turn) -> bool:
        """Send what a stream says. False: the server is full, and the listener has something in hand until it is asked again."""
        try:
            async for chunk in stream:
                await self._send_audio(turn.encode(chunk))
        except BarkstreamError as error:
            if error.retry_after_s is None or turn.lead_s < RETRY_S:
                raise
            return False
        return True

    async def _send_audio(self, audio: bytes) -> None:
        if audio:
            await self._socket.send_json(audio_message(audio))
