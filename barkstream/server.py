"""Finds tritonserver, starts it on a model repository, waits until it is ready, and leaves nothing behind.

    with Server() as server:                      # free loopback ports; ready when the block begins
        client = Client(server.grpc_url)

`tritonserver` is the one on the PATH (Triton's own container), else the one in the nvidia-pytriton wheel. The wheel's
needs help that the container's does not, all of it given here without touching the wheel:

- its shared libraries lie in a folder of their own: LD_LIBRARY_PATH;
- its Python backend needs the stub binary of the running Python version beside libtriton_python.so: a folder of copies;
- the stub embeds an isolated interpreter: it finds the virtual environment through the first `python3` on the PATH,
  ignores PYTHONPATH, and has the working directory first in sys.path: so that is a folder with nothing but a link to
  this package, and every model.py can `import barkstream`, installed or not;
- it has no ONNX Runtime backend: `barkstream/triton_backends/onnxruntime` takes that name (a "Python-based backend").
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from barkstream.awake import keep_awake
from barkstream.profiles import known_profiles, shortages
from barkstream.threads import bls_threads, no_room, thread_shortage

PACKAGE = Path(__file__).resolve().parent
MODEL_REPOSITORY = PACKAGE.parent / "model_repository"
OUR_BACKENDS = PACKAGE / "triton_backends"
NATIVE_BACKENDS = ("python", "tensorrt")  # besides onnxruntime, those that our configurations name
NVIDIA_DRIVER = Path("/proc/driver/nvidia")

READY_TIMEOUT_S = 600  # a large checkpoint on a CPU, or TensorRT engines that are built at the first start
DRAIN_S = 5  # how long `serve`, told to stop, lets Triton end by itself
N_PORT_TRIES = 3
N_LOG_LINES = 2000  # kept for error messages
N_TAIL_LINES = 30  # shown in them
UP = ("Started GRPCInferenceService", "Started HTTPService", "Started Metrics Service")  # said once models are loaded
NO_ENDPOINT = r'"failed to start \w+ service'
METRICS_S = 0.05
SOCKETS = "BARKSTREAM_SOCKETS"  # environment variable: the folder where a server's processes meet (engines/hosted.py)
STUCK = "Failed to preinitialize"  # no model.py, for one: Triton 2.51 then waits for that model for ever
# What only an operator should reach, each a way to write files or memory of the server (CVE-2025-23319 and relatives).
ADMIN_APIS = "shared-memory,model-repository,trace,logging"


class ServerError(RuntimeError):
    """The server could not be found or started, or it died; the message says why, and what to do."""


@dataclass(frozen=True)
class Installation:
    """A tritonserver on this machine."""

    executable: Path
    backends: Path  # python/, and in Triton's container onnxruntime/, tensorrt/ ...
    libraries: Path | None = None  # wheel only: its shared libraries
    python_stub: Path | None = None  # wheel only: the stub binary for the running Python version


def find_tritonserver() -> Installation:
    """tritonserver from the PATH, else from the nvidia-pytriton wheel. ServerError if there is neither."""
    if executable := shutil.which("tritonserver"):
        path = Path(executable).resolve()
        return Installation(path, path.parents[1] / "backends")
    spec = importlib.util.find_spec("pytriton")  # finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("no tritonserver: run in Triton's container, or `pip install nvidia-pytriton==0.7.0`")
    package = Path(spec.submodule_search_locations[0])
    root = package / "tritonserver"
    stub = root / "python_backend_stubs" / python_version() / "triton_python_backend_stub"
    if not stub.exists():
        raise ServerError(f"nvidia-pytriton has no Python stub for Python {python_version()}: use 3.10, 3.11 or 3.12")
    return Installation(root / "bin/tritonserver", root / "backends", package.parent / "nvidia_pytriton.libs", stub)


def python_version() -> str:
    """Such as 3.11."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def check_stub(installation: Installation) -> None:
    """ServerError if the wheel's Python stub cannot run here: NumPy 2, or a Python without its shared library."""
    if installation.python_stub is None:
        return
    import numpy  # only its version: the stubs will import the same one

    if int(numpy.__version__.split(".")[0]) >= 2:
        raise ServerError(
            f"NumPy {numpy.__version__} is installed and Triton's Python stub reads NumPy 2 arrays as empty: "
            "`pip install numpy==1.26.4`"
        )
    listing = subprocess.run(
        ["ldd", installation.python_stub], env=environment(installation), capture_output=True, text=True, check=False
    )
    missing = [line.split()[0] for line in listing.stdout.splitlines() if "not found" in line]
    if missing:
        raise ServerError(
            f"Triton's Python stub needs {', '.join(missing)}, which this Python lacks: install it "
            f"(Debian: libpython{python_version()}) or use a Python built with --enable-shared"
        )


