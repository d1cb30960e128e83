"""The speech server behind the gateway: Triton's model `bark`."""

from __future__ import annotations

from functools import cached_property

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from barkstream.clients.aio import AsyncClient
from barkstream.clients.gateway import errors
from barkstream.clients.protocol import CHANNEL_OPTIONS, MODEL, BarkstreamError

PROBE_TIMEOUT_S = 2.0


class Upstream:
    """A connection to the speech server, for one event loop. `client` speaks."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = AsyncClient(url)

    @cached_property
    def _channel(self) -> grpc.aio.Channel:  # made at first use, because it binds itself to the running loop
        return grpc.aio.insecure_channel(self.url, CHANNEL_OPTIONS)

    async def is_ready(self) -> bool:
        """Whether it would take a request now: there, and its models loaded."""
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            answer = await stub.ModelReady(pb.ModelReadyRequest(name=MODEL), timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    async def explain(self, error: BarkstreamError) -> errors.ApiError:
        """What a listener is told of `error`; a full server and an absent one differ in being ready."""
        return errors.from_server(error, await self.is_ready())

    async def close(self) -> None:
        await self.client.close()
        await self._channel.close()
