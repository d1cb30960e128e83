"""Speech as an HTTP response: encoded and sent chunk by chunk, cancelled when its listener leaves."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from barkstream.clients.aio import AsyncStream
from barkstream.clients.encode import Encoder, media_type, open_encoder
from barkstream.clients.gateway.errors import ApiError
from barkstream.clients.gateway.speech_request import SpeechRequest
from barkstream.clients.gateway.upstream import Upstream
from barkstream.clients.protocol import BarkstreamError

log = logging.getLogger("barkstream.gateway")


class SpeechResponse(Response):
    """One request's speech. The head is sent with the first audio, so that what fails before has its own status.

    What fails later breaks the body off (audio), or is an event (server-sent events).
    """

    def __init__(self, request: SpeechRequest, upstream: Upstream) -> None:
        self._request = request
        self._upstream = upstream
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await first_of(self._answer(scope, receive, send), _disconnect(receive))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._speak(send)
        except BarkstreamError as error:
            refused = await self._upstream.explain(error)
            if not self._started:
                await refused.response()(scope, receive, send)
            elif self._request.events:
                await _send_body(send, error_event(refused), more=False)
            else:
                log.warning("speech broke off: %s", error)  # and so does the body, which is how the listener knows

    async def _speak(self, send: Send) -> None:
        request, client = self._request, self._upstream.client
        sample_rate = await client.sample_rate()
        encoder = open_encoder(request.response_format, sample_rate, request.speed)
        stream = client.stream(request.text, **request.options)
        try:
            async for part in encode_speech(stream, encoder):
                if not self._started:
                    await self._send_head(send, sample_rate, stream.seed)
                await _send_body(send, audio_event(part) if request.events else part)
        finally:
            stream.close()  # at once, should `send` have been cancelled and not the stream
        await _send_body(send, done_event(request.text) if request.events else b"", more=False)

    async def _send_head(self, send: Send, sample_rate: int, seed: int | None) -> None:
        kind = "text/event-stream" if self._request.events else media_type(self._request.response_format, sample_rate)
        headers = {
            "content-type": kind,
            "cache-control": "no-store",
            "x-accel-buffering": "no",  # nginx: pass it on as it comes
            "x-sample-rate": str(sample_rate),
            "x-seed": str(seed),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        self._started = True


async def encode_speech(stream: AsyncStream, encoder: Encoder) -> AsyncIterator[bytes]:
    """The stream's chunks in the encoder's format, whatever is ready of each. Raises BarkstreamError."""
    async for chunk in stream:
        if encoded := encoder.encode(chunk):
            yield encoded
    if rest := encoder.finish():
        yield rest


async def first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run all until the first ends, and raise its error; by then the others are cancelled and have cleaned up."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in ended:
        task.result()


def audio_event(audio: bytes) -> bytes:
    """OpenAI's server-sent event with a piece of audio."""
    return _event(audio_message(audio))


def audio_message(audio: bytes) -> dict[str, Any]:
    """The same as a message of a WebSocket."""
    return {"type": "speech.audio.delta", "audio": base64.b64encode(audio).decode()}


def done_event(text: str) -> bytes:
    """OpenAI's last event. Its usage counts characters, as OpenAI's tts-1 is billed: the server tells no token counts."""
    usage = {"input_tokens": len(text), "output_tokens": 0, "total_tokens": len(text)}
    return _event({"type": "speech.audio.done", "usage": usage})


def error_event(error: ApiError) -> bytes:
    return _event({"type": "error", **error.body})


def _event(message: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(message)}\n\n".encode()


async def _send_body(send: Send, part: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": more})


async def _disconnect(receive: Receive) -> None:
    """Returns when the listener has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
