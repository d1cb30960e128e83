"""Claims about the launcher and the Python-based ONNX Runtime backend, on live servers with small models."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper

from barkstream import server as launcher
from barkstream import threads
from barkstream.profiles import with_parameters
from barkstream.server import Server, ServerError

pytestmark = pytest.mark.server

LOOKUP_CONFIG = """
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "ids" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "values" data_type: TYPE_FP32 dims: [ -1 ] } ]
dynamic_batching { max_queue_delay_microseconds: 300000 }
instance_group [ { kind: KIND_CPU count: 1 } ]
parameters [ { key: "intra_op_thread_count" value: { string_value: "1" } } ]
"""
PYTHON_CONFIG = """
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
PYTHON_MODEL = """
import os
import barkstream.tokens
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def initialize(self, args):
        {initialize}
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", r.inputs()[0].as_numpy())]) for r in requests]
"""
CROWD_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils
from concurrent.futures import ThreadPoolExecutor
class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", self.ask(r.inputs()[0].as_numpy()))]) for r in requests]
    def ask(self, x):
        with ThreadPoolExecutor(len(x)) as pool:
            return np.array(list(pool.map(self.look_up, x)), np.float32)
    def look_up(self, x):
        ids = pb_utils.Tensor("ids", np.array([[x]], np.int32))
        answer = pb_utils.InferenceRequest(model_name="lookup", requested_output_names=["values"], inputs=[ids]).exec()
        return pb_utils.get_output_tensor_by_name(answer, "values").as_numpy()[0, 0]
"""
OWNER = """
import sys, time
from barkstream.server import Server
server = Server(sys.argv[1])
server.start()
print(server.pid, flush=True)
time.sleep(99)
"""
SERVE = """
import sys
from barkstream.server import serve
sys.exit(serve(sys.argv[1], grpc_port=0, http_port=0, metrics_port=0))
"""


def add_lookup(repository: Path) -> Path:
    """A model that looks ids up in a table of three rows: an id of 3 is an error. Returns its artifact."""
    ids = helper.make_tensor_value_info("ids", TensorProto.INT32, ["B", "N"])
    values = helper.make_tensor_value_info("values", TensorProto.FLOAT, ["B", "N"])
    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [10.0, 11.0, 12.0])
    node = helper.make_node("Gather", ["table", "ids"], ["values"])
    graph = helper.make_graph([node], "lookup", [ids], [values], [table])
    path = repository / "lookup" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.parents[1].joinpath("config.pbtxt").write_text(LOOKUP_CONFIG)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def add_python(repository: Path, initialize: str = "pass") -> Path:
    """A model that answers with its input. Returns its model.py."""
    path = repository / "echo" / "1" / "model.py"
    path.parent.mkdir(parents=True)
    path.parents[1].joinpath("config.pbtxt").write_text(PYTHON_CONFIG)
    path.write_text(PYTHON_MODEL.format(initialize=initialize))
    return path


def add_crowd(repository: Path) -> None:
    """A model that looks all its numbers up in the other one, by as many calls at once."""
    path = repository / "crowd" / "1" / "model.py"
    path.parent.mkdir(parents=True)
    path.parents[1].joinpath("config.pbtxt").write_text(PYTHON_CONFIG)
    path.write_text(CROWD_MODEL)


def look_up(client: triton.InferenceServerClient, ids: list[int]) -> list[float]:
    tensor = triton.InferInput("ids", [1, len(ids)], "INT32")
    tensor.set_data_from_numpy(np.array([ids], np.int32))
    return client.infer("lookup", [tensor]).as_numpy("values")[0].tolist()


@pytest.fixture
def scratch(tmp_path_factory, monkeypatch) -> Path:
    """Where the servers of one test, and of its child processes, put their folders."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def regions(name: str) -> list[Path]:
    """Shared memory of the server whose folder has this name."""
    return list(Path("/dev/shm").glob(f"{name}*"))


