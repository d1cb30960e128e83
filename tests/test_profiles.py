"""Deployment profiles: `configs/<profile>.pbtxt` says how a model runs, never what it takes and gives."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from barkstream.options import Schedule
from barkstream.server import MODEL_REPOSITORY

PROFILES = sorted(MODEL_REPOSITORY.glob("*/configs/*.pbtxt"))
SPEAKER = {"sample_rate", "max_streams", "pace_lead_s"} | {field.name for field in fields(Schedule)}
KNOWN = {
    "bark": SPEAKER,
    "bark_semantic": {"engine", "shares_process", "kv_slots", "n_threads"},
    "bark_coarse": {"engine", "shares_process", "kv_slots", "n_threads"},
    "bark_fine": {"engine", "shares_process", "warm_frames"},
    "bark_codec": {"engine", "shares_process", "warm_frames"},
}


def config(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def interface(path: Path) -> tuple:
    """What a caller sees. (Ragged batching is the server's own affair.)"""
    c = config(path)
    inputs = [(i.name, i.data_type, tuple(i.dims), i.optional) for i in c.input]
    outputs = [(o.name, o.data_type, tuple(o.dims)) for o in c.output]
    return c.name, inputs, outputs, c.model_transaction_policy.decoupled, c.max_batch_size > 0


def model_of(path: Path) -> Path:
    return path.parents[1]


def test_every_model_has_the_cuda_profile():
    assert {model_of(path).name for path in PROFILES if path.stem == "cuda"} == set(KNOWN)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{model_of(path).name}-{path.stem}")
def test_a_profile_takes_and_gives_what_the_default_does(path):
    assert interface(path) == interface(model_of(path) / "config.pbtxt")


@pytest.mark.parametrize("path", [*PROFILES, *sorted(MODEL_REPOSITORY.glob("*/config.pbtxt"))], ids=str)
def test_every_parameter_is_one_that_is_read(path):
    c = config(path)
    assert set(c.parameters) <= KNOWN[c.name]


@pytest.mark.parametrize("path", [path for path in PROFILES if model_of(path).name != "bark"], ids=str)
def test_every_stage_of_the_cuda_profile_runs_on_gpus_and_has_its_model(path):
    c = config(path)
    assert c.backend == "python" and (model_of(path) / "1" / "model.py").exists()
    assert [group.kind for group in c.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_GPU]


def test_the_cuda_profiles_schedule_is_one_that_can_be_kept():
    parameters = config(MODEL_REPOSITORY / "bark/configs/cuda.pbtxt").parameters
    schedule = Schedule.parse({key: value.string_value for key, value in parameters.items()})
    assert not schedule.ahead_at_once
