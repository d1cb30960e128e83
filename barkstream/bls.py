"""Triton's side: the only module, besides the model.py files, that knows `triton_python_backend_utils`.

Models call one another through BLS (Triton's in-server inference calls). Everything about speech is in the modules that
this one calls.
"""

from __future__ import annotations

import itertools
import json
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from barkstream.engines import Generation, Head, Row
from barkstream.engines.onnxruntime import CausalEngine
from barkstream.export.codec_state import state_size
from barkstream.guard import ACTIONS, FAULTS
from barkstream.options import BadRequest, Schedule, SpeechOptions
from barkstream.pipeline import NothingSaid, Pipeline, Speech, choose_voice
from barkstream.sampling import Floats, Ints, Sampling
from barkstream.semantic import token_ids
from barkstream.text import TextTokenizer
from barkstream.tokens import Checkpoint
from barkstream.voices import choose_speakers, load_voices

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
PROMPTS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
N_TRIES = 2  # stage calls are pure, so one that failed may be repeated


class StageFailed(RuntimeError):
    """A stage answered with an error, twice."""


class Cancelled(Exception):
    """The listener has left."""


def infer(model: str, inputs: dict[str, np.ndarray], *outputs: str) -> list[np.ndarray]:
    """One call of another model in this server, for one stream: adds and removes the batch dimension.

    Raises StageFailed with the model's name and reason.
    """
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, array[None]) for name, array in inputs.items()],
    )
    for _ in range(N_TRIES):
        response = request.exec()
        if not response.has_error():
            return [pb_utils.get_output_tensor_by_name(response, name).as_numpy()[0] for name in outputs]
    raise StageFailed(f"{model} failed: {response.error().message()}")


class TritonStages:
    """The stages as Triton models, for one request; a call after the listener has left raises Cancelled."""

    def __init__(self, checkpoint: Checkpoint, is_cancelled: Callable[[], bool]):
        self._state_size = state_size(checkpoint.codec)
        self._is_cancelled = is_cancelled

    def _infer(self, model: str, inputs: dict[str, np.ndarray], *outputs: str) -> list[np.ndarray]:
        if self._is_cancelled():
            raise Cancelled
        return infer(model, inputs, *outputs)

    def semantic(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int
    ) -> tuple[Ints, bool]:
        inputs = _causal_inputs(prefix, n_tokens, position, sampling, stream)
        inputs["min_eos_p"] = np.array([sampling.min_eos_p], np.float32)
        tokens, ended = self._infer("bark_semantic", inputs, "tokens", "ended")
        return tokens, bool(ended[0])

    def coarse(self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int) -> Ints:
        return self._infer("bark_coarse", _causal_inputs(prefix, n_tokens, position, sampling, stream), "tokens")[0]

    def fine(self, codes: Ints, fill_from: int, uniforms: Floats, temperature: float) -> Ints:
        inputs = dict(
            codes=codes,
            fill_from=np.array([fill_from], np.int32),
            uniforms=uniforms,
            temperature=np.array([temperature], np.float32),
        )
        return self._infer("bark_fine", inputs, "filled")[0]

    def codec(self, codes: Ints, state: Floats) -> tuple[Floats, Floats]:
        audio, next_state = self._infer("bark_codec", dict(codes=codes, state=state), "audio", "next_state")
        return audio, next_state

    def codec_state(self) -> Floats:
        return np.zeros(self._state_size, np.float32)

    def release(self, stream: int) -> None:
        """Free the stream's KV slots, also when it was cancelled."""
        for model in ("bark_semantic", "bark_coarse"):
            inputs = _causal_inputs(np.zeros(1, np.int32), 0, 0, Sampling(), stream)
            if model == "bark_semantic":
                inputs["min_eos_p"] = np.ones(1, np.float32)
            infer(model, inputs, "tokens")


def _causal_inputs(
    prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int
) -> dict[str, np.ndarray]:
    return dict(
        prefix=prefix,
        n_tokens=np.array([n_tokens], np.int32),
        position=np.array([position], np.int32),
        seed=np.array([sampling.seed], np.int64),
        temperature=np.array([sampling.temperature], np.float32),
        top_k=np.array([sampling.top_k], np.int32),
        top_p=np.array([sampling.top_p], np.float32),
        stream=np.array([stream], np.int64),
    )


