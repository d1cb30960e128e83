"""Gateways and a scripted speech server for the tests of clients/gateway."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import uvicorn
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from barkstream.clients.gateway.app import create_app
from barkstream.clients.gateway.settings import Settings
from barkstream.server import Server, bound_socket

NOBODY = "127.0.0.1:9"  # the discard port: no server answers there
RATE = 24_000  # Hz


@contextlib.contextmanager
def running_gateway(**settings: Any) -> Iterator[str]:
    """A gateway on a free loopback port, with no limit on requests unless one is given; its URL."""
    app = create_app(Settings(**{"requests_per_minute": 0, "url": NOBODY, **settings}))
    web = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with bound_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        while not web.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            web.should_exit = True
            thread.join()


class ScriptedSpeech(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Model `bark` that answers every request with one chunk of a tone and then an error."""

    def __init__(self, error: str) -> None:
        self._error = error

    def ModelReady(self, request: Any, context: Any) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=True)

    def ModelConfig(self, request: Any, context: Any) -> pb.ModelConfigResponse:
        response = pb.ModelConfigResponse()
        response.config.parameters["sample_rate"].string_value = str(RATE)
        return response

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[pb.ModelStreamInferResponse]:
        response = pb.ModelStreamInferResponse()
        tone = np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE).astype(np.float32)
        for name, datatype, array in (("audio", "FP32", tone), ("seed", "INT64", np.array([7], np.int64))):
            response.infer_response.outputs.add(name=name, datatype=datatype, shape=array.shape)
            response.infer_response.raw_output_contents.append(array.tobytes())
        yield response
        time.sleep(0.5)  # a listener has it before the end comes
        yield pb.ModelStreamInferResponse(error_message=self._error)


@contextlib.contextmanager
def scripted_server(error: str) -> Iterator[str]:
    """host:port of a `ScriptedSpeech`."""
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(ScriptedSpeech(error), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def metrics(server: Server) -> dict[str, float]:
    """Barkstream's metrics by name."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Asks until it holds; the metrics have no way to tell us."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@contextlib.contextmanager
def one_more_cancelled(server: Server) -> Iterator[None]:
    """The block must make the server cancel a request (one left by an earlier test may be counted late) and end with none under way."""
    before = metrics(server)["barkstream_cancelled_total"]
    yield
    wait_until(lambda: metrics(server)["barkstream_cancelled_total"] > before)
    wait_until(lambda: metrics(server)["barkstream_live_streams"] == 0)
