"""Triton's side: the only module, besides the model.py files, that knows `triton_python_backend_utils`.

Models call one another through BLS (Triton's in-server inference calls). Everything about speech is in the modules that
this one calls.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from barkstream.admission import Admission, Backlog
from barkstream.engines import Chain, Chunk, Generation, Row, Window, Windows, check_chunk
from barkstream.engines.hosted import HostedStage, OwnStage, sockets_folder
from barkstream.engines.open import CausalStageName, Spec, StageName
from barkstream.export.codec_state import state_size
from barkstream.garbage import spare_what_is_here
from barkstream.metrics import REQUEST, SPEAKER, SpeakerMetrics, StageMetrics
from barkstream.options import BadRequest, Schedule, SpeechOptions
from barkstream.pacing import CANCEL_CHECK_S, Hold, Pacer, Player
from barkstream.peers import Peers
from barkstream.pipeline import NothingSaid, Pipeline, Speech, choose_voice
from barkstream.sampling import Floats, Ints, Sampling
from barkstream.semantic import token_ids
from barkstream.spread import StreamKeys, usable_gpus
from barkstream.text import TextTokenizer
from barkstream.tokens import Checkpoint
from barkstream.voices import choose_speakers, load_voices
from barkstream.watch import Watch

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
PROMPTS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
NOTHING = Generation(np.zeros(0, np.int32), False)
PEERS = "bark.peers"  # of the sockets' folder: what the processes of `bark` know of one another
N_TRIES = 2  # stage calls are pure, so one that failed may be repeated


class StageFailed(RuntimeError):
    """A stage answered with an error, twice. model: its name."""

    def __init__(self, model: str, reason: str):
        super().__init__(f"{model} failed: {reason}")
        self.model = model


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
    raise StageFailed(model, response.error().message())


class TritonStages:
    """The stages as Triton models, for one request.

    wait_turn: called before every call; returns when it is this stream's turn, raises Cancelled when its listener has left.
    key: of the stream, for fine and codec stages that want to know it; None: they don't.
    lead_s: seconds of audio that the listener has in hand, -infinity before the first, for causal stages, where a sentence begins, and
    the codec; None: they need not know.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        wait_turn: Callable[[], None],
        key: int | None = None,
        lead_s: Callable[[], float] | None = None,
    ):
        self._state_size = state_size(checkpoint.codec)
        self._wait_turn, self._lead_s = wait_turn, lead_s
        self._key: dict[str, np.ndarray] = {} if key is None else dict(stream=np.array([key], np.int64))

    def _infer(self, model: str, inputs: dict[str, np.ndarray], *outputs: str) -> list[np.ndarray]:
        self._wait_turn()
        return infer(model, inputs, *outputs)

    def semantic(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int, due_s: float | None = None
    ) -> tuple[Ints, bool]:
        inputs = _causal_inputs(prefix, n_tokens, position, sampling, stream)
        inputs["min_eos_p"] = np.array([sampling.min_eos_p], np.float32)
        if due_s is not None:
            inputs["due_s"] = np.array([due_s], np.float32)
        inputs |= self._lead(position)
        tokens, ended = self._infer("bark_semantic", inputs, "tokens", "ended")
        return tokens, bool(ended[0])

    def coarse(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int, heads: Ints, windows: Ints
    ) -> Ints:
        inputs = _causal_inputs(prefix, n_tokens, position, sampling, stream)
        if len(heads):
            inputs |= dict(heads=heads, windows=windows)
        inputs |= self._lead(position)
        return self._infer("bark_coarse", inputs, "tokens")[0]

    def _lead(self, position: int) -> dict[str, np.ndarray]:
        if position or self._lead_s is None or (lead_s := self._lead_s()) <= 0:
            return {}
        return dict(lead_s=np.array([lead_s], np.float32))

    def fine(self, codes: Ints, fill_from: int, uniforms: Floats, temperature: float) -> Ints:
        return self._fine(codes, fill_from, uniforms, temperature)

    def fine_windows(self, codes: Ints, spans: Ints, uniforms: Floats, temperature: float) -> Ints:
        return self._fine(codes, int(spans[0, 1]), uniforms, temperature, windows=spans)

    def _fine(self, codes: Ints, fill_from: int, uniforms: Floats, temperature: float, **windows: Ints) -> Ints:
        inputs = dict(
            codes=codes,
            fill_from=np.array([fill_from], np.int32),
            uniforms=uniforms,
            temperature=np.array([temperature], np.float32),
            **windows,
            **self._key,
        )
        return self._infer("bark_fine", inputs, "filled")[0]

    def codec(self, codes: Ints, state: Floats) -> tuple[Floats, Floats]:
        inputs = dict(codes=codes, state=state, **self._key)
        if self._lead_s is not None and math.isfinite(lead_s := self._lead_s()):
            inputs["lead_s"] = np.array([lead_s], np.float32)
        audio, next_state = self._infer("bark_codec", inputs, "audio", "next_state")
        return audio, next_state

    def codec_state(self) -> Floats:
        return np.zeros(self._state_size, np.float32)

    def release(self, stream: int) -> None:
        """Free the stream's KV slots, also when it was cancelled: in both stages at once, for each may be in a batch.

        In stages that share a process, calls of the stream that wait are answered with what there is; elsewhere they run to their end.
        """
        inputs = _causal_inputs(np.zeros(1, np.int32), 0, 0, Sampling(), stream)
        with ThreadPoolExecutor(1) as other:
            coarse = other.submit(infer, "bark_coarse", inputs, "tokens")
            infer("bark_semantic", inputs | dict(min_eos_p=np.ones(1, np.float32)), "tokens")
            coarse.result()


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

    def __init__(self, stage: CausalStageName, args: dict[str, str]):
        """args: what Triton passes to `initialize`."""
        checkpoint = _checkpoint(_folder(args))
        self._is_semantic = stage == "semantic"
        self._semantic, self._coarse = checkpoint.semantic, checkpoint.coarse
        self._size = (checkpoint.semantic if self._is_semantic else checkpoint.coarse).size
        self._engine: HostedStage | OwnStage = _opened(_open_engine, stage, args)
        self._metrics = StageMetrics(pb_utils.MetricFamily, stage)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Calls of several streams, decoded together. A bad call gets its error; the others their tokens."""
        return _answer_calls(requests, self._row, self._response, self._engine, self._metrics)

    def _row(self, call: dict[str, np.ndarray]) -> Row:
        if ("heads" in call) != ("windows" in call):
            raise ValueError("heads and windows say together what follows: give both, or neither")
        chain = Chain.of(call["heads"], call["windows"], self._coarse) if "heads" in call else None
        one = {name: array[0].item() for name, array in call.items() if name not in ("prefix", "heads", "windows")}
        sampling = Sampling(one["seed"], one["temperature"], one["top_k"], one["top_p"], one.get("min_eos_p", 1.0))
        ids = (
            token_ids(call["prefix"], self._semantic)
            if self._is_semantic and one["n_tokens"]
            else call["prefix"][:, None]
        )
        told = dict(lead_s=one.get("lead_s", 0.0), due_s=one.get("due_s"))
        row = Row(ids, one["n_tokens"], one["position"], sampling, one["stream"], chain, **told)
        return row.checked(self._size) if row.n_tokens else row

    def _response(self, generation: Generation) -> Any:
        outputs = [pb_utils.Tensor("tokens", generation.tokens[None])]
        if self._is_semantic:
            outputs.append(pb_utils.Tensor("ended", np.array([[generation.ended]])))
        return pb_utils.InferenceResponse(outputs)


class FineStage:
    """`bark_fine` on the cuda engine: windows of several streams, filled together."""

    def __init__(self, args: dict[str, str]):
        """args: what Triton passes to `initialize`."""
        self._layout = _checkpoint(_folder(args)).fine
        self._engine: HostedStage | OwnStage = _opened(_open_engine, "fine", args)
        self._metrics = StageMetrics(pb_utils.MetricFamily, "fine")

    def execute(self, requests: list[Any]) -> list[Any]:
        return _answer_calls(requests, self._window, lambda codes: _outputs(filled=codes), self._engine, self._metrics)

    def _window(self, call: dict[str, np.ndarray]) -> Window | Windows:
        fill_from, temperature = call["fill_from"][0].item(), call["temperature"][0].item()
        window: Window | Windows = Window(call["codes"], fill_from, call["uniforms"], temperature)
        if "windows" in call:
            window = Windows(call["codes"], call["windows"], self._layout.window, call["uniforms"], temperature)
        window.check(self._layout)
        return window


class CodecStage:
    """`bark_codec` on the cuda engine: chunks of several streams, decoded together."""

    def __init__(self, args: dict[str, str]):
        """args: what Triton passes to `initialize`."""
        self._layout = _checkpoint(_folder(args)).codec
        self._engine: HostedStage | OwnStage = _opened(_open_engine, "codec", args)
        self._metrics = StageMetrics(pb_utils.MetricFamily, "codec")

    def execute(self, requests: list[Any]) -> list[Any]:
        def response(decoded: tuple[Floats, Floats]) -> Any:
            return _outputs(audio=decoded[0], next_state=decoded[1])

        return _answer_calls(requests, self._chunk, response, self._engine, self._metrics)

    def _chunk(self, call: dict[str, np.ndarray]) -> Chunk:
        state = call["state"]
        if np.array_equal(state, [0]):  # a new stream's: the profile's warm-up does not know its size
            state = np.zeros(state_size(self._layout), np.float32)
        chunk = Chunk(call["codes"], state, call["lead_s"][0].item() if "lead_s" in call else math.inf)
        check_chunk(chunk, self._layout)
        return chunk


def _open_engine(stage: StageName, args: dict[str, str]) -> Any:
    """As config.pbtxt's parameters ask for it: in this process, or in the one that a GPU's stages share."""
    folder, parameters = _folder(args), _parameters(args)
    config = json.loads(args["model_config"])
    spec = Spec(
        stage,
        parameters["engine"],
        folder / "model.onnx",
        _checkpoint(folder),
        int(config["max_batch_size"]),
        n_slots=int(parameters.get("kv_slots", 0)),
        frames=tuple(int(n) for n in parameters.get("warm_frames", "").split(",") if n.strip()),
        n_threads=int(parameters.get("n_threads", 0)),
        device=int(args["model_instance_device_id"]),
        bits=int(parameters.get("bits", 16)),
        kv_bits=int(parameters["kv_bits"]) if "kv_bits" in parameters else None,
    )
    if parameters.get("shares_process") != "true":
        return OwnStage(spec)
    gpus = sorted({gpu for group in config["instance_group"] for gpu in group.get("gpus", [])})
    return HostedStage([replace(spec, device=gpu) for gpu in gpus or [spec.device]], first=spec.device)


def _answer_calls(
    requests: list[Any],
    parse: Callable[[dict[str, np.ndarray]], Row | Window | Windows | Chunk],
    response: Callable[[Any], Any],
    engine: HostedStage | OwnStage,
    metrics: StageMetrics,
) -> list[Any]:
    """A response for each request. A bad call gets its error.

    parse: raises ValueError for a bad call's inputs. (Why responses are not sent one by one, when they are there: docs/architecture.md.)
    """
    calls: list[Any] = []
    inputs = [_arrays(request) for request in requests]
    for given in inputs:
        try:
            calls.append(parse(given))
        except ValueError as error:
            calls.append(error)
    if left := [call.stream for call in calls if _is_release(call)]:
        engine.release(*left)
        metrics.count(engine.take_news())  # now, not after this batch
    good = [i for i, call in enumerate(calls) if not (isinstance(call, ValueError) or _is_release(call))]
    answers = [NOTHING if _is_release(call) else call for call in calls]
    if good:
        results = engine.run([calls[i] for i in good], [_stream_of(inputs[i]) for i in good])
        for i, answer in zip(good, results, strict=True):
            answers[i] = answer
        metrics.count(engine.take_news())
    return [_failure(answer) if isinstance(answer, Exception) else response(answer) for answer in answers]


def _is_release(call: Any) -> bool:
    return isinstance(call, Row) and not call.n_tokens


def _failure(error: Exception) -> Any:
    code = pb_utils.TritonError.INVALID_ARG if isinstance(error, ValueError) else pb_utils.TritonError.INTERNAL
    return _error(str(error), code)


def _stream_of(call: dict[str, np.ndarray]) -> int:
    """The key of the stream whose call it is, 0 if it does not say."""
    return int(call["stream"][0]) if "stream" in call else 0


def _arrays(request: Any) -> dict[str, np.ndarray]:
    """A batched model's inputs, without the batch dimension."""
    return {tensor.name(): tensor.as_numpy()[0] for tensor in request.inputs()}


