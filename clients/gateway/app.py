"""The gateway's routes. Start reading here: /v1/audio/speech is `speech`, the rest is small."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from barkstream.clients.gateway.access import KeyGuard, RateLimiter, caller_of, check_origin
from barkstream.clients.gateway.conversation import Conversation
from barkstream.clients.gateway.errors import ApiError, not_ready
from barkstream.clients.gateway.settings import Settings
from barkstream.clients.gateway.speech import SpeechResponse
from barkstream.clients.gateway.speech_request import MODELS, SpeechRequest
from barkstream.clients.gateway.upstream import Upstream
from barkstream.clients.gateway.voices import alias_voices, describe_voice
from barkstream.voices import list_voices

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    # Only what the gateway itself serves; blob: is a download made in the page.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asks again, so that page and gateway are of one version
}


def create_app(settings: Settings) -> Starlette:
    """The ASGI application."""
    gateway = Gateway(settings)
    routes = [
        Route("/v1/audio/speech", gateway.speech, methods=["POST"]),
        WebSocketRoute("/v1/audio/speech/stream", gateway.converse),
        Route("/v1/audio/voices", gateway.voices),
        Route("/v1/models", gateway.models),
        Route("/v1/models/{model}", gateway.model),
        Route("/health", gateway.health),
        Route("/", gateway.page),
        Mount("/page", Page(directory=PAGE)),
    ]
    middleware = []
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-seed", "x-sample-rate", "retry-after"],
        )
        middleware.append(cors)
    if settings.api_keys:
        middleware.append(Middleware(KeyGuard, keys=settings.api_keys))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ApiError: _answer_api_error, HTTPException: _answer_http_error},
        lifespan=gateway.lifespan,
    )


class Gateway:
    """The endpoints, around one connection to the speech server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._upstream = Upstream(settings.url)
        self._limiter = RateLimiter(settings.requests_per_minute)
        self._presets = list(list_voices(settings.repository / "bark/1/voices"))
        self._aliases = alias_voices(self._presets)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self._upstream.close()

    async def speech(self, request: Request) -> Response:
        """POST /v1/audio/speech: OpenAI's request, and Bark's own fields."""
        self._limiter.admit(caller_of(request, self._settings.api_keys))
        body = await read_body(request, self._settings.max_body_bytes)
        wanted = SpeechRequest.parse(body, self._aliases, self._settings.max_characters)
        return SpeechResponse(wanted, self._upstream)

    async def converse(self, socket: WebSocket) -> None:
        """WebSocket /v1/audio/speech/stream: text piece by piece."""
        try:
            check_origin(socket, self._settings.cors_origins)
            self._limiter.admit(caller_of(socket, self._settings.api_keys))
        except ApiError as refused:
            return await socket.send_denial_response(refused.response())
        await socket.accept()
        await Conversation(socket, self._upstream, self._aliases, self._settings.max_characters).run()

    async def voices(self, request: Request) -> Response:
        """GET /v1/audio/voices: the presets, then OpenAI's names and what they stand for."""
        presets = [describe_voice(name) for name in self._presets]
        aliases = [describe_voice(alias, stands_for) for alias, stands_for in self._aliases.items()]
        return JSONResponse({"object": "list", "voices": presets + aliases})

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [describe_model(name) for name in MODELS]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        name = request.path_params["model"]
        if name not in MODELS:
            raise ApiError(404, f"no model {name!r}; there are {', '.join(MODELS)}", "model_not_found", "model")
        return JSONResponse(describe_model(name))

    async def health(self, request: Request) -> Response:
        """GET /health: 200 when the speech server takes requests, 503 until then."""
        if not await self._upstream.is_ready():
            raise not_ready()
        return JSONResponse({"status": "ready"})

    async def page(self, request: Request) -> Response:
        """GET /: the web page; its files are below /page."""
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


class Page(StaticFiles):
    """The web page's files, with headers that keep it to itself."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


async def read_body(request: Request, n_most: int) -> bytes:
    """The body of a JSON request. Raises ApiError: 415 for another kind, 413 for more than n_most bytes.

    Only JSON: a page of another site may send plain text here without asking CORS first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with Content-Type: application/json", "unsupported_media_type")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > n_most:
            raise ApiError(413, f"a request may have {n_most:,} bytes at most", "request_too_large")
    return bytes(body)


def describe_model(name: str) -> dict[str, Any]:
    """A model as OpenAI lists it. created: when Suno published Bark."""
    return {"id": name, "object": "model", "created": 1681948800, "owned_by": "suno"}


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    code = error.detail.lower().replace(" ", "_")
    message = f"{error.detail}: {request.url.path}"
    return ApiError(error.status_code, message, code, headers=dict(error.headers or {})).response()
