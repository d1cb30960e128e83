"""Deployment profiles: `configs/<profile>.pbtxt` says how a model runs, never what it takes and gives."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from barkstream.clients.cli import main
from barkstream.coarse import n_coarse_tokens
from barkstream.export.checkpoint import open_huggingface
from barkstream.options import Schedule
from barkstream.profiles import shortages
from barkstream.server import MODEL_REPOSITORY, Server, ServerError

NANO_BARK = Path(__file__).resolve().parents[1] / "checkpoints" / "nano-bark"
PROFILES = sorted(MODEL_REPOSITORY.glob("*/configs/*.pbtxt"))
SPEAKER = {
    "sample_rate",
    "max_streams",
    "spread_streams",
    "pace_lead_s",
    "max_backlog_s",
    "crowd",
    "hold_until_s",
    "quiet",
    "tells_lead",
} | {field.name for field in fields(Schedule)}
KNOWN = {
    "bark": SPEAKER,
    "bark_semantic": {"engine", "shares_process", "kv_slots", "n_threads", "bits", "kv_bits"},
    "bark_coarse": {"engine", "shares_process", "kv_slots", "n_threads", "bits", "kv_bits"},
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


@pytest.mark.parametrize("model", KNOWN)
@pytest.mark.parametrize(("profile", "parameter"), [("cuda-int8", "bits"), ("cuda-kv8", "kv_bits")])
def test_8_bits_are_all_that_sets_these_profiles_apart(profile, parameter, model):
    ours, base = (config(MODEL_REPOSITORY / model / "configs" / f"{name}.pbtxt") for name in (profile, "cuda"))
    if parameter in KNOWN[model]:
        assert ours.parameters[parameter].string_value == "8"
        del ours.parameters[parameter]
    assert ours == base


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{model_of(path).name}-{path.stem}")
def test_a_profile_takes_and_gives_what_the_default_does(path):
    """But for whose call it is, which fine and codec may be told: it says on which GPU. And fine takes several windows a call, and the
    codec is told what the listener has in hand."""
    name, inputs, *rest = interface(path)
    told = ("stream", model_config_pb2.TYPE_INT64, (1,), True)
    windows = ("windows", model_config_pb2.TYPE_INT32, (-1, 2), True)
    lead = ("lead_s", model_config_pb2.TYPE_FP32, (1,), True)
    assert (told in inputs) == (name in ("bark_fine", "bark_codec")) and (windows in inputs) == (name == "bark_fine")
    own = told, windows, *[lead] * (name == "bark_codec")
    assert (lead in inputs) == (name != "bark_fine")
    same = [each for each in inputs if each not in own]
    assert (name, same, *rest) == interface(model_of(path) / "config.pbtxt")


@pytest.mark.parametrize("path", [*PROFILES, *sorted(MODEL_REPOSITORY.glob("*/config.pbtxt"))], ids=str)
def test_every_parameter_is_one_that_is_read(path):
    c = config(path)
    assert set(c.parameters) <= KNOWN[c.name]


@pytest.mark.parametrize("path", [path for path in PROFILES if model_of(path).name != "bark"], ids=str)
def test_every_stage_of_the_cuda_profile_runs_on_gpus_and_has_its_model(path):
    c = config(path)
    assert c.backend == "python" and (model_of(path) / "1" / "model.py").exists()
    assert [group.kind for group in c.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_GPU]


@pytest.mark.parametrize("stage", ["semantic", "coarse", "fine", "codec"])
def test_every_instance_of_a_stage_has_its_first_call_before_the_server_is_ready(stage):
    (call,) = config(MODEL_REPOSITORY / f"bark_{stage}" / "configs" / "cuda.pbtxt").model_warmup
    if stage == "codec":  # the first long answer of an instance takes longer, too
        checkpoint = open_huggingface(NANO_BARK).checkpoint
        n_most = n_coarse_tokens(checkpoint.semantic.max_new_tokens, checkpoint.coarse)
        assert call.inputs["codes"].dims[1] >= n_most // checkpoint.coarse.n_codebooks


@pytest.mark.parametrize("stage", ["semantic", "coarse", "fine", "codec"])
@pytest.mark.parametrize("profile", ["cuda", "cuda-kv8", "cuda-int8"])
def test_in_the_cuda_profiles_an_instance_takes_one_call_at_a_time(stage, profile):
    """It would answer a batch when all of it is there."""
    batching = config(MODEL_REPOSITORY / f"bark_{stage}" / "configs" / f"{profile}.pbtxt").dynamic_batching
    assert list(batching.preferred_batch_size) == [1] and not batching.max_queue_delay_microseconds


def parameters(model: str, path: str) -> dict[str, str]:
    return {key: value.string_value for key, value in config(MODEL_REPOSITORY / model / path).parameters.items()}


def test_the_cuda_profiles_schedule_is_one_that_can_be_kept():
    schedule = Schedule.parse(parameters("bark", "configs/cuda.pbtxt"))
    assert not schedule.ahead_at_once


def test_the_cuda_profiles_long_calls_carry_a_whole_sentence_and_leave_others_instances():
    given = parameters("bark", "configs/cuda.pbtxt")
    schedule, checkpoint = Schedule.parse(given), open_huggingface(NANO_BARK).checkpoint
    n_most = checkpoint.semantic.max_new_tokens
    assert schedule.offline_semantic_call >= n_most
    assert schedule.offline_coarse_windows >= n_coarse_tokens(n_most, checkpoint.coarse) / checkpoint.coarse.window
    assert schedule.coarse_windows[:2] == (1, 1)  # a listener's first chunks take one each
    for stage in ("semantic", "coarse"):
        (instances,) = config(MODEL_REPOSITORY / f"bark_{stage}" / "configs" / "cuda.pbtxt").instance_group
        assert int(given["quiet"]) < instances.count


def test_without_a_profile_the_schedule_is_the_librarys():
    assert Schedule.parse(parameters("bark", "config.pbtxt")) == Schedule()


def silences_s(schedule: Schedule, coarse_hz: float, n_chunks: int = 40) -> list[float]:
    """Seconds that a player who starts at the first chunk waits before each of the next ones.

    Coarse codes come at an even pace, 30 frames at a time; a chunk is sent when those up to its look-ahead's end are there.
    """
    end, played_s, silences = 0, 0.0, []
    for index in range(n_chunks):
        end += schedule.chunk(index)
        sent_s = -(-(end + schedule.lookahead(index)) // 30) * 30 / coarse_hz
        silences.append(max(0.0, sent_s - played_s))
        played_s = max(played_s, sent_s) + schedule.chunk(index) / 75
    return silences[1:]


@pytest.mark.parametrize(("profile", "coarse_hz"), [("config.pbtxt", 75 / 0.68), ("configs/cuda.pbtxt", 75 / 0.4)])
def test_no_lookahead_grows_faster_than_the_speed_that_its_profile_is_for(profile, coarse_hz):
    schedule = Schedule.parse(parameters("bark", profile))
    assert sum(silences_s(schedule, coarse_hz)) == 0
    assert schedule.lookahead(40) > schedule.lookahead(0)
    hasty = replace(schedule, fine_lookahead=(schedule.lookahead(0), 66))
    assert sum(silences_s(hasty, coarse_hz)) > 0  # the claim is not an empty one


def test_the_cuda_profiles_fine_windows_have_their_graphs():
    """One that has none is captured while a listener waits."""
    given = Schedule.parse(parameters("bark", "configs/cuda.pbtxt"))
    warm = [int(n) for n in parameters("bark_fine", "configs/cuda.pbtxt")["warm_frames"].split(",")]
    widest = max(
        each.fine_context + each.chunk(i) + each.lookahead(i) for each in (given, given.later()) for i in range(10)
    )
    assert widest <= given.fine_window  # so all are equally long, and need no mask
    assert given.fine_window in warm and 1024 in warm  # the latter: offline
    assert 4 * given.fine_window <= 1024  # four go together (cuda_fine.FREE_FRAMES)


def parameter(model: str, profile: str, name: str, repository: Path = MODEL_REPOSITORY) -> str:
    return config(repository / model / "configs" / f"{profile}.pbtxt").parameters[name].string_value


def n_instances(model: str, profile: str, repository: Path = MODEL_REPOSITORY) -> int:
    (group,) = config(repository / model / "configs" / f"{profile}.pbtxt").instance_group
    return group.count


@pytest.mark.parametrize("profile", ["cuda", "cuda-int8", "cuda-kv8"])
@pytest.mark.parametrize("stage", ["bark_semantic", "bark_coarse"])
def test_the_cuda_profiles_have_a_slot_and_an_instance_for_each_stream(stage, profile):
    """Calls for which there is no instance wait in Triton's queue, first come, first served."""
    n_streams = int(parameter("bark", profile, "max_streams"))
    assert int(parameter(stage, profile, "kv_slots")) >= n_streams and n_instances(stage, profile) >= n_streams