def _outputs(**arrays: np.ndarray) -> Any:
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, np.ascontiguousarray(array[None])) for name, array in arrays.items()]
    )


class Speaker:
    """`bark`: each request is a worker that pulls its chunks through the pipeline and sends them. One of `bark`'s instances."""

    def __init__(self, args: dict[str, str]):
        folder, parameters = _folder(args), _parameters(args)
        self._checkpoint = _checkpoint(folder)
        if parameters["sample_rate"] != str(self._checkpoint.codec.sample_rate):
            raise pb_utils.TritonModelException(
                f"bark/config.pbtxt says sample_rate {parameters['sample_rate']}, the checkpoint {self._checkpoint.codec.sample_rate}"
            )
        self._tokenizer = TextTokenizer(folder / "tokenizer.json", self._checkpoint.semantic)
        self._voices = load_voices(folder / "voices", self._checkpoint)
        self._schedule = _opened(_schedule, parameters, self._checkpoint)
        n = usable_gpus() if parameters.get("spread_streams") == "true" else 1  # limits are a GPU's
        self._peers = _opened(Peers, n, sockets_folder() / PEERS if _n_instances(args) > 1 else None)
        self._keys = StreamKeys(n, self._peers)
        hold_until_s = _opened(_seconds, "hold_until_s", parameters.get("hold_until_s", "0"))
        if math.isinf(hold_until_s):  # no first chunk would ever be sent
            raise pb_utils.TritonModelException("hold_until_s must be seconds that end: 0 or more, got 'inf'")
        self._hold = Hold(n * int(parameters.get("crowd", 0)), hold_until_s)
        self._quiet = n * int(parameters.get("quiet", 0)) or math.inf
        self._tells_lead = parameters.get("tells_lead") == "true"
        # A GPU's streams give way to one another, and to nobody else's.
        lead_s = _opened(_seconds, "pace_lead_s", parameters.get("pace_lead_s", "inf"))
        self._pacers = [Pacer(lead_s, peers=self._peers, gpu=gpu) for gpu in range(n)]
        most_s = n * _opened(_seconds, "max_backlog_s", parameters.get("max_backlog_s", "inf"))
        if math.isfinite(most_s) and math.isinf(lead_s):
            raise pb_utils.TritonModelException(
                "max_backlog_s counts what streams lack of pace_lead_s, which is 'inf': set both"
            )
        backlog = Backlog(most_s, lead_s, self._in_hand_s)
        self._admission = Admission(n * int(parameters["max_streams"]), self._peers, backlog)
        self._workers = ThreadPoolExecutor(self._admission.n_most, thread_name_prefix="stream")
        self._watch = Watch(self._admission.n_most)
        self._metrics = SpeakerMetrics(pb_utils.MetricFamily)
        spare_what_is_here()

    def submit(self, request: Any) -> None:
        """Start on a request, or refuse it at once when max_streams are under way, or max_backlog_s is owed."""
        sender = request.get_response_sender()
        if refusal := self._admission.enter(_goes_on(request)):
            self._metrics.refused.increment()
            return sender.send(_stream_error("UNAVAILABLE", refusal), flags=FINAL)
        self._workers.submit(self._work, request, sender, time.monotonic())
        return None

    def _in_hand_s(self) -> float:
        """Of all processes' streams."""
        return sum(pacer.in_hand_s for pacer in self._pacers) + self._peers.in_hand_elsewhere_s

    def close(self) -> None:
        self._workers.shutdown(wait=True)
        self._watch.close()
        self._peers.close()

    def _work(self, request: Any, sender: Any, admitted_at: float) -> None:
        """One request from first to last; sends FINAL exactly once, whatever happens."""
        self._metrics.live.increment()
        failure = None
        try:
            self._speak(request, sender, admitted_at)
        except Cancelled:
            self._metrics.cancelled.increment()
        except Exception as error:
            failure = error
        finally:
            self._metrics.live.increment(-1)
            self._admission.leave(time.monotonic() - admitted_at)
            if failure is None:
                sender.send(flags=FINAL)
            else:
                self._fail(sender, failure)

    def _fail(self, sender: Any, failure: Exception) -> None:
        """Tell the client, whatever it was: it must hear of it and not wait for ever."""
        status, whose, message = "INTERNAL", SPEAKER, str(failure)
        if isinstance(failure, BadRequest):
            status, whose = "INVALID_ARGUMENT", REQUEST
        elif isinstance(failure, StageFailed):
            whose = failure.model
        elif not isinstance(failure, NothingSaid):
            pb_utils.Logger.log_error(f"bark: {failure!r}")
            message = repr(failure)
        # In one call: FINAL in a second one crashes Triton 2.51 when the client asked for gRPC errors.
        sender.send(_stream_error(status, message), flags=FINAL)
        self._metrics.failed[whose].increment()

    def _speak(self, request: Any, sender: Any, admitted_at: float) -> None:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        text, voice_name = _string("text", given.pop("text")), given.pop("voice", None)
        prompts = {name: given.pop(name) for name in PROMPTS if name in given}
        turns = given.pop("speakers", np.empty(0, object))
        speakers = choose_speakers([_string("speakers", turn) for turn in turns.reshape(-1, 1)], self._voices)
        language = {"language": _string("language", given.pop("language"))} if "language" in given else {}
        options = SpeechOptions.parse({name: _single(name, array) for name, array in given.items()} | language)
        name = None if voice_name is None else _string("voice", voice_name)
        voice = choose_voice(name, prompts, self._voices, self._checkpoint)
        speech = Speech() if options.return_prompt else None
        with ExitStack() as until_over:
            key = until_over.enter_context(self._keys.key())
            pacer = self._pacers[key % self._keys.n_gpus]
            # offline, nobody listens yet
            player = until_over.enter_context(pacer.player(options.in_hand_s)) if options.streaming else None
            wait_turn = partial(self._wait_turn, pacer, player, sender.is_cancelled)
            lead_s = (lambda: player.lead_s) if player and self._tells_lead else None
            stages = TritonStages(self._checkpoint, wait_turn, key if self._keys.n_gpus > 1 else None, lead_s)
            until_over.enter_context(self._watch.listener(sender.is_cancelled, partial(stages.release, key)))
            schedule = self._schedule_among(self._admission.n_live)
            pipeline = Pipeline(self._checkpoint, self._tokenizer, stages, schedule, self._metrics.count_guard)
            chunks = pipeline.stream(text, options, voice, key, speech, speakers)
            for index, chunk in enumerate(chunks):
                is_awaited = index == 0 and options.streaming and not options.in_hand_s
                if is_awaited:  # meanwhile the second chunk's coarse tokens are on their way
                    self._hold_back(admitted_at, sender.is_cancelled)
                if sender.is_cancelled():
                    raise Cancelled
                sender.send(_speech_response(options.seed, chunk))
                self._count_chunk(pacer, player, len(chunk))
                if is_awaited:
                    self._metrics.first_chunk_s.observe(time.monotonic() - admitted_at)
        if options.return_prompt:
            sender.send(_speech_response(options.seed, np.zeros(0, np.float32), speech))

    def _hold_back(self, admitted_at: float, is_cancelled: Callable[[], bool]) -> None:
        """Before a first chunk, in a crowd; not for who has left."""
        while left_s := self._hold.left_s(self._admission.n_live, time.monotonic() - admitted_at):
            if is_cancelled():
                return
            time.sleep(min(left_s, CANCEL_CHECK_S))

    def _schedule_among(self, n_live: int) -> Schedule:
        """For a request that comes while so many are under way, itself included."""
        schedule = self._schedule if n_live <= self._quiet else self._schedule.in_company()
        return schedule.in_crowd() if self._hold.is_crowd(n_live) else schedule

    def _wait_turn(self, pacer: Pacer, player: Player | None, is_cancelled: Callable[[], bool]) -> None:
        """Before a stage call."""
        if player and (waited_s := pacer.wait(player, is_cancelled)):
            self._metrics.paced_s.increment(waited_s)
        if is_cancelled():
            raise Cancelled

    def _count_chunk(self, pacer: Pacer, player: Player | None, n_samples: int) -> None:
        audio_s = n_samples / self._checkpoint.codec.sample_rate
        self._metrics.audio_s.increment(audio_s)
        if player and pacer.take(player, audio_s):
            self._metrics.underruns.increment()


