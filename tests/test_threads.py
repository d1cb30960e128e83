"""Threads that a server starts are no more than the system lets it, and where it cannot be it says so."""

from __future__ import annotations

import resource
import threading

import pytest

from barkstream import threads
from barkstream.server import Server, ServerError


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A repository with a profile of 89 instances on one GPU, and a system whose numbers are known."""
    for model, kind, count in (("bark", "GPU", 1), ("stage", "GPU", 88)):
        (tmp_path / model / "configs").mkdir(parents=True)
        (tmp_path / model / "config.pbtxt").write_text("instance_group [ { kind: KIND_CPU count: 1 } ]")
        profile = f"instance_group [ {{ kind: KIND_{kind} count: {count} }} ]"
        (tmp_path / model / "configs" / "cuda.pbtxt").write_text(profile)
    for name, value in (("PID_MAX", 32768), ("MAX_MAP_COUNT", 65530)):
        (tmp_path / name).write_text(f"{value}\n")
        monkeypatch.setattr(threads, name, tmp_path / name)
    monkeypatch.setattr(threads, "n_threads_running", lambda user=None: 0)
    monkeypatch.setattr(threads, "usable_gpus", lambda: 1)
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path


def limit_cgroup(system, folder, most, n_taken=0):
    (system / "cgroups" / folder).mkdir(parents=True, exist_ok=True)
    (system / "cgroups" / folder / "pids.max").write_text(f"{most}\n")
    (system / "cgroups" / folder / "pids.current").write_text(f"{n_taken}\n")


def test_threads_for_stage_calls_are_no_more_than_the_system_has_numbers_for(system, monkeypatch):
    def with_gpus(n):
        monkeypatch.setattr(threads, "usable_gpus", lambda: n)
        return threads.n_instances(system, "cuda"), threads.bls_threads(system, "cuda")

    assert (with_gpus(1), with_gpus(2), with_gpus(4)) == ((89, 128), (178, 110), (356, 55))
    assert threads.n_instances(system, None) == 2
    (system / "MAX_MAP_COUNT").write_text("20000\n")
    assert with_gpus(4) == (356, 16)


def test_numbers_that_other_threads_have_are_not_counted_on_and_a_shortage_is_said(system, monkeypatch):
    assert threads.thread_shortage(system, "cuda") == []
    monkeypatch.setattr(threads, "n_threads_running", lambda user=None: 20_000)  # another server's
    assert threads.bls_threads(system, "cuda") == 86
    [shortage] = threads.thread_shortage(system, "cuda")
    assert "128 stage calls" in shortage and "gets threads for 86" in shortage and "20000 are taken" in shortage


@pytest.mark.parametrize(
    ("own", "folder"),
    [
        ("0::/", "."),  # a container's, version 2
        ("12:cpu:/other\n0::/system.slice/bark.service", "system.slice/bark.service"),  # a service's
        ("0::/system.slice/bark.service", "system.slice"),  # what holds for all services
        ("8:pids:/docker/1f\n0::/", "pids"),  # a container's, version 1, whose own folder is the top for who is in it
        ("8:cpu,pids:/docker/1f", "pids/docker/1f"),
    ],
)
def test_a_control_group_that_allows_fewer_threads_leaves_stage_calls_fewer(system, own, folder):
    (system / "own").write_text(f"{own}\n")
    limit_cgroup(system, folder, "max")
    assert threads.thread_shortage(system, "cuda") == []
    limit_cgroup(system, folder, 4096, 100)
    # 90% of 3,996, but for 40 of the server and 9 of each instance.
    assert threads.bls_threads(system, "cuda") == (3596 - 40 - 9 * 89) // 89 == 30
    [shortage] = threads.thread_shortage(system, "cuda")
    assert "gets threads for 30" in shortage and "pids.max allows 4096 threads, of which 100 are taken" in shortage
    assert threads.no_room(system, "cuda") is None


def test_a_group_that_this_process_is_not_in_limits_nothing(system):
    (system / "own").write_text("8:pids:/mine\n0::/\n")
    limit_cgroup(system, "pids/theirs", 10)
    assert threads.thread_shortage(system, "cuda") == []


def test_a_server_for_which_there_is_no_room_is_not_started(system):
    (system / "own").write_text("0::/\n")
    limit_cgroup(system, ".", 900)
    assert threads.bls_threads(system, "cuda") == 1
    with pytest.raises(ServerError, match="89 instances needs some 930 threads and may start 900: .*--pids-limit"):
        Server(system, profile="cuda").start()
    assert threads.no_room(system, None) is None  # two instances


def test_what_a_user_may_have_counts_but_for_root(system, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (4096, 4096))
    monkeypatch.setattr(threads, "n_threads_running", lambda user=None: 0 if user is None else 100)
    monkeypatch.setattr(threads.os, "geteuid", lambda: 0)
    assert threads.thread_shortage(system, "cuda") == []
    monkeypatch.setattr(threads.os, "geteuid", lambda: 1000)
    [shortage] = threads.thread_shortage(system, "cuda")
    assert "gets threads for 30" in shortage and "4096 threads (ulimit -u), of which 100 are taken" in shortage


def test_running_threads_are_counted_of_all_processes_or_of_a_users():
    done = threading.Event()
    before = threads.n_threads_running()
    started = [threading.Thread(target=done.wait) for _ in range(50)]
    for thread in started:
        thread.start()
    with_them, of_this_user = threads.n_threads_running(), threads.n_threads_running(threads.os.geteuid())
    done.set()
    for thread in started:
        thread.join()
    assert with_them > before + 25  # other work comes and goes
    assert of_this_user > 50 and threads.n_threads_running(54321) == 0


@pytest.mark.parametrize(
    ("n_streams", "n_processes", "n_threads"),
    [(8, 1, 32), (16, 1, 48), (100, 1, 128), (16, 4, 32), (32, 4, 36), (60, 4, 68)],
)
def test_threads_for_stage_calls_are_as_many_as_the_streams_of_a_process_use(system, n_streams, n_processes, n_threads):
    (system / "bark" / "config.pbtxt").write_text(
        f'''instance_group [ {{ kind: KIND_GPU count: {n_processes} }} ]
        parameters [ {{ key: "max_streams" value: {{ string_value: "{n_streams}" }} }} ]'''
    )
    assert threads.bls_threads(system, None) == n_threads