def descendants(pid: int) -> list[int]:
    """Process ids of `pid` and all below it."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(line.split()[0]): int(line.split()[1]) for line in listing.splitlines()}
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def is_gone(pids: list[int]) -> bool:
    return not any(Path("/proc", str(pid)).exists() for pid in pids)


def wait_until_gone(pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not is_gone(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_gone(pids)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """A live server with the two small models."""
    repository = tmp_path_factory.mktemp("repository")
    add_lookup(repository)
    add_python(repository)
    with Server(repository) as running:
        yield running


@pytest.fixture
def client(small: Server):
    with triton.InferenceServerClient(small.grpc_url) as client:
        yield client


def test_a_stopped_server_leaves_no_process_and_no_trace(tmp_path, scratch):
    add_lookup(tmp_path)
    add_python(tmp_path)
    with Server(tmp_path) as running:
        pids = descendants(running.pid)
        assert len(pids) == 4  # supervisor, tritonserver, a stub for each model
        (folder,) = scratch.glob("barkstream-*")
        assert regions(folder.name)
    assert is_gone(pids)
    assert not folder.exists()
    assert not regions(folder.name)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_an_owner_that_is_killed_takes_its_server_along(tmp_path, scratch, kill):
    add_python(tmp_path)
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True) as owner:
        pids = descendants(int(owner.stdout.readline()))
        (folder,) = scratch.glob("barkstream-*")
        owner.send_signal(kill)
    assert wait_until_gone(pids)
    assert not folder.exists()
    assert not regions(folder.name)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_cleanly_when_told_to(tmp_path, scratch, stop):
    add_python(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as serving:
        assert serving.stdout.readline().startswith("ready: gRPC 127.0.0.1:")
        pids = descendants(serving.pid)
        (folder,) = scratch.glob("barkstream-*")
        serving.send_signal(stop)
        assert serving.wait(20) == 0
        assert "Traceback" not in serving.stderr.read()
    assert is_gone(pids)
    assert not folder.exists()
    assert not regions(folder.name)


def test_a_server_that_crashes_is_noticed_and_cleaned_up(tmp_path, scratch):
    add_python(tmp_path)
    with Server(tmp_path) as running:
        pids = descendants(running.pid)
        (folder,) = scratch.glob("barkstream-*")
        os.kill(pids[1], signal.SIGSEGV)  # tritonserver
        assert running.wait() == 128 + signal.SIGSEGV
    assert is_gone(pids)
    assert not folder.exists()
    assert not regions(folder.name)


def test_health_and_metrics_answer(small):
    with urllib.request.urlopen(f"{small.http_url}/v2/health/ready", timeout=5) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(small.metrics_url, timeout=5) as answer:
        assert b"nv_inference_request_success" in answer.read()


@pytest.mark.parametrize("path", ["systemsharedmemory/status", "repository/index", "logging", "trace/setting"])
def test_what_only_an_operator_should_reach_is_closed(small, path):
    body = b"{}" if path == "repository/index" else None
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(f"{small.http_url}/v2/{path}", body), timeout=5)


def test_requests_of_one_shape_go_through_the_model_together(small, client):
    def n_executions() -> int:
        return client.get_inference_statistics("lookup").model_stats[0].execution_count

    before = n_executions()
    asked = [[i % 3, 2 - i % 3] for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda ids: look_up(client, ids), asked))
    assert answers == [[10.0 + i for i in ids] for ids in asked]
    assert n_executions() - before < 8


def test_a_model_may_have_many_calls_of_another_under_way(tmp_path, monkeypatch):
    """Batches of 64 that wait 3 s for company: 64 calls make one only if all of them come."""
    add_lookup(tmp_path)
    config = tmp_path / "lookup" / "config.pbtxt"
    config.write_text(
        config.read_text().replace("max_batch_size: 8", "max_batch_size: 64").replace("300000", "3000000")
    )
    add_crowd(tmp_path)

    def seconds():
        with Server(tmp_path) as running, triton.InferenceServerClient(running.grpc_url) as client:
            tensor = triton.InferInput("x", [64], "FP32")
            tensor.set_data_from_numpy(np.arange(64, dtype=np.float32) % 3)
            started = time.monotonic()
            assert client.infer("crowd", [tensor]).as_numpy("y").tolist() == [10.0 + i % 3 for i in range(64)]
            return time.monotonic() - started

    assert seconds() < 2
    monkeypatch.setattr(threads, "BLS_THREADS", 32)  # Triton's own number
    assert seconds() > 5  # two halves, and each waits in vain


def test_a_bad_request_fails_alone(client):
    def ask(ids: list[int]) -> list[float] | str:
        try:
            return look_up(client, ids)
        except triton.InferenceServerException as error:
            return error.message()

    with ThreadPoolExecutor(4) as pool:  # the four share a batch: same shape, 300 ms of queue delay
        answers = list(pool.map(ask, [[0, 1], [0, 3], [2, 2], [1, 1]]))
    assert answers[0] == [10, 11]
    assert "out of data bounds" in answers[1]
    assert answers[2:] == [[12, 12], [11, 11]]


def test_a_missing_artifact_says_how_to_make_it(tmp_path):
    path = add_lookup(tmp_path)
    path.unlink()
    with pytest.raises(ServerError, match=f"failed to load 'lookup'.*{path} is missing: run `make export`"):
        Server(tmp_path).start()


def test_a_truncated_artifact_says_so(tmp_path):
    path = add_lookup(tmp_path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ServerError, match=f"{path} is damaged .*run `make export`"):
        Server(tmp_path).start()


@pytest.mark.parametrize("stage", ["bark_coarse", "bark_codec"])  # a Python model, and one of the backend's
@pytest.mark.parametrize("kept", [0, 0.5])
def test_half_an_artifact_of_bark_or_none_says_how_to_make_it(repository, tmp_path, stage, kept):
    shutil.copytree(repository / stage, tmp_path / stage)
    artifact = tmp_path / stage / "1" / "model.onnx"
    whole = artifact.read_bytes()
    artifact.unlink()
    if kept:
        artifact.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ServerError, match=rf"(?s)failed to load '{stage}'.*make export"):
        Server(tmp_path).start()


def test_a_model_without_a_version_says_how_to_make_it(tmp_path):
    shutil.rmtree(add_lookup(tmp_path).parent)  # as in a fresh clone, where nothing of a stage is in its folder
    with pytest.raises(ServerError, match="failed to load model 'lookup'.*run `make export`"):
        Server(tmp_path).start()


def test_a_mistake_in_a_configuration_is_shown(tmp_path):
    config = add_lookup(tmp_path).parents[1] / "config.pbtxt"
    config.write_text(LOOKUP_CONFIG + "max_bath_size: 4")
    with pytest.raises(ServerError, match=r'(?s)no field named "max_bath_size".*Poll failed .*lookup'):
        Server(tmp_path).start()


@pytest.mark.parametrize("wrong", ["soon", "-1", "nan"])
def test_a_lead_that_is_no_time_stops_the_server_with_what_would_be_right(repository, tmp_path, wrong):
    shutil.copytree(repository / "bark", tmp_path / "bark")
    config = tmp_path / "bark" / "config.pbtxt"
    config.write_text(re.sub(r'("pace_lead_s" value: { string_value: )"4"', rf'\1"{wrong}"', config.read_text()))
    with pytest.raises(
        ServerError, match=f"(?s)failed to load 'bark'.*pace_lead_s must be seconds, 0 or more, got '{wrong}'"
    ):
        Server(tmp_path).start()


@pytest.mark.parametrize(
    ("wrong", "said"), [("soon", "hold_until_s must be seconds, 0 or more, got 'soon'"), ("inf", "hold_until_s must be seconds that end")]
)  # fmt: skip
def test_a_hold_that_never_ends_stops_the_server(repository, tmp_path, wrong, said):
    shutil.copytree(repository / "bark", tmp_path / "bark")
    config = tmp_path / "bark" / "config.pbtxt"
    own = f'parameters [ {{ key: "hold_until_s" value: {{ string_value: "{wrong}" }} }} ]'
    config.write_text(f"{config.read_text()}\n{own}\n")
    with pytest.raises(ServerError, match=f"(?s)failed to load 'bark'.*{said}"):
        Server(tmp_path).start()


def test_a_backlog_without_a_lead_to_measure_it_by_stops_the_server(repository, tmp_path):
    shutil.copytree(repository / "bark", tmp_path / "bark")
    config = tmp_path / "bark" / "config.pbtxt"
    config.write_text(with_parameters(config.read_text(), {"pace_lead_s": "inf", "max_backlog_s": "60"}))
    with pytest.raises(
        ServerError, match="(?s)failed to load 'bark'.*max_backlog_s counts what streams lack of pace_lead_s"
    ):
        Server(tmp_path).start()


def test_onnx_runtime_reports_to_nobody(small):
    files = [os.readlink(file) for pid in descendants(small.pid) for file in Path(f"/proc/{pid}/fd").iterdir()]
    assert files
    assert not [file for file in files if "onnxruntime.db" in file]


def test_a_tensor_that_the_artifact_lacks_is_named(tmp_path):
    config = add_lookup(tmp_path).parents[1] / "config.pbtxt"
    config.write_text(LOOKUP_CONFIG.replace('"values"', '"result"'))
    with pytest.raises(ServerError, match=r"outputs \['values'\], config.pbtxt says \['result'\]"):
        Server(tmp_path).start()


def test_a_gpu_that_is_asked_for_is_never_replaced_by_a_cpu():
    sys.modules.setdefault("triton_python_backend_utils", type(sys)("stub"))
    code = (launcher.OUR_BACKENDS / "onnxruntime" / "model.py").read_text()
    module: dict[str, object] = {"__name__": "model"}
    exec(code, module)
    module["pb_utils"].TritonModelException = RuntimeError
    cpu_only = {"get_available_providers": staticmethod(lambda: ["CPUExecutionProvider"])}
    module["onnxruntime"] = type("CpuOnly", (), cpu_only)
    assert module["choose_providers"]("CPU", 0) == ["CPUExecutionProvider"]
    with pytest.raises(RuntimeError, match="no CUDA"):
        module["choose_providers"]("GPU", 0)


def test_a_model_that_raises_shows_where(tmp_path):
    add_python(tmp_path, "raise ValueError('no such table')")
    with pytest.raises(ServerError, match=r"(?s)failed to load 'echo'.*ValueError: no such table.*model.py\(7\)"):
        Server(tmp_path).start()


def test_a_model_that_crashes_while_loading_is_named(tmp_path):
    # Not os.kill: its signal may reach another thread, after this one has said that all is well.
    add_python(tmp_path, "os.abort()")
    with pytest.raises(ServerError, match="failed to load 'echo' .*not healthy"):
        Server(tmp_path).start()


def test_a_model_without_its_code_is_noticed_at_once(tmp_path, scratch):
    """Triton itself would wait for ever."""
    path = add_python(tmp_path)
    path.unlink()
    started = time.monotonic()
    with pytest.raises(ServerError, match=f"(?s)still loading: echo.*file not found in '{path}'"):
        Server(tmp_path).start()
    assert time.monotonic() - started < 20
    assert not list(scratch.glob("barkstream-*"))


def test_a_server_that_is_too_slow_is_given_up(tmp_path):
    add_python(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(ServerError, match="not ready after 2 s\nstill loading: echo"):
        Server(tmp_path, ready_timeout_s=2).start()


def test_a_taken_port_is_said_before_anything_is_loaded(tmp_path):
    add_python(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"127.0.0.1:{port}: Address already in use"):
            Server(tmp_path, grpc_port=port).start()


@pytest.mark.parametrize("which", [0, 1, 2])  # gRPC, HTTP, metrics
def test_a_free_port_that_is_taken_meanwhile_is_replaced(tmp_path, monkeypatch, which):
    add_python(tmp_path)
    pick = launcher.pick_ports
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = list(pick("127.0.0.1", (0, 0, 0)))
        taken[which] = other.getsockname()[1]
        picks = iter([tuple(taken)])
        monkeypatch.setattr(launcher, "pick_ports", lambda *args: next(picks, None) or pick(*args))
        with Server(tmp_path) as running:
            assert running.ports[which] != taken[which]


def test_an_unknown_profile_is_refused_with_the_known_ones(tmp_path):
    configs = add_python(tmp_path).parents[1] / "configs"
    configs.mkdir()
    (configs / "cuda.pbtxt").write_text(PYTHON_CONFIG)
    with pytest.raises(ServerError, match="no profile 'cdua': .* has cuda"):
        Server(tmp_path, profile="cdua").start()
    with Server(tmp_path, profile="cuda") as running, triton.InferenceServerClient(running.grpc_url) as client:
        assert client.get_model_config("echo").config.name == "echo"


def test_an_empty_repository_is_refused(tmp_path):
    with pytest.raises(ServerError, match="no models in"):
        Server(tmp_path).start()


def test_numpy_2_is_refused(monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.1.0")
    installation = launcher.Installation(Path("tritonserver"), Path("backends"), python_stub=Path("stub"))
    with pytest.raises(ServerError, match="pip install numpy==1.26.4"):
        launcher.check_stub(installation)


def test_a_python_without_its_shared_library_is_refused(monkeypatch):
    installation = launcher.find_tritonserver()
    if installation.python_stub is None:
        pytest.skip("tritonserver is the one on the PATH, and so is its stub")
    listing = subprocess.CompletedProcess([], 0, "\tlibpython3.11.so.1.0 => not found\n\tlibc.so.6 => /lib/libc.so.6\n")
    monkeypatch.setattr(launcher.subprocess, "run", lambda *args, **kwargs: listing)
    with pytest.raises(ServerError, match="needs libpython3.11.so.1.0, which this Python lacks"):
        launcher.check_stub(installation)


def test_no_tritonserver_says_where_to_get_one(monkeypatch):
    monkeypatch.setattr(launcher.shutil, "which", lambda name: None)
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match="pip install nvidia-pytriton"):
        launcher.find_tritonserver()


def fake_installation(root: Path, *backends: str) -> launcher.Installation:
    """A tritonserver as in Triton's container, with empty backends."""
    for name in backends:
        (root / "backends" / name).mkdir(parents=True)
    executable = root / "bin" / "tritonserver"
    executable.parent.mkdir()
    executable.touch(mode=0o755)
    return launcher.Installation(executable, root / "backends")


def test_a_tritonserver_on_the_path_comes_first(tmp_path, monkeypatch):
    installation = fake_installation(tmp_path, "python")
    monkeypatch.setenv("PATH", f"{installation.executable.parent}:{os.environ['PATH']}")
    assert launcher.find_tritonserver() == installation


def test_a_native_onnx_runtime_is_used_where_there_is_one(tmp_path):
    native = fake_installation(tmp_path / "native", "python", "onnxruntime")
    assert launcher.assemble_backends(native, tmp_path / "unused") == native.backends
    bare = fake_installation(tmp_path / "bare", "python", "tensorrt", "pytorch")
    assembled = launcher.assemble_backends(bare, tmp_path / "assembled")
    assert sorted(path.name for path in assembled.iterdir()) == ["onnxruntime", "python", "tensorrt"]
    assert (assembled / "onnxruntime" / "model.py").exists()


def test_python_models_get_the_environment_of_the_launcher(small, client):
    tensor = triton.InferInput("x", [3], "FP32")
    tensor.set_data_from_numpy(np.array([1, 2, 3], np.float32))
    assert client.infer("echo", [tensor]).as_numpy("y").tolist() == [1, 2, 3]  # NumPy < 2; barkstream imported
