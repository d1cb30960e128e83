"""Errors as OpenAI's API words them: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from barkstream.clients.protocol import BarkstreamError

RETRY_AFTER_S = 3  # what a client should wait when the server is full or starting

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass
class ApiError(Exception):
    """A request that is answered with an error. message: one sentence. param: the field that is wrong."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """{"error": ...}, for a response, an event of a stream or a WebSocket message."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad_field(param: str, message: str) -> ApiError:
    """400: a field of the request is wrong."""
    return ApiError(400, message, "invalid_value", param)


def not_ready() -> ApiError:
    """503: no server, or one that still loads its models."""
    message = "the speech server is not ready; try again in a few seconds"
    return ApiError(503, message, "not_ready", headers=_retry_after(RETRY_AFTER_S))


def too_many(message: str, retry_after_s: float = RETRY_AFTER_S) -> ApiError:
    """429: the server's streams are all busy, or the caller sends too many requests."""
    return ApiError(429, message, "rate_limit_exceeded", headers=_retry_after(retry_after_s))


def from_server(error: BarkstreamError, server_is_ready: bool) -> ApiError:
    """What a listener is told of an error of the speech server.

    UNAVAILABLE means that it is full when it is ready, and that it is not there when it is not.
    """
    if error.status == "INVALID_ARGUMENT":
        return ApiError(400, str(error), "invalid_value", _field_named_in(str(error)))
    if error.status == "UNAVAILABLE" and server_is_ready:
        return too_many(str(error), error.retry_after_s or RETRY_AFTER_S)
    if not server_is_ready:
        return not_ready()
    if error.status == "DEADLINE_EXCEEDED":
        return ApiError(504, str(error), "timeout")
    return ApiError(500, str(error), "server_error")


def _field_named_in(message: str) -> str | None:
    """The field that a server's sentence begins with: `no voice 'x'; ...`, `top_p must be ...`, `text is blank ...`."""
    named = re.match(r"no (voice) |(\w+) (?:must|is) ", message)
    if named is None:
        return None
    return "input" if named[2] == "text" else named[1] or named[2]


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
