"""asyncio client: `async for chunk in AsyncClient().stream("Hello.")`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cached_property
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from barkstream.clients.protocol import (
    CHANNEL_OPTIONS,
    MODEL,
    STALL_TIMEOUT_S,
    Options,
    Received,
    build_request,
    error_from_rpc,
    sample_rate_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncClient:
    """`Client` for asyncio: the same methods, arguments and errors. One object belongs to one event loop.

    url: host:port of Triton's gRPC service. stall_timeout_s: longest wait for the next message of a stream.
    """

    def __init__(self, url: str = "127.0.0.1:8001", *, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self.url = url
        self._stall_timeout_s = stall_timeout_s
        self._sample_rate: int | None = None

    @cached_property
    def _channel(self) -> grpc.aio.Channel:  # made at first use, because it binds itself to the running loop
        return grpc.aio.insecure_channel(self.url, CHANNEL_OPTIONS)

    @cached_property
    def _stub(self) -> service_pb2_grpc.GRPCInferenceServiceStub:
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def stream(self, text: str, **options: Unpack[Options]) -> AsyncStream:
        """Speech for `text` while it is generated: `async for chunk in client.stream(text)` gives float32 [n].

        The request is sent when the iteration begins; leaving the loop or cancelling the task cancels it.
        options: see `Options`. Raises BarkstreamError from here and from the loop.
        """
        return AsyncStream(self, build_request(text, options))

    async def speak(self, text: str, **options: Unpack[Options]) -> NDArray[np.float32]:
        """The whole speech: float32 [n] at `sample_rate`, -1..1. Options and errors as for `stream`."""
        chunks = [chunk async for chunk in self.stream(text, **options)]
        return np.concatenate(chunks) if chunks else np.zeros(0, np.float32)

    async def sample_rate(self) -> int:
        """Hz of the audio, asked of the server once. Raises BarkstreamError."""
        if self._sample_rate is None:
            try:
                config = await self._stub.ModelConfig(pb.ModelConfigRequest(name=MODEL), timeout=self._stall_timeout_s)
            except grpc.RpcError as error:
                raise error_from_rpc(error, self.url) from None
            self._sample_rate = sample_rate_of(config)
        return self._sample_rate

    async def close(self) -> None:
        """Drop the connection, and with it every stream that is still open."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncStream(Received):
    """One request's speech: an async iterable of chunks, float32 [n], to be read once. See also `Received`."""

    def __init__(self, client: AsyncClient, request: pb.ModelInferRequest) -> None:
        super().__init__()
        self._client = client
        self._request = request
        self._call: Any = None
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[NDArray[np.float32]]:
        # An async generator: when a loop drops it, asyncio closes it in the next turn of the event loop.
        if self._closed:
            return
        self._mark_sent()
        call = self._call = self._client._stub.ModelStreamInfer(_only(self._request))
        messages: asyncio.Queue[_Message] = asyncio.Queue()
        receiver = asyncio.create_task(_receive(call, messages))
        try:
            while (message := await self._next(messages)) is not None:
                chunk = self._take(*message)
                if chunk is not None:
                    yield chunk
        finally:
            call.cancel()  # no effect on a call that has ended
            await receiver

    def close(self) -> None:
        """Cancel the request at once; a loop over the chunks ends. Idempotent."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def _next(self, messages: asyncio.Queue[_Message]) -> tuple[pb.ModelStreamInferResponse, float] | None:
        """The next response and its time; None after the last one. Raises BarkstreamError."""
        timeout_s = self._client._stall_timeout_s
        try:
            message, at = await asyncio.wait_for(messages.get(), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise self._stalled(timeout_s) from None
        if self._closed:
            return None
        if isinstance(message, grpc.RpcError):
            raise self._error or error_from_rpc(message, self._client.url)
        if message is None:
            self._finish()
            return None
        return message, at


_Message = tuple["pb.ModelStreamInferResponse | grpc.RpcError | None", float]  # what came, and when (perf_counter)


async def _only(request: pb.ModelInferRequest) -> AsyncIterator[pb.ModelInferRequest]:
    yield request


async def _receive(call: Any, messages: asyncio.Queue[_Message]) -> None:
    """Read a call to its end; the end (None) and a failure (grpc.RpcError) travel on the queue of the responses."""
    try:
        async for response in call:
            messages.put_nowait((response, perf_counter()))
        messages.put_nowait((None, perf_counter()))
    except grpc.RpcError as error:
        messages.put_nowait((error, perf_counter()))
    except asyncio.CancelledError:  # how grpc.aio tells a reader that the call was cancelled
        messages.put_nowait((None, perf_counter()))
