"""What pretended_gpu.py, slowed_gpu.py and gpu_load.py share: a load test on a server of theirs, and what stages did meanwhile."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from barkstream.server import Server  # noqa: E402

STAGES = "semantic", "coarse", "fine", "codec"
# Clips of 10 s with a preset. The same text for all: random weights don't read.
REQUESTS = ["--text", "medium", "--max-seconds", "10", "--voice", "random", "--warmup", "2"]


def positive(text: str) -> float:
    """A number above 0."""
    try:
        if (number := float(text)) > 0:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"write a number above 0, not {text!r}")


def must_say(server: Server, line: str) -> None:
    """Raises SystemExit unless a server's log has the line with which its stages' process says what it has in place of a GPU's own."""
    if line not in server.log_text:
        raise SystemExit(f"the stages' process did not say {line!r}: what it runs is not known")


def drive(server: Server, options: Sequence[str], kill_after_s: float | None = None) -> dict[str, Any]:
    """Run load_test.py with these options, print its table and what the stages did. Returns rows, and stages as (rows a batch,
    milliseconds a second of audio). Raises SystemExit if it fails: it has said why.

    kill_after_s: so long after load_test.py was started one GPU's process is killed; "killed" is its id then."""
    before = counters(server.metrics_url)
    command = [sys.executable, HERE / "load_test.py", "--url", server.grpc_url, *REQUESTS, *options]
    with one_killed(server.pid, kill_after_s) as killed:
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    done = {name: value - before.get(name, 0.0) for name, value in counters(server.metrics_url).items()}
    if ran.returncode:
        raise SystemExit(ran.returncode)
    *lines, last = ran.stdout.splitlines()
    print("\n".join(lines))
    stages = {stage: share(stage, done) for stage in STAGES}
    for stage, (rows, ms) in stages.items():
        print(f"{stage:9} {rows:5.1f} rows a batch, {ms:5.2f} ms a second of audio", flush=True)
    return {"rows": json.loads(last), "stages": stages} | ({"killed": killed[0]} if killed else {})


@contextmanager
def one_killed(server: int, after_s: float | None) -> Iterator[list[int]]:
    """Kill one of a server's shared processes after so long (None: none). Yields a list of who was killed; raises SystemExit at
    the end if nobody was."""
    killed: list[int] = []

    def kill() -> None:
        for process in shared_processes(server)[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    if after_s is None:
        yield killed
        return
    timer = Timer(after_s, kill)
    timer.start()
    try:
        yield killed
    finally:
        timer.cancel()
    if not killed:
        raise SystemExit(f"no GPU's process was there to be killed after {after_s} s, or the run was over by then")


def shared_processes(server: int) -> list[int]:
    """The processes that hold a GPU's engines (`barkstream/engines/host.py`), of a server with this process id."""
    parents, hosts = {}, []
    for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if b"barkstream.engines.host" in Path(f"/proc/{pid}/cmdline").read_bytes():
                hosts.append(pid)

    def is_of_server(pid: int) -> bool:
        return pid == server or (pid in parents and is_of_server(parents[pid]))

    return [pid for pid in hosts if is_of_server(pid)]


def counters(metrics_url: str) -> dict[str, float]:
    """Barkstream's counters, each summed over its labels."""
    found: dict[str, float] = {}
    with urllib.request.urlopen(metrics_url) as response:
        for name, value in re.findall(
            r"^barkstream_(\w+_total)(?:{.*})? (\S+)$", response.read().decode(), re.MULTILINE
        ):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def share(stage: str, done: Mapping[str, float]) -> tuple[float, float]:
    """A stage's rows a batch, and milliseconds of the GPU a second of audio."""
    rows, calls, busy_s = (done.get(f"{stage}_{what}_total", 0.0) for what in ("rows", "calls", "busy_seconds"))
    return round(rows / max(calls, 1), 1), round(1e3 * busy_s / max(done.get("audio_seconds_total", 0), 1e-9), 2)
