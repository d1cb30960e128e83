"""One request and its responses as Triton's gRPC messages: shared by the blocking and the asyncio client.

This speaks to Triton's generated gRPC stub and not through `tritonclient.grpc.InferenceServerClient`: that one allows
one stream per client object, so concurrent requests would need a connection each, and hands responses to a callback
where an iterator is wanted. A shared connection also saves 1 ms of TTFA (loopback).

The status of an error: Triton puts only the sentence into a stream's error response. Its header `triton_grpc_error`
would turn it into a gRPC status, but Triton 2.51 then dies of a segmentation fault when the model's error and its FINAL
are two responses. So the server starts the sentence with the status ("INVALID_ARGUMENT: ...").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict, cast
from zipfile import BadZipFile

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from barkstream.clients.playback import Arrival, time_to_first_audio

MODEL = "bark"
# Unlimited: gRPC's 4 MiB would be 43 s of audio.
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's own: 2 minutes, in which a server that is back seems away
]
STALL_TIMEOUT_S = 300.0  # an offline request for a large checkpoint on a CPU is silent for minutes

HISTORY = ("semantic_prompt", "coarse_prompt", "fine_prompt")  # [n], [2, t], [8, t]
_SCALARS = {
    "seed": np.int64,
    "temperature": np.float32,
    "fine_temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_eos_p": np.float32,
    "max_seconds": np.float32,
    "lookahead": np.int32,
    "streaming": np.bool_,
    "return_prompt": np.bool_,
    "normalize": np.bool_,
    "guard": np.bool_,
    "lead_s": np.float32,
}
_TRITON_TYPES = {np.dtype(t): name for t, name in
                 ((np.int32, "INT32"), (np.int64, "INT64"), (np.float32, "FP32"), (np.bool_, "BOOL"))}  # fmt: skip
_NUMPY_TYPES = {name: dtype for dtype, name in _TRITON_TYPES.items()}
_STATUS = re.compile(r"(INVALID_ARGUMENT|UNAVAILABLE|INTERNAL|CANCELLED|NOT_FOUND|DEADLINE_EXCEEDED): *", re.ASCII)
_RETRY = re.compile(r"retry after (\d+) s", re.ASCII)

HistoryPrompt = Mapping[str, NDArray[Any]]


class Options(TypedDict, total=False):
    """Options of one request; one that is absent or None takes the server's default."""

    voice: str | None  # preset name
    history_prompt: HistoryPrompt | str | PathLike[str] | None  # three arrays (see HISTORY), or a path of their .npz
    speakers: Mapping[str, str | None] | None  # whose turns `A:` or `[A]` mark, and their presets (None: any voice)
    language: str | None  # of the text, such as "de"; absent: its script's, else the voice's, else English
    normalize: bool | None  # True: numbers, dates and abbreviations become words
    guard: bool | None  # True: a sentence that runs on, loops, falls silent or turns into noise is said again or cut
    seed: int | None  # absent: a fresh one, reported back
    temperature: float | None  # semantic and coarse; 0: argmax
    fine_temperature: float | None
    top_k: int | None
    top_p: float | None
    min_eos_p: float | None
    max_seconds: float | None  # of audio
    lookahead: int | None  # semantic tokens that a coarse window waits for; absent: exact
    streaming: bool | None  # False: one chunk a sentence, at the end
    return_prompt: bool | None  # True: `.history_prompt` is the speech just made, for use as a new voice
    lead_s: float | None  # seconds of audio that the listener still has in hand, of requests before


class BarkstreamError(RuntimeError):
    """A request that failed; str() is one sentence.

    status: gRPC's name of the kind. INVALID_ARGUMENT: the request is wrong. UNAVAILABLE: the server is full, or not
    there. DEADLINE_EXCEEDED: it stopped answering. UNKNOWN: Triton refused the request without saying the kind.
    """

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def retry_after_s(self) -> float | None:
        """Of a server that is full: when to try again, by its own guess. None for any other error."""
        hint = _RETRY.search(str(self))
        return float(hint[1]) if hint and self.status == "UNAVAILABLE" else None


def error_from_server(message: str) -> BarkstreamError:
    """Of an error response in a stream."""
    match = _STATUS.match(message)
    return BarkstreamError(message[match.end() :], match[1]) if match else BarkstreamError(message, "UNKNOWN")


def error_from_rpc(error: grpc.RpcError, url: str) -> BarkstreamError:
    """Of a connection or an RPC that broke."""
    status, details = error.code().name, error.details() or "no reason given"
    if status == "UNAVAILABLE":
        details = f"no Barkstream server answers at {url} ({details})"
    return BarkstreamError(details, status)


def build_request(text: str, options: Options) -> pb.ModelInferRequest:
    """The gRPC request for `text`.

    Raises BarkstreamError (INVALID_ARGUMENT) for what cannot even be sent, TypeError for an option that does not exist;
    every other check is the server's.
    """
    request = pb.ModelInferRequest(model_name=MODEL)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    _add_strings(request, "text", [text])
    for name, value in cast(dict[str, Any], options).items():
        if value is None:
            continue
        if name in ("voice", "language"):
            _add_strings(request, name, [value])
        elif name == "speakers":
            _add_strings(request, name, [f"{speaker}={preset or ''}" for speaker, preset in value.items()])
        elif name == "history_prompt":
            _add_history(request, value)
        elif name in _SCALARS:
            _add(request, name, _scalar(name, value))
        else:
            raise TypeError(f"no option {name!r}; there are {', '.join(Options.__annotations__)}")
    return request