def assemble_backends(installation: Installation, folder: Path) -> Path:
    """The backend directory: the installation's own if it has ONNX Runtime, else a copy in `folder` with ours added.

    Copies (3 MB), because Triton refuses links that lead out of the backend directory.
    """
    if (installation.backends / "onnxruntime").is_dir():
        return installation.backends
    copy = functools.partial(shutil.copytree, ignore=shutil.ignore_patterns("__pycache__"))
    for name in NATIVE_BACKENDS:
        if (installation.backends / name).is_dir():
            copy(installation.backends / name, folder / name)
    if installation.python_stub is not None:
        shutil.copy(installation.python_stub, folder / "python")
    for ours in OUR_BACKENDS.iterdir():
        copy(ours, folder / ours.name)
    return folder


def environment(installation: Installation) -> dict[str, str]:
    """The environment of tritonserver, and so of the Python stubs that run the models."""
    # ONNX Runtime 1.32 reports its use over the network by default. NumPy's OpenBLAS, of which nothing is asked, starts a thread a CPU in
    # every stub: four GPUs' 356 on 64 CPUs would be 23,000.
    env = {"ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
    prepend(env, "PATH", Path(sys.prefix, "bin"))
    if installation.libraries is not None:
        libpython = Path(sysconfig.get_config_var("LIBDIR"))
        # Not the system's own folder: the loader looks there anyway, and it must not go before the libraries (cuDNN) that
        # PyTorch brings.
        if not libpython.is_relative_to("/usr/lib") and not libpython.is_relative_to("/lib"):
            prepend(env, "LD_LIBRARY_PATH", libpython)  # for the stub
        prepend(env, "LD_LIBRARY_PATH", installation.libraries)
    return env


def prepend(env: dict[str, str], name: str, folder: Path) -> None:
    """Put `folder` first in a list of folders in an environment."""
    env[name] = os.pathsep.join([str(folder), *filter(None, [env.get(name)])])


class Server:
    """A running tritonserver, as a context manager: ready at the start of the block, gone without a trace at its end.

    repository: folder of models. profile: Triton's --model-config-name (`configs/<profile>.pbtxt` of the models that
    have it). Port 0: any free one. log: gets Triton's warnings and errors and what the models print. drain_s: how long
    Triton may take to end by itself when it is stopped: it then answers what is under way (speech with an error, for it
    refuses its models' calls of one another from then on) and unloads its models, in 2.3 s at least; 0 kills it, in .1 s,
    which is all right for an owner who waits for nothing. Raises ServerError, with the reasons out of Triton's log.
    """

    def __init__(
        self,
        repository: Path | str = MODEL_REPOSITORY,
        *,
        profile: str | None = None,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        log: TextIO | None = None,
        drain_s: int = 0,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        self.repository = Path(repository).resolve()
        self.profile = profile
        self.host = host
        self.ports: tuple[int, ...] = (grpc_port, http_port, metrics_port)
        self._requested_ports = self.ports
        self._echo = log
        self._drain_s = drain_s
        self._ready_timeout_s = ready_timeout_s
        self._log: deque[str] = deque(maxlen=N_LOG_LINES)
        self._supervisor: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._settled = threading.Event()  # up, or gone, or stuck
        self._gone = threading.Event()

    @property
    def grpc_url(self) -> str:
        """host:port, as tritonclient.grpc takes it."""
        return f"{self.host}:{self.ports[0]}"

    @property
    def http_url(self) -> str:
        """http://host:port: health (/v2/health/ready) and Triton's HTTP API."""
        return f"http://{self.host}:{self.ports[1]}"

    @property
    def metrics_url(self) -> str:
        """http://host:port/metrics, in Prometheus' text format."""
        return f"http://{self.host}:{self.ports[2]}/metrics"

    @property
    def pid(self) -> int:
        """Process id of the supervisor; tritonserver and its stubs are its descendants."""
        assert self._supervisor is not None, "not started"
        return self._supervisor.pid

    @property
    def log_text(self) -> str:
        """The last lines of Triton's log, and of what the models printed."""
        return "".join(self._log)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until ready; on any failure, and on Ctrl-C, stop what was started and raise."""
        assert self._supervisor is None, "already started"
        installation = find_tritonserver()
        check_stub(installation)
        check_repository(self.repository, self.profile)
        if why := no_room(self.repository, self.profile):
            raise ServerError(why)
        for shortage in shortages(self.repository, self.profile) + thread_shortage(self.repository, self.profile):
            print(f"warning: {shortage}", file=self._echo or sys.stderr, flush=True)
        for tries_left in reversed(range(N_PORT_TRIES)):
            try:
                self._launch(installation)
                return self._wait_ready()
            except BaseException:
                self.stop()
                if not (tries_left and 0 in self._requested_ports and "already in use" in self.log_text):
                    raise

    def wait(self) -> int:
        """Block until the server ends by itself; its exit status, 128 + n if signal n ended it."""
        assert self._supervisor is not None, "not started"
        return self._supervisor.wait()

    def stop(self) -> None:
        """Stop the server; when this returns, its processes and shared memory are gone. Harmless if there is none."""
        if self._supervisor is None or self._reader is None:
            return
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()  # tells the supervisor, as our death would
        self._supervisor.wait()
        self._reader.join()
        self._supervisor = self._reader = None

    def _launch(self, installation: Installation) -> None:
        self.ports = pick_ports(self.host, self._requested_ports)
        self._log.clear()
        self._settled.clear()
        self._gone.clear()
        folder = Path(tempfile.mkdtemp(prefix="barkstream-"))  # the supervisor removes it
        try:
            self._supervisor = self._supervise(installation, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._reader = threading.Thread(target=self._read_log, args=(self._supervisor.stdout,), daemon=True)
        self._reader.start()

    def _supervise(self, installation: Installation, folder: Path) -> subprocess.Popen[str]:
        backends = assemble_backends(installation, folder / "backends")
        imports = folder / "imports"
        imports.mkdir()
        (imports / "barkstream").symlink_to(PACKAGE)
        supervise = [sys.executable, "-I", "-S", str(PACKAGE / "supervise.py"), str(folder), str(self._drain_s)]
        return subprocess.Popen(
            [*supervise, str(installation.executable), *self._arguments(folder.name, backends)],
            cwd=imports, env={**environment(installation), SOCKETS: str(folder)}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip

    def _arguments(self, name: str, backends: Path) -> list[str]:
        grpc_port, http_port, metrics_port = self.ports
        profile = [f"--model-config-name={self.profile}"] if self.profile else []
        no_gpu = [] if NVIDIA_DRIVER.exists() else ["--allow-gpu-metrics=false"]
        key = f"barkstream-admin={secrets.token_hex()}"
        return [
            f"--model-repository={self.repository}",
            *profile,
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={name}",
            f"--backend-config=python,thread-pool-size={bls_threads(self.repository, self.profile)}",
            # Our configurations are complete; completing them would start every Python model twice (2.3 s, not .5 s).
            "--disable-auto-complete-config",
            f"--grpc-address={self.host}",
            f"--grpc-port={grpc_port}",
            f"--grpc-restricted-protocol={ADMIN_APIS}:{key}",
            f"--http-address={self.host}",
            f"--http-port={http_port}",
            f"--http-restricted-api={ADMIN_APIS}:{key}",
            f"--metrics-address={self.host}",
            f"--metrics-port={metrics_port}",
            f"--exit-timeout-secs={self._drain_s}",
            # Tensors travel through the CPU's memory: for a pinned pool, or one on a GPU, Triton itself would take .6 GB of it.
            "--pinned-memory-pool-byte-size=0",
            *(f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(n_gpus())),
            *no_gpu,
        ]

    def _read_log(self, lines: TextIO) -> None:
        """Thread: keep the log, show what is worth it, notice when the server is up, and when it is gone."""
        waiting_for = set(UP)
        for line in lines:
            self._log.append(line)
            if self._echo is not None and is_notable(line):
                self._echo.write(line)
                self._echo.flush()
            waiting_for -= {mark for mark in waiting_for if mark in line}
            if not waiting_for or STUCK in line:
                self._settled.set()
        self._gone.set()
        self._settled.set()

    def _wait_ready(self) -> None:
        assert self._supervisor is not None
        if not self._settled.wait(self._ready_timeout_s):
            raise self._failure(f"tritonserver was not ready after {self._ready_timeout_s:g} s")
        if STUCK in self.log_text:
            raise self._failure("tritonserver cannot start a model")
        if self._gone.is_set():
            raise self._failure(f"tritonserver ended with status {self._supervisor.wait()}")
        # Triton says that it started the metrics some 5 ms before it does; that it could not, it only says.
        while not self._gone.wait(METRICS_S) and not re.search(NO_ENDPOINT, self.log_text):
            if self._listens(self.ports[2]):
                break
        else:
            raise self._failure("tritonserver could not start its endpoints")
        status = self._get_status("/v2/health/ready")
        if status != 200:
            raise self._failure(f"tritonserver is up but not ready (HTTP {status})")

    def _listens(self, port: int) -> bool:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((self.host, port)):
            return True
        return False

    def _get_status(self, path: str) -> int:
        connection = http.client.HTTPConnection(self.host, self.ports[1], timeout=self._ready_timeout_s)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    def _failure(self, what: str) -> ServerError:
        return ServerError(f"{what}\n{failure_reasons(list(self._log))}".rstrip())


def n_gpus() -> int:
    """GPUs of this machine, whether or not they may be used."""
    gpus = NVIDIA_DRIVER / "gpus"
    return len(list(gpus.iterdir())) if gpus.is_dir() else 0


def is_notable(line: str) -> bool:
    """Whether a line of the log is a warning, an error or a model's own words; not Triton's chatter and tables."""
    chatter = r"[|+]|I\d{4} |\s*$|E.*CudaDriverHelper has not been initialized"  # the last: there is no GPU
    return STUCK in line or not re.match(chatter, line)


def failure_reasons(log: list[str]) -> str:
    """What Triton's log says about a failure: the models that failed to load and why; failing that, its last lines."""
    failed = [
        line
        for line in log
        if re.match(r"E\d{4} .*(failed to load |failed to start |Poll failed)|\[libprotobuf ERROR", line)
    ]
    if failed:
        return "\n".join(map(readable, failed))
    text = "".join(log)
    loading = set(re.findall(r'"loading: (\w+):', text)) - set(re.findall(r"successfully loaded '(\w+)'", text))
    still = f"still loading: {', '.join(sorted(loading))}\n" if loading else ""
    return still + "".join(list(filter(is_notable, log))[-N_TAIL_LINES:])


def readable(line: str) -> str:
    """Triton's `E1122 14:17:33 1 file.cc:642] "failed to load 'x' version 1: Internal: ...\\n\\nAt:..."` for people.

    A TritonModelException is a model's considered message: its traceback is of no use to a user.
    """
    message = line.split("] ", 1)[-1].strip().strip('"').replace("\\n", "\n")
    if "TritonModelException: " in message:
        return message.replace("Internal: TritonModelException: ", "").split("\n\nAt:")[0]
    return message + (": run `make export`" if "at least one version must be available" in message else "")


def check_repository(repository: Path, profile: str | None) -> None:
    """ServerError if `repository` holds no models, or none of them has a configuration named `profile`."""
    models = [path.parent for path in sorted(repository.glob("*/config.pbtxt"))]
    if not models:
        raise ServerError(f"no models in {repository}: not one */config.pbtxt")
    profiles = known_profiles(repository)
    if profile and profile not in profiles:
        raise ServerError(f"no profile {profile!r}: {repository} has {', '.join(profiles) or 'none'}")


def pick_ports(host: str, requested: tuple[int, ...]) -> tuple[int, ...]:
    """`requested` with a free port for every 0. ServerError if one that was asked for is taken.

    Triton binds its ports only after the models are loaded, so another process may take a free one meanwhile: `start`
    then tries again.
    """
    with contextlib.ExitStack() as held:
        return tuple(held.enter_context(bound_socket(host, port)).getsockname()[1] for port in requested)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen; ServerError if somebody else has it."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count as taken
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}; port 0 takes any free one") from error
    return bound


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that a service manager's stop is as clean. Main thread only."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def serve(
    repository: Path | str = MODEL_REPOSITORY,
    *,
    profile: str | None = None,
    host: str = "127.0.0.1",
    grpc_port: int = 8001,
    http_port: int = 8000,
    metrics_port: int = 8002,
    busy_cpus: bool = False,
) -> int:
    """Run in the foreground until Ctrl-C or SIGTERM (returns 0), or until the server ends by itself (its status).

    busy_cpus: keep CPUs from sleeping, see awake.py. ServerError if it does not become ready.
    """
    server = Server(
        repository, profile=profile, host=host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port,
        log=sys.stderr, drain_s=DRAIN_S,
    )  # fmt: skip
    awake = keep_awake() if busy_cpus else contextlib.nullcontext()
    with contextlib.suppress(KeyboardInterrupt), sigterm_as_interrupt(), awake, server:
        print(f"ready: gRPC {server.grpc_url}, health {server.http_url}/v2/health/ready, metrics {server.metrics_url}")
        print("Ctrl-C stops it", flush=True)
        return server.wait()
    return 0