class CausalStage:
    """`bark_semantic` or `bark_coarse`: a batch of calls in, a response for each out."""

    def __init__(self, stage: str, args: dict[str, str]):
        """stage: "semantic" or "coarse". args: what Triton passes to `initialize`."""
        folder, parameters = _folder(args), _parameters(args)
        checkpoint = _checkpoint(folder)
        self._is_semantic = stage == "semantic"
        self._semantic = checkpoint.semantic
        size = checkpoint.semantic.size if self._is_semantic else checkpoint.coarse.size
        head = Head.semantic(checkpoint.semantic) if self._is_semantic else Head.coarse(checkpoint.coarse)
        self._engine = CausalEngine(
            folder / "model.onnx",
            size,
            head,
            n_slots=int(parameters["kv_slots"]),
            max_batch=json.loads(args["model_config"])["max_batch_size"],
            n_threads=int(parameters.get("n_threads", 0)),
        )
        self._engine.warm_up()
        slots = pb_utils.MetricFamily(
            name=f"barkstream_{stage}_kv_slots",
            description="KV slots held by live streams",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        self._slots_gauge, self._slots_family = slots.Metric(labels={}), slots

    def execute(self, requests: list[Any]) -> list[Any]:
        """Calls of several streams, decoded together. A bad call gets its error; the others their tokens."""
        rows: dict[int, Row] = {}
        responses: list[Any] = [None] * len(requests)
        for i, request in enumerate(requests):
            try:
                row = self._row(request)
                if row.n_tokens:
                    rows[i] = row
                else:
                    self._engine.release(row.stream)
                    responses[i] = self._response(Generation(np.zeros(0, np.int32), False))
            except ValueError as error:
                responses[i] = _error(str(error), pb_utils.TritonError.INVALID_ARG)
        for i, generation in zip(rows, self._engine.generate(list(rows.values())), strict=True):
            responses[i] = self._response(generation)
        self._slots_gauge.set(self._engine.n_owned_slots)
        return responses

    def _row(self, request: Any) -> Row:
        call = {tensor.name(): tensor.as_numpy()[0] for tensor in request.inputs()}
        one = {name: array[0].item() for name, array in call.items() if name != "prefix"}
        sampling = Sampling(one["seed"], one["temperature"], one["top_k"], one["top_p"], one.get("min_eos_p", 1.0))
        ids = (
            token_ids(call["prefix"], self._semantic)
            if self._is_semantic and one["n_tokens"]
            else call["prefix"][:, None]
        )
        row = Row(ids, one["n_tokens"], one["position"], sampling, one["stream"])
        if row.n_tokens:
            self._engine.check(row)
        return row

    def _response(self, generation: Generation) -> Any:
        outputs = [pb_utils.Tensor("tokens", generation.tokens[None])]
        if self._is_semantic:
            outputs.append(pb_utils.Tensor("ended", np.array([[generation.ended]])))
        return pb_utils.InferenceResponse(outputs)


class Speaker:
    """`bark`: each request is a worker that pulls its chunks through the pipeline and sends them."""

    def __init__(self, args: dict[str, str]):
        folder, parameters = _folder(args), _parameters(args)
        self._checkpoint = _checkpoint(folder)
        if parameters["sample_rate"] != str(self._checkpoint.codec.sample_rate):
            raise pb_utils.TritonModelException(
                f"bark/config.pbtxt says sample_rate {parameters['sample_rate']}, the checkpoint {self._checkpoint.codec.sample_rate}"
            )
        self._tokenizer = TextTokenizer(folder / "tokenizer.json", self._checkpoint.semantic)
        self._voices = load_voices(folder / "voices", self._checkpoint)
        self._schedule = Schedule.parse(parameters)
        self._n_most = int(parameters["max_streams"])
        self._free = threading.BoundedSemaphore(self._n_most)
        self._workers = ThreadPoolExecutor(self._n_most, thread_name_prefix="stream")
        self._stream_keys = itertools.count(secrets.randbits(48) << 14 | 1)
        self._metrics = _SpeakerMetrics()

    def submit(self, request: Any) -> None:
        """Start on a request, or refuse it at once when max_streams are under way."""
        sender = request.get_response_sender()
        if not self._free.acquire(blocking=False):
            message = f"all {self._n_most} streams of this server are busy; try again in a few seconds"
            return sender.send(_stream_error("UNAVAILABLE", message), flags=FINAL)
        self._workers.submit(self._work, request, sender)
        return None

    def close(self) -> None:
        self._workers.shutdown(wait=True)

    def _work(self, request: Any, sender: Any) -> None:
        """One request from first to last; sends FINAL exactly once, whatever happens."""
        self._metrics.live.increment(1)
        error = None
        try:
            self._speak(request, sender)
        except Cancelled:
            self._metrics.cancelled.increment(1)
        except BadRequest as bad:
            error = _stream_error("INVALID_ARGUMENT", str(bad))
        except (StageFailed, NothingSaid) as failure:
            error = _stream_error("INTERNAL", str(failure))
        except Exception as bug:  # whatever it is, the client must hear of it and not wait for ever
            pb_utils.Logger.log_error(f"bark: {bug!r}")
            error = _stream_error("INTERNAL", f"{bug!r}")
        finally:
            self._metrics.live.increment(-1)
            self._free.release()
            if error is None:
                sender.send(flags=FINAL)
            else:  # with the error in one call: FINAL in a second one crashes Triton 2.51 when the client asked for gRPC errors
                self._metrics.failed.increment(1)
                sender.send(error, flags=FINAL)

    def _speak(self, request: Any, sender: Any) -> None:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        text, voice_name = _string("text", given.pop("text")), given.pop("voice", None)
        prompts = {name: given.pop(name) for name in PROMPTS if name in given}
        turns = given.pop("speakers", np.empty(0, object))
        speakers = choose_speakers([_string("speakers", turn) for turn in turns.reshape(-1, 1)], self._voices)
        language = {"language": _string("language", given.pop("language"))} if "language" in given else {}
        options = SpeechOptions.parse({name: _single(name, array) for name, array in given.items()} | language)
        name = None if voice_name is None else _string("voice", voice_name)
        voice = choose_voice(name, prompts, self._voices, self._checkpoint)
        stages = TritonStages(self._checkpoint, sender.is_cancelled)
        pipeline = Pipeline(self._checkpoint, self._tokenizer, stages, self._schedule, self._metrics.count_guard)
        speech = Speech() if options.return_prompt else None
        for chunk in pipeline.stream(text, options, voice, next(self._stream_keys), speech, speakers):
            if sender.is_cancelled():
                raise Cancelled
            self._metrics.audio_s.increment(len(chunk) / self._checkpoint.codec.sample_rate)
            sender.send(_speech_response(options.seed, chunk))
        if options.return_prompt:
            sender.send(_speech_response(options.seed, np.zeros(0, np.float32), speech))


class _Metric:
    """A metric that threads may share: two updates at once crash the Python backend of Triton 2.51."""

    def __init__(self, metric: Any, lock: threading.Lock):
        self._metric, self._lock = metric, lock

    def increment(self, by: float) -> None:
        with self._lock:
            self._metric.increment(by)


class _SpeakerMetrics:
    """Prometheus metrics of `bark`, on Triton's metrics endpoint."""

    def __init__(self) -> None:
        kinds = pb_utils.MetricFamily
        self._families: list[Any] = []
        self._lock = threading.Lock()
        self.live = self._metric("barkstream_live_streams", "Requests being spoken now", kinds.GAUGE)
        self.audio_s = self._metric("barkstream_audio_seconds_total", "Seconds of audio sent", kinds.COUNTER)
        self.cancelled = self._metric("barkstream_cancelled_total", "Requests whose listener left", kinds.COUNTER)
        self.failed = self._metric("barkstream_failed_total", "Requests answered with an error", kinds.COUNTER)

        guard = self._family("barkstream_guard_total", "Sentences that went wrong, by fault and action", kinds.COUNTER)
        self._guard = {
            (action, fault): _Metric(guard.Metric(labels={"action": action, "fault": fault}), self._lock)
            for action in ACTIONS
            for fault in FAULTS
        }

    def count_guard(self, action: str, fault: str) -> None:
        self._guard[action, fault].increment(1)

    def _metric(self, name: str, description: str, kind: Any) -> _Metric:
        return _Metric(self._family(name, description, kind).Metric(labels={}), self._lock)

    def _family(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)  # a metric lives as long as its family
        return family


def _speech_response(seed: int, chunk: Floats, speech: Speech | None = None) -> Any:
    outputs = [pb_utils.Tensor("audio", chunk), pb_utils.Tensor("seed", np.array([seed], np.int64))]
    if speech is not None:
        prompt = speech.history_prompt()
        arrays = (prompt.semantic, prompt.coarse, prompt.fine)
        outputs += [
            pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in zip(PROMPTS, arrays, strict=True)
        ]
    return pb_utils.InferenceResponse(outputs)


def _error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _stream_error(status: str, message: str) -> Any:
    """An error response of a stream. Triton sends a stream's errors as text alone, so the text begins with gRPC's status."""
    codes = {"UNAVAILABLE": pb_utils.TritonError.UNAVAILABLE, "INVALID_ARGUMENT": pb_utils.TritonError.INVALID_ARG}
    return _error(f"{status}: {message}", codes.get(status, pb_utils.TritonError.INTERNAL))


def _single(name: str, array: np.ndarray) -> Any:
    if array.size != 1:
        raise BadRequest(f"{name} must have one value, got {array.size}")
    return array.reshape(-1).tolist()[0]


def _string(name: str, array: np.ndarray) -> str:
    value = _single(name, array)
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name} must be UTF-8: {error}") from None


def _folder(args: dict[str, str]) -> Path:
    return Path(args["model_repository"]) / args["model_version"]


def _parameters(args: dict[str, str]) -> dict[str, str]:
    return {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}


def _checkpoint(folder: Path) -> Checkpoint:
    path = folder / "checkpoint.json"
    if not path.exists():
        raise pb_utils.TritonModelException(
            f"{path} is missing: run `make export` (or `barkstream export CHECKPOINT`) first"
        )
    return Checkpoint.load(path)