def _goes_on(request: Any) -> bool:
    """Whether its listener has enough in hand, of a request before. (What is wrong with it the request is told when it is read.)"""
    for tensor in request.inputs():
        if tensor.name() == "lead_s":
            with suppress(BadRequest):
                return SpeechOptions.parse({"lead_s": _single("lead_s", tensor.as_numpy())}).in_hand_s > 0
    return False


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


def _n_instances(args: dict[str, str]) -> int:
    groups = json.loads(args["model_config"])["instance_group"]
    return sum(int(group["count"]) * max(1, len(group.get("gpus", []))) for group in groups)


def _opened(open_engine: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """An engine, or a schedule; one that cannot be opened stops the server with its own sentence."""
    try:
        return open_engine(*arguments, **options)
    except (FileNotFoundError, RuntimeError, ValueError) as error:  # EngineError among them
        raise pb_utils.TritonModelException(str(error)) from None


def _seconds(name: str, given: str) -> float:
    with suppress(ValueError):
        if (seconds := float(given)) >= 0:
            return seconds
    raise ValueError(f"{name} must be seconds, 0 or more, got {given!r}")


def _schedule(parameters: dict[str, str], checkpoint: Checkpoint) -> Schedule:
    schedule = Schedule.parse(parameters)
    schedule.check(checkpoint)  # now, not when somebody wants to hear something
    return schedule


def _checkpoint(folder: Path) -> Checkpoint:
    path = folder / "checkpoint.json"
    if not path.exists():
        raise pb_utils.TritonModelException(
            f"{path} is missing: run `make export` (or `barkstream export CHECKPOINT`) first"
        )
    return Checkpoint.load(path)
