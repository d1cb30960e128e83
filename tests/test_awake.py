"""CPUs that are kept from sleeping: by processes that give way to all others, and end with their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from barkstream.awake import keep_awake

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux has this class of processes")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(is_so):
    for _ in range(500):
        if is_so():
            return True
        time.sleep(0.01)
    return False


def is_idle_class(pid):
    try:
        return os.sched_getscheduler(pid) == os.SCHED_IDLE
    except ProcessLookupError:
        return False


def test_every_cpu_has_one_while_the_block_lasts():
    before = set(children(os.getpid()))
    with keep_awake():
        (ours,) = set(children(os.getpid())) - before
        cpus = os.sched_getaffinity(0)
        assert wait_until(lambda: len(children(ours)) == len(cpus) and all(map(is_idle_class, children(ours))))
        busy = children(ours)
        assert {cpu for pid in busy for cpu in os.sched_getaffinity(pid)} == cpus
    assert not any(map(is_idle_class, busy))


def test_they_end_with_an_owner_that_is_killed():
    code = "import sys, time; from barkstream.awake import keep_awake\nwith keep_awake():\n print('on', flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        (ours,) = children(owner.pid)
        assert wait_until(lambda: children(ours) and all(map(is_idle_class, children(ours))))
        busy = children(ours)
        owner.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_idle_class, busy)))
