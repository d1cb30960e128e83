"""Runs a server until it ends or its owner goes, then removes every trace of it.

    python -I -S supervise.py FOLDER DRAIN_S COMMAND...

Between Server and tritonserver, because only a process of its own can clean up after an owner that was killed. It stops
the server when its standard input closes, which the kernel does for an owner however it ends, or on SIGTERM. All
descendants are its own to reap (a killed tritonserver leaves its Python stubs behind); FOLDER and the shared-memory
regions that carry its name go last. Standard library only, started without site-packages: ready in 15 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
SET_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
MARGIN_S = 1  # Triton may hang after its exit timeout when a stream is under way


def main(folder: Path, drain_s: float, command: list[str]) -> int:
    """The command's exit status, 128 + n if signal n ended it."""
    libc = ctypes.CDLL(None)
    libc.prctl(SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP | {signal.SIGCHLD})
    try:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=lambda: prepare_child(libc)
        )
        threading.Thread(target=stop_at_end_of_input, daemon=True).start()
        wait_for_end_or_stop(server)
        end(server, drain_s)
    finally:
        remove_traces(folder)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def prepare_child(libc: ctypes.CDLL) -> None:
    """In the child, before exec: ordinary signals again, and SIGTERM should this supervisor be killed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP | {signal.SIGCHLD})
    libc.prctl(SET_DEATH_SIGNAL, signal.SIGTERM)


def stop_at_end_of_input() -> None:
    """Thread: the owner closed our standard input, or is no more."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read(): its lock must be free at exit
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for_end_or_stop(server: subprocess.Popen[bytes]) -> None:
    """Return when the server has ended or it is time to end it."""
    while server.poll() is None and signal.sigwait(STOP | {signal.SIGCHLD}) == signal.SIGCHLD:
        pass


def end(server: subprocess.Popen[bytes], drain_s: float) -> None:
    """Let the server end by itself within `drain_s`, then kill what is left, and reap it all."""
    if drain_s:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(drain_s + MARGIN_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def remove_traces(folder: Path) -> None:
    """Remove a server's folder and the shared-memory regions that carry its name."""
    for region in SHARED_MEMORY.glob(f"{folder.name}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