@pytest.fixture
def repository(tmp_path):
    """The configurations alone."""
    for path in [*PROFILES, *MODEL_REPOSITORY.glob("*/config.pbtxt")]:
        copy = tmp_path / path.relative_to(MODEL_REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path


def write(repository: Path, *arguments: str) -> int:
    return main(["profile", *arguments, "--model-repository", str(repository)])


def test_a_profile_of_ones_own_differs_in_what_was_asked_for_alone(repository):
    assert not write(repository, "many", "--like", "cuda-int8", "--streams", "52", "--set", "pace_lead_s=3")
    for model in KNOWN:
        path = repository / model / "configs"
        ours, base = config(path / "many.pbtxt"), config(path / "cuda-int8.pbtxt")
        if model == "bark":
            base.parameters["max_streams"].string_value, base.parameters["pace_lead_s"].string_value = "52", "3"
        elif "kv_slots" in KNOWN[model]:
            base.parameters["kv_slots"].string_value, base.instance_group[0].count = "52", 52
        assert ours == base


def test_a_profile_of_ones_own_may_be_like_another(repository):
    assert not write(repository, "many", "--like", "cuda-kv8", "--streams", "52")
    assert not write(repository, "more", "--like", "many", "--set", "sliding_window_len=0, 0, 120")
    assert (
        parameter("bark", "more", "max_streams", repository) == "52"
        and n_instances("bark_coarse", "more", repository) == 52
    )
    assert parameter("bark", "more", "sliding_window_len", repository) == "0, 0, 120"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["many", "--like", "cuda-int9"], "no profile 'cuda-int9'"),
        (["many", "--like", "cuda", "--set", "max_stream=4"], "no parameter 'max_stream': there are sample_rate, max_streams"),
        (["cuda-int8", "--like", "cuda"], "there is a profile 'cuda-int8': choose another name, or delete"),
        (["../many", "--like", "cuda"], "a profile's name has letters, digits"),
    ],
)  # fmt: skip
def test_a_profile_that_cannot_be_written_is_refused_and_nothing_is_written(repository, capsys, arguments, said):
    before = {path: path.read_text() for path in repository.rglob("*.pbtxt")}
    assert write(repository, *arguments) == 1
    assert said in capsys.readouterr().err
    assert {path: path.read_text() for path in repository.rglob("*.pbtxt")} == before


