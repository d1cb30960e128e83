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
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

PACKAGE = Path(__file__).resolve().parent
MODEL_REPOSITORY = PACKAGE.parent / "model_repository"
OUR_BACKENDS = PACKAGE / "triton_backends"
SHARED_MEMORY = Path("/dev/shm")

NATIVE_BACKENDS = ("python", "onnxruntime", "tensorrt")  # those that a profile of ours names

N_LOG_LINES = 2000  # kept for error messages
DRAIN_S = 5  # how long a stopping server lets requests in flight finish
KILL_S = 20  # after that and this, it is killed
N_PORT_TRIES = 3

# Started in place of tritonserver, becomes it: asks the kernel for a SIGTERM when the thread that started it dies, so
# that a client that is killed takes its server with it. A new interpreter, because code between fork and exec is not
# safe in a process that runs gRPC threads; 15 ms.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.getppid() == int(sys.argv[1]) or sys.exit("the parent process has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


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
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise ServerError(f"nvidia-pytriton has no Python stub for Python {version}: use 3.10, 3.11 or 3.12")
    return Installation(
        root / "bin/tritonserver", root / "backends", package.parent / "nvidia_pytriton.libs", stub
    )


def check_stub(installation: Installation) -> None:
    """ServerError if the wheel's Python stub cannot run here: NumPy 2, or a Python without its shared library."""
    if installation.python_stub is None:
        return
    import numpy

    if int(numpy.__version__.split(".")[0]) >= 2:
        raise ServerError(
            f"NumPy {numpy.__version__} is installed; Triton's Python stub reads NumPy 2 arrays as empty: "
            "`pip install numpy==1.26.4`"
        )
    listing = subprocess.run(
        ["ldd", installation.python_stub], env=environment(installation), capture_output=True, text=True, check=False
    )
    missing = [line.split()[0] for line in listing.stdout.splitlines() if "not found" in line]
    if missing:
        raise ServerError(
            f"Triton's Python stub needs {', '.join(missing)}, which this Python lacks: install it "
            f"(Debian: libpython{sys.version_info.major}.{sys.version_info.minor}) or use a Python built with --enable-shared"
        )


def assemble_backends(installation: Installation, folder: Path) -> None:
    """A backend directory in `folder`: the installation's, plus ours where it has no native backend of that name.

    Copies (3 MB), because Triton refuses links that lead out of the backend directory.
    """
    for name in NATIVE_BACKENDS:
        if (installation.backends / name).is_dir():
            shutil.copytree(installation.backends / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if installation.python_stub is not None:
        shutil.copy(installation.python_stub, folder / "python")
    for ours in OUR_BACKENDS.iterdir():
        if not (folder / ours.name).exists():
            shutil.copytree(ours, folder / ours.name, ignore=shutil.ignore_patterns("__pycache__"))


def environment(installation: Installation) -> dict[str, str]:
    """The environment of tritonserver, and so of the Python stubs that run the models."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    paths = {
        "PATH": [Path(sys.prefix, "bin")],
        "LD_LIBRARY_PATH": [],
    }
    if installation.libraries is not None:
        paths["LD_LIBRARY_PATH"] = [installation.libraries, Path(sysconfig.get_config_var("LIBDIR"))]
    for name, first in paths.items():
        env[name] = os.pathsep.join([*map(str, first), *filter(None, [env.get(name)])])
    return env


class Server:
    """A running tritonserver, as a context manager: ready at the start of the block, gone without a trace at its end.

    repository: folder of models. profile: Triton's --model-config-name (`configs/<profile>.pbtxt` of the models that
    have it). Port 0: any free one. log: where Triton's log goes as well as into the error messages; None: nowhere.
    Raises ServerError, with the reasons out of Triton's log, if it does not become ready.
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
        ready_timeout_s: float = 600,
    ) -> None:
        self.repository = Path(repository).resolve()
        self.profile = profile
        self.host = host
        self.ports = (grpc_port, http_port, metrics_port)
        self.ready_timeout_s = ready_timeout_s
        self._requested_ports = self.ports
        self._log_file = log
        self._log: deque[str] = deque(maxlen=N_LOG_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._keeper: threading.Thread | None = None
        self._started = threading.Event()  # endpoints are up, or the process is gone
        self._folder: Path | None = None

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
        """http://host:port/metrics, Prometheus' text format."""
        return f"http://{self.host}:{self.ports[2]}/metrics"

    @property
    def pid(self) -> int:
        """tritonserver's process id."""
        assert self._process is not None, "not started"
        return self._process.pid

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
        installation = find_tritonserver()
        check_stub(installation)
        check_repository(self.repository, self.profile)
        for _ in range(N_PORT_TRIES):
            try:
                self._launch(installation)
                self._wait_ready()
                return
            except BaseException:
                port_taken = 0 in self._requested_ports and "already in use" in self.log_text
                self.stop()
                if not port_taken:
                    raise
        raise ServerError(f"no free ports in {N_PORT_TRIES} tries")

    def wait(self) -> int:
        """Block until the server ends by itself; its exit status."""
        assert self._process is not None, "not started"
        return self._process.wait()

    def stop(self) -> None:
        """Stop the server, its stubs and threads; remove its shared memory. Harmless when it is not running."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.terminate()
                self._process.wait(DRAIN_S + KILL_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what is left of the group: usually nobody
            self._process.wait()
        if self._keeper is not None:
            self._keeper.join()
        if self._folder is not None:
            remove_traces(self._folder)
        self._process = self._keeper = self._folder = None

    def _launch(self, installation: Installation) -> None:
        remove_stale_traces()
        self.ports = pick_ports(self.host, self._requested_ports)
        self._folder = Path(tempfile.mkdtemp(prefix=f"barkstream-{os.getpid()}-"))
        backends, imports = self._folder / "backends", self._folder / "imports"
        assemble_backends(installation, backends)
        imports.mkdir()
        (imports / "barkstream").symlink_to(PACKAGE)
        self._started.clear()
        self._log.clear()
        command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), str(installation.executable)]
        command += self._arguments(backends)
        launched = threading.Event()
        keep = (command, imports, environment(installation), launched)
        self._keeper = threading.Thread(target=self._keep, args=keep, name="tritonserver", daemon=True)
        self._keeper.start()
        launched.wait()

    def _arguments(self, backends: Path) -> list[str]:
        assert self._folder is not None
        grpc_port, http_port, metrics_port = self.ports
        return [
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            *([f"--model-config-name={self.profile}"] if self.profile else []),
            f"--grpc-address={self.host}",
            f"--grpc-port={grpc_port}",
            f"--http-address={self.host}",
            f"--http-port={http_port}",
            f"--metrics-address={self.host}",
            f"--metrics-port={metrics_port}",
            "--exit-on-error=true",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={DRAIN_S}",
            f"--backend-config=python,shm-region-prefix-name={self._folder.name}",
        ]

    def _keep(self, command: list[str], cwd: Path, env: dict[str, str], launched: threading.Event) -> None:
        """Thread: is the server's parent (the kernel's death signal follows the thread, not the process) and its reaper."""
        self._process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        launched.set()
        reader = threading.Thread(target=self._read_log, args=(self._process.stdout,), daemon=True)
        reader.start()
        self._process.wait()
        self._started.set()
        reader.join(1)

    def _read_log(self, lines: TextIO) -> None:
        waiting_for = {"Started GRPCInferenceService", "Started HTTPService", "Started Metrics Service"}
        for line in lines:
            self._log.append(line)
            if self._log_file is not None:
                self._log_file.write(line)
                self._log_file.flush()
            if waiting_for:
                waiting_for -= {mark for mark in waiting_for if mark in line}
                if not waiting_for:
                    self._started.set()

    def _wait_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.ready_timeout_s
        if not self._started.wait(self.ready_timeout_s):
            raise ServerError(f"tritonserver not ready after {self.ready_timeout_s:g} s\n{self._reasons()}")
        if self._process.poll() is not None:
            raise ServerError(f"tritonserver ended with status {self._process.returncode}\n{self._reasons()}")
        status = self._get_status("/v2/health/ready", deadline - time.monotonic())
        if status != 200:
            raise ServerError(f"tritonserver is up but not ready (HTTP {status})\n{self._reasons()}")

    def _get_status(self, path: str, timeout_s: float) -> int:
        connection = http.client.HTTPConnection(self.host, self.ports[1], timeout=max(timeout_s, 1))
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    def _reasons(self) -> str:
        """What Triton's log says about a failure: its complaints if there are any, else its last lines."""
        lines = [line for line in self._log if not line.startswith(("|", "+", "I")) and line.strip()]
        failed = [line for line in lines if " failed to load '" in line or "Poll failed" in line]
        return "\n".join(map(readable, failed)) or "".join(lines[-N_TAIL_LINES:])