def sample_rate_of(config: pb.ModelConfigResponse) -> int:
    """Hz, from the parameter `sample_rate` of the model's configuration. Raises BarkstreamError if it has none."""
    parameters = config.config.parameters
    if "sample_rate" not in parameters:
        raise BarkstreamError(f"the server's model {MODEL!r} does not say its sample_rate", "INTERNAL")
    return int(parameters["sample_rate"].string_value)


class Received:
    """What has come back for one request, up to now."""

    def __init__(self) -> None:
        self.seed: int | None = None  # known from the first chunk on
        self.history_prompt: dict[str, NDArray[np.int32]] | None = None  # after the end, with return_prompt
        self.arrivals: list[Arrival] = []  # one a chunk
        self._sent_at = 0.0  # perf_counter
        self._final = False
        self._error: BarkstreamError | None = None

    @property
    def ttfa_s(self) -> float | None:
        """Seconds from sending the request to the first audible chunk."""
        return time_to_first_audio(self.arrivals)

    def _mark_sent(self) -> None:
        if self._sent_at:
            raise RuntimeError("this stream was read already; call client.stream() again")
        self._sent_at = perf_counter()

    def _take(self, response: pb.ModelStreamInferResponse, at: float) -> NDArray[np.float32] | None:
        """Take in one response that arrived at `at` (perf_counter); returns its samples [n], if it has any.

        An error is kept for `_finish`: FINAL follows it at once, and a stream read to its end needs no cancelling.
        """
        if response.error_message:
            self._error = error_from_server(response.error_message)
            return None
        self._final |= response.infer_response.parameters["triton_final_response"].bool_param
        outputs = _read_outputs(response.infer_response)
        if "seed" in outputs:
            self.seed = int(outputs["seed"][0])
        if all(name in outputs for name in HISTORY):
            self.history_prompt = {name: outputs[name] for name in HISTORY}
        audio = outputs.get("audio")
        if audio is None or not audio.size:
            return None
        self.arrivals.append(Arrival(at - self._sent_at, audio.size, float(np.abs(audio).max())))
        return audio

    def _finish(self) -> None:
        """The stream has ended: raises what went wrong."""
        if self._error:
            raise self._error
        if not self._final:
            raise BarkstreamError("the server ended the stream before the speech was complete", "INTERNAL")

    def _stalled(self, timeout_s: float) -> BarkstreamError:
        return self._error or BarkstreamError(f"no answer from the server for {timeout_s:g} s", "DEADLINE_EXCEEDED")


def _scalar(name: str, value: Any) -> NDArray[Any]:
    dtype = np.dtype(_SCALARS[name])
    if dtype.kind == "b":
        fits = isinstance(value, (bool, np.bool_))
    elif dtype.kind == "i":
        fits = (
            isinstance(value, Integral)
            and not isinstance(value, bool)
            and abs(int(value)) <= 2 ** (8 * dtype.itemsize - 1) - 1
        )
    else:
        fits = isinstance(value, Real) and not isinstance(value, bool)
    if not fits:
        raise BarkstreamError(f"{name} must be one {dtype}, not {value!r}", "INVALID_ARGUMENT")
    with np.errstate(over="ignore"):  # 1e99 goes as infinity, which the server refuses by name
        return np.array([value]).astype(dtype)


def _add(request: pb.ModelInferRequest, name: str, array: NDArray[Any]) -> None:
    request.inputs.add(name=name, datatype=_TRITON_TYPES[array.dtype], shape=array.shape)
    request.raw_input_contents.append(array.tobytes())


def _add_strings(request: pb.ModelInferRequest, name: str, values: Sequence[str]) -> None:
    raw = [_utf8(name, value) for value in values]
    request.inputs.add(name=name, datatype="BYTES", shape=[len(raw)])
    request.raw_input_contents.append(b"".join(len(value).to_bytes(4, "little") + value for value in raw))


def _utf8(name: str, value: str) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    try:  # a command line's bytes that are no UTF-8 are for the server to refuse
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BarkstreamError(f"{name} holds a lone surrogate at character {error.start}", "INVALID_ARGUMENT") from None


def _add_history(request: pb.ModelInferRequest, history: HistoryPrompt | str | PathLike[str]) -> None:
    arrays = history if isinstance(history, Mapping) else load_history(history)
    if missing := [name for name in HISTORY if name not in arrays]:
        raise BarkstreamError(f"history_prompt lacks {', '.join(missing)}", "INVALID_ARGUMENT")
    for name in HISTORY:
        array = np.asarray(arrays[name])
        fits = np.issubdtype(array.dtype, np.integer) and (not array.size or np.abs(array).max() < 2**31)
        if not fits:
            raise BarkstreamError(f"{name} must hold 32-bit integers, not {array.dtype}", "INVALID_ARGUMENT")
        _add(request, name, array.astype(np.int32))


def load_history(path: str | PathLike[str]) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz history prompt (Suno's format). Raises BarkstreamError if `path` is none."""
    try:
        with np.load(Path(path), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in HISTORY}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, BadZipFile) as error:
        message = f"{path} is no history prompt (.npz with {', '.join(HISTORY)}): {error}"
        raise BarkstreamError(message, "INVALID_ARGUMENT") from None


def _read_outputs(response: pb.ModelInferResponse) -> dict[str, NDArray[Any]]:
    return {
        output.name: np.frombuffer(raw, _NUMPY_TYPES[output.datatype]).reshape(output.shape).copy()
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
