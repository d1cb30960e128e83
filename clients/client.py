"""Blocking client: `for chunk in Client().stream("Hello.")`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from functools import cached_property
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

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


class Client:
    """Connection to a Barkstream server. Threads may share it: each request is a gRPC stream of its own on it.

    url: host:port of Triton's gRPC service. stall_timeout_s: longest wait for the next message of a stream.
    """

    def __init__(self, url: str = "127.0.0.1:8001", *, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self.url = url
        self._stall_timeout_s = stall_timeout_s
        self._channel = grpc.insecure_channel(url, CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def stream(self, text: str, **options: Unpack[Options]) -> Stream:
        """Speech for `text` while it is generated: `for chunk in client.stream(text)` gives float32 [n].

        The request is sent when the iteration begins, and leaving the loop, in whichever way, cancels it at once.
        options: see `Options`. Raises BarkstreamError from here and from the loop.
        """
        return Stream(self, build_request(text, options))

    def speak(self, text: str, **options: Unpack[Options]) -> NDArray[np.float32]:
        """The whole speech: float32 [n] at `sample_rate`, -1..1. Options and errors as for `stream`."""
        chunks = list(self.stream(text, **options))
        return np.concatenate(chunks) if chunks else np.zeros(0, np.float32)

    @cached_property
    def sample_rate(self) -> int:
        """Hz of the audio, asked of the server once. Raises BarkstreamError."""
        try:
            return sample_rate_of(
                self._stub.ModelConfig(pb.ModelConfigRequest(name=MODEL), timeout=self._stall_timeout_s)
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.url) from None

    def close(self) -> None:
        """Drop the connection, and with it every stream that is still open."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(Received):
    """One request's speech: an iterable of chunks, float32 [n], to be read once. See also `Received`."""

    def __init__(self, client: Client, request: pb.ModelInferRequest) -> None:
        super().__init__()
        self._client = client
        self._request = request
        self._call: grpc.Call | None = None
        self._closed = False

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        # A generator: its `finally` runs as soon as a `for` loop drops it, even while the caller keeps the Stream.
        if self._closed:
            return
        self._mark_sent()
        call = self._call = self._client._stub.ModelStreamInfer(iter([self._request]))
        messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(call, messages), daemon=True).start()
        try:
            while (message := self._next(messages)) is not None:
                chunk = self._take(*message)
                if chunk is not None:
                    yield chunk
        finally:
            call.cancel()  # no effect on a call that has ended

    def close(self) -> None:
        """Cancel the request at once; a loop over the chunks, in any thread, ends. Idempotent."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    def _next(self, messages: queue.SimpleQueue[_Message]) -> tuple[pb.ModelStreamInferResponse, float] | None:
        """The next response and its time; None after the last one. Raises BarkstreamError."""
        timeout_s = self._client._stall_timeout_s
        try:
            message, at = messages.get(timeout=timeout_s)
        except queue.Empty:
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


def _receive(call: grpc.Call, messages: queue.SimpleQueue[_Message]) -> None:
    """Read a call to its end, so that arrival times do not depend on how fast the chunks are consumed.

    The end of the stream (None) and its failure (grpc.RpcError) travel on the same queue as the responses.
    """
    try:
        for response in call:
            messages.put((response, perf_counter()))
        messages.put((None, perf_counter()))
    except grpc.RpcError as error:
        messages.put((error, perf_counter()))