def check_repository(repository: Path, profile: str | None) -> None:
    """ServerError if `repository` holds no models, or none of them has a configuration named `profile`."""
    models = [path.parent for path in sorted(repository.glob("*/config.pbtxt"))]
    if not models:
        raise ServerError(f"no models in {repository}: not one */config.pbtxt")
    profiles = sorted({path.stem for model in models for path in model.glob("configs/*.pbtxt")})
    if profile and profile not in profiles:
        raise ServerError(f"no profile {profile!r}: {repository} has {', '.join(profiles) or 'none'}")


def pick_ports(host: str, requested: tuple[int, ...]) -> tuple[int, ...]:
    """`requested` with a free port for every 0. ServerError if one that was asked for is taken.

    Triton binds its ports only after the models are loaded, so another process may take a free one meanwhile: `start`
    then tries again.
    """
    with contextlib.ExitStack() as held:
        return tuple(held.enter_context(reserve_port(host, port)).getsockname()[1] for port in requested)


def reserve_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen; ServerError if somebody else listens there."""
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count as taken
    try:
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}; port 0 takes any free one") from error
    return reserved


def remove_traces(folder: Path) -> None:
    """Remove a server's backend directory and the shared-memory regions that carry its name."""
    for region in SHARED_MEMORY.glob(f"{folder.name}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_stale_traces() -> None:
    """Remove what servers left whose owner was killed; Triton itself cleans up after everything but SIGKILL."""
    for folder in Path(tempfile.gettempdir()).glob("barkstream-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not Path("/proc", pid).exists():
            remove_traces(folder)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that a supervisor's stop is as clean. Main thread only."""

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
) -> int:
    """Run in the foreground until Ctrl-C or SIGTERM (returns 0), or until the server ends by itself (its status).

    ServerError if it does not become ready.
    """
    server = Server(
        repository, profile=profile, host=host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port,
        log=sys.stderr,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt), sigterm_as_interrupt(), server:
        print(f"ready: gRPC {server.grpc_url}, health {server.http_url}/v2/health/ready, metrics {server.metrics_url}")
        print("Ctrl-C stops it", flush=True)
        return server.wait()
    return 0