def test_instances_that_would_stay_as_they_are_are_refused(repository, capsys):
    stage = repository / "bark_coarse" / "configs" / "cuda.pbtxt"
    stage.write_text(stage.read_text().replace("instance_group [ {", "instance_group [ {\n"))
    assert write(repository, "many", "--like", "cuda", "--streams", "52") == 1
    assert f"{stage}: write the instances on one line" in capsys.readouterr().err
    assert not list(repository.rglob("many.pbtxt"))


@pytest.mark.parametrize("wrong", [["--streams", "0"], ["--streams", "many"], ["--set", "pace_lead_s"]])
def test_numbers_and_settings_that_are_none_are_wrong_usage(repository, wrong):
    with pytest.raises(SystemExit) as exit_:
        write(repository, "many", "--like", "cuda", *wrong)
    assert exit_.value.code == 2


@pytest.mark.parametrize("profile", [None, "cuda", "cuda-int8", "cuda-kv8"])
def test_no_profile_of_ours_has_fewer_instances_than_streams(profile):
    assert not shortages(MODEL_REPOSITORY, profile)


def test_fewer_instances_than_streams_are_warned_of_when_the_server_starts(repository, tmp_path, capsys):
    write(repository, "many", "--like", "cuda", "--set", "max_streams=50")
    write(repository, "enough", "--like", "many", "--streams", "50")
    assert not shortages(repository, "enough")
    semantic, coarse = shortages(repository, "many")
    assert semantic.startswith("bark_semantic has 32 instances for 50 streams")
    with pytest.raises(ServerError):  # there are no weights, nor a GPU
        Server(repository, profile="many").start()
    assert f"warning: {coarse}" in capsys.readouterr().err
