"""Triton backend `onnxruntime` in Python: serves a model's `model.onnx` with the onnxruntime package.

Triton runs it for every model with `backend: "onnxruntime"` where there is no native one ("Python-based backend": a
folder of that name with a model.py in the backend directory). The same config.pbtxt and artifact work with both. What
the native backend reads from `parameters` is read here too: intra_op_thread_count, inter_op_thread_count and
execution_mode (1: parallel), and session configuration entries by their name, as `session.intra_op.allow_spinning`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

# Several models share the cores: a pool that spins after its last run takes them from the one that works now. Measured
# on two cores, 19 s of speech with nano-bark: CPU time of fine 7.8 s with spinning, 3.8 s without; codec 1.7 s and .5 s.
DEFAULT_ENTRIES = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}
HOW_TO_EXPORT = "run `make export` (or `barkstream export CHECKPOINT`)"

Arrays = dict[str, np.ndarray]


class TritonPythonModel:
    """One instance of one model: a session, and the names that the config gives its inputs and outputs."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact on the instance's device. TritonModelException says what is wrong and what to do."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], config["default_model_filename"] or "model.onnx")
        providers = choose_providers(args["model_instance_kind"], int(args["model_instance_device_id"]))
        self._session = load_session(path, session_options(config["parameters"]), providers)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._batches = config["max_batch_size"] > 0
        check_names(path, "input", self._inputs, [node.name for node in self._session.get_inputs()])
        check_names(path, "output", self._outputs, [node.name for node in self._session.get_outputs()])

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request, in order; those of equal shapes go through the model together."""
        feeds = [self._feed(request) for request in requests]
        groups = defaultdict(list)
        for i, feed in enumerate(feeds):
            groups[shape_key(feed) if self._batches else i].append(i)
        responses: list[Any] = [None] * len(requests)
        for members in groups.values():
            for i, result in zip(members, self._run([feeds[i] for i in members]), strict=True):
                responses[i] = self._response(result, requests[i].requested_output_names())
        return responses

    def _feed(self, request: Any) -> Arrays:
        return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}

    def _run(self, feeds: list[Arrays]) -> Sequence[Arrays | Exception]:
        """Each feed's outputs, or its own failure: a batch that fails is run again one by one."""
        try:
            return self._run_together(feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            if len(feeds) == 1:
                return [error]
            return [self._run([feed])[0] for feed in feeds]

    def _run_together(self, feeds: list[Arrays]) -> list[Arrays]:
        if len(feeds) == 1:
            return [dict(zip(self._outputs, self._session.run(self._outputs, feeds[0]), strict=True))]
        batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in self._inputs}
        ends = np.cumsum([len(feed[self._inputs[0]]) for feed in feeds])[:-1]
        parts = [np.split(array, ends) for array in self._session.run(self._outputs, batch)]
        return [dict(zip(self._outputs, arrays, strict=True)) for arrays in zip(*parts, strict=True)]

    def _response(self, result: Arrays | Exception, names: list[str]) -> Any:
        if isinstance(result, Exception):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), pb_utils.TritonError.INTERNAL))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, result[name]) for name in names])


def shape_key(feed: Arrays) -> tuple[tuple[int, ...], ...]:
    """Requests with the same key can be joined along the batch dimension, the first one."""
    return tuple(array.shape[1:] for array in feed.values())


def session_options(parameters: dict[str, dict[str, str]]) -> onnxruntime.SessionOptions:
    """ONNX Runtime's options from a model's `parameters`."""
    values = {name: value["string_value"] for name, value in parameters.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(values.get("intra_op_thread_count", 0))  # 0: one a core
    options.inter_op_num_threads = int(values.get("inter_op_thread_count", 0))
    if values.get("execution_mode") == "1":
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    entries = {name: value for name, value in values.items() if name.startswith(("session.", "optimization."))}
    for name, value in {**DEFAULT_ENTRIES, **entries}.items():
        options.add_session_config_entry(name, value)
    return options


def choose_providers(kind: str, device: int) -> list[Any]:
    """Execution providers of an instance: CPU, or CUDA alone. Never a CPU in place of a GPU that was asked for."""
    if kind != "GPU":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise pb_utils.TritonModelException(
            "instance_group asks for a GPU and the installed onnxruntime has no CUDA: "
            "install onnxruntime-gpu in its place, or use KIND_CPU"
        )
    return [("CUDAExecutionProvider", {"device_id": device})]


def load_session(path: Path, options: onnxruntime.SessionOptions, providers: list[Any]) -> onnxruntime.InferenceSession:
    """The artifact's session on the first of `providers`; TritonModelException if either is not to be had."""
    if not path.exists():
        raise pb_utils.TritonModelException(f"{path} is missing: {HOW_TO_EXPORT}")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise pb_utils.TritonModelException(f"{path} is damaged or does not fit: {error}: {HOW_TO_EXPORT}") from None
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        raise pb_utils.TritonModelException(f"ONNX Runtime could not start {wanted}: its log above says why")
    return session


def check_names(path: Path, what: str, configured: list[str], actual: list[str]) -> None:
    """TritonModelException if config.pbtxt names tensors that the artifact does not have, or leaves an input out."""
    unknown = set(configured) - set(actual)
    absent = set(actual) - set(configured) if what == "input" else set()
    if unknown or absent:
        raise pb_utils.TritonModelException(
            f"{path} has the {what}s {sorted(actual)}, config.pbtxt says {sorted(configured)}: {HOW_TO_EXPORT}"
        )
