"""Who may speak, and how often: API keys, origins of WebSockets, requests a minute."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from barkstream.clients.gateway.errors import ApiError, too_many

GUARDED = "/v1/"  # the page and /health are for everybody


class KeyGuard:
    """ASGI middleware: 401 for a call of the API without one of the keys as its bearer token."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not scope["path"].startswith(GUARDED) or self._admits(scope):
            return await self._app(scope, receive, send)
        message = "a valid API key is needed: Authorization: Bearer KEY"
        refused = ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await refused.response()(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        """Compares with every key in full, so that the time taken tells nothing."""
        given = _digest(bearer_token(HTTPConnection(scope)))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


class RateLimiter:
    """A token bucket for each caller: `per_minute` requests at once, and as many a minute after that; 0: no limit.

    The bucket is kept as the time at which it will be full again; one that is full is forgotten.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()  # by caller, the one seen last at the end

    def admit(self, caller: str) -> None:
        """Take one request out of the caller's bucket. Raises ApiError (429) if it is empty."""
        if not self._per_minute:
            return
        now, refill_s = self._clock(), 60 / self._per_minute
        self._forget_full(now)
        full_at = max(self._full_at.get(caller, now), now) + refill_s
        if full_at - now > 60 + refill_s / 2:
            message = f"more than {self._per_minute} requests a minute; wait a little"
            raise too_many(message, retry_after_s=full_at - now - 60)
        self._full_at[caller] = full_at
        self._full_at.move_to_end(caller)

    def _forget_full(self, now: float) -> None:
        while self._full_at and next(iter(self._full_at.values())) <= now:
            self._full_at.popitem(last=False)


def caller_of(connection: HTTPConnection, keys: tuple[str, ...]) -> str:
    """Whose bucket a request is counted in: its key's if there are keys, else its address's."""
    if keys:
        return bearer_token(connection)
    return connection.client.host if connection.client else ""


def bearer_token(connection: HTTPConnection) -> str:
    """The token of `Authorization: Bearer TOKEN`; empty if there is none."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def check_origin(connection: HTTPConnection, allowed: tuple[str, ...]) -> None:
    """ApiError (403) for a WebSocket from a page of another site: browsers do not apply CORS to WebSockets."""
    origin = connection.headers.get("origin")
    if origin is None or origin in allowed or urlsplit(origin).netloc == connection.headers.get("host"):
        return
    raise ApiError(403, f"pages of {origin} may not connect: see --cors-origin", "origin_not_allowed")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
