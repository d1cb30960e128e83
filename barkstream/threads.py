"""How many threads a server starts, and how many the system lets it: where one cannot be started Triton 2.51 waits for ever, or aborts."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from barkstream.profiles import SPEAKER, chosen_config, most_streams
from barkstream.spread import usable_gpus

BLS_THREADS = 128  # stage calls that a process of `bark` can have under way, at most
TRITONS_BLS_THREADS = 32  # so many Triton lets, unless it is told otherwise; the others wait
INSTANCES = r"kind:\s*KIND_(\w+)\s+count:\s*(\d+)"  # as our configurations write them
PID_MAX, MAX_MAP_COUNT = Path("/proc/sys/kernel/pid_max"), Path("/proc/sys/vm/max_map_count")
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Besides those for stage calls: of each instance and its process, of a stream, and the server's own. Counted: 316 with 5 instances, 16
# streams and 48 threads each; some 12,900 with 168, 60 and 68.
INSTANCES_THREADS, STREAMS_THREADS, SERVERS_THREADS = 9, 4, 40


@dataclass(frozen=True)
class Room:
    """For threads that are still to be started."""

    n: int
    n_for_calls: int  # of those, that stage calls may have
    limit: str  # what sets it, for people


def bls_threads(repository: Path, profile: str | None) -> int:
    """Enough for `bark`, and no more: Triton makes so many for each instance of a Python model, all of them in its own process. With an
    instance a stream (cuda profile), and 128 threads for each, four GPUs would want 45,000."""
    room, n = _room_for_calls(repository, profile), n_instances(repository, profile)
    return max(1, min(n_stage_calls(repository, profile), room.n_for_calls // max(1, n)))


def thread_shortage(repository: Path, profile: str | None) -> list[str]:
    """A sentence where the system has no room for as many threads as `bark` may use."""
    wanted, n = n_stage_calls(repository, profile), bls_threads(repository, profile)
    if n >= wanted:
        return []
    return [
        f"{SPEAKER} may have {wanted} stage calls under way in a process, and gets threads for {n}: the others wait. Each of "
        f"{n_instances(repository, profile)} instances has as many; {_room_for_calls(repository, profile).limit}"
    ]


def no_room(repository: Path, profile: str | None) -> str | None:
    """A sentence where the system has so little room for threads that a server would never be ready; None: it has enough."""
    n = n_instances(repository, profile)
    n_least = SERVERS_THREADS + (INSTANCES_THREADS + 1) * n
    room = min(_rooms(repository, profile), key=lambda room: room.n)
    if room.n >= n_least:
        return None
    return (
        f"a server with {n} instances needs some {n_least} threads and may start {max(0, room.n)}: {room.limit}. Allow more (a container's "
        "--pids-limit, a service's TasksMax, ulimit -u), or serve fewer streams (barkstream profile --streams)"
    )


def _room_for_calls(repository: Path, profile: str | None) -> Room:
    return min(_rooms(repository, profile), key=lambda room: room.n_for_calls)


def _rooms(repository: Path, profile: str | None) -> Iterator[Room]:
    config = _speakers_config(repository, profile)
    n_streams = (most_streams(config) or 0) * (usable_gpus() if "KIND_GPU" in config else 1)
    n_others = SERVERS_THREADS + STREAMS_THREADS * n_streams + INSTANCES_THREADS * n_instances(repository, profile)
    n_running, pid_max, max_map_count = n_threads_running(), int(PID_MAX.read_text()), int(MAX_MAP_COUNT.read_text())
    n = pid_max - n_running
    limit = f"the system has numbers for {pid_max} threads (kernel.pid_max), of which {n_running} are taken"
    yield Room(n, n * 6 // 10, limit)  # other servers want numbers, too
    limit = f"a process has room for {max_map_count} pieces of memory (vm.max_map_count), of which a thread is two"
    yield Room(max_map_count // 2, max_map_count * 3 // 10, limit)
    for folder, most, n_taken in _cgroups():
        n = most - n_taken
        limit = f"{folder / 'pids.max'} allows {most} threads, of which {n_taken} are taken"
        yield Room(n, n * 9 // 10 - n_others, limit)
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() and most != resource.RLIM_INFINITY:  # root is not held to it
        n_taken = n_threads_running(os.geteuid())
        n = most - n_taken
        yield Room(
            n, n * 9 // 10 - n_others, f"this user may have {most} threads (ulimit -u), of which {n_taken} are taken"
        )


def _cgroups() -> Iterator[tuple[Path, int, int]]:
    """Folders of the control groups that this process is in, with the threads that each may have, and has. A container's `--pids-limit`, or
    a service's TasksMax, is one."""
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "pids" not in controllers.split(","):
                continue
            top = CGROUPS / "pids" if controllers else CGROUPS
            own = top / path.lstrip("/")
            for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(top))):
                with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                    yield folder, int((folder / "pids.max").read_text()), int((folder / "pids.current").read_text())


def n_threads_running(user: int | None = None) -> int:
    """Of all processes that this one sees, or of those of a user."""
    n = 0
    for process in os.listdir("/proc"):
        if process.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if user is None or os.stat(f"/proc/{process}").st_uid == user:
                    n += len(os.listdir(f"/proc/{process}/task"))
    return n


def n_stage_calls(repository: Path, profile: str | None) -> int:
    """That a process of `bark` may have under way: three of each stream (semantic tokens ahead, a coarse window, a chunk), and, where
    several processes share the streams, half as many again, for they are not dealt out evenly. No fewer than Triton lets, no more than
    BLS_THREADS."""
    config = _speakers_config(repository, profile)
    if (n_streams := most_streams(config)) is None:
        return BLS_THREADS
    n_processes = sum(int(count) for _, count in re.findall(INSTANCES, config)) or 1
    n_calls = math.ceil(3 * n_streams / n_processes * (1.0 if n_processes == 1 else 1.5))
    return min(BLS_THREADS, max(TRITONS_BLS_THREADS, n_calls))


def n_instances(repository: Path, profile: str | None) -> int:
    """Of all models that a server of this repository and profile loads."""
    n = 0
    for default in repository.glob("*/config.pbtxt"):
        config = chosen_config(default.parent, profile)
        for kind, count in re.findall(INSTANCES, config):
            n += int(count) * (usable_gpus() if kind == "GPU" else 1)
    return n


def _speakers_config(repository: Path, profile: str | None) -> str:
    speaker = repository / SPEAKER
    return chosen_config(speaker, profile) if (speaker / "config.pbtxt").exists() else ""
