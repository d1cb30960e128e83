"""Keeps CPUs from sleeping: `python3 -m barkstream.awake`, until its standard input closes.

A stage call wakes half a dozen threads one after another. On a virtual machine waking a CPU that sleeps takes a tenth of a millisecond
and more, because the host must run it again. So every CPU gets a process that is always busy, of the lowest class that Linux has
(SCHED_IDLE): it runs only where nothing else wants to. What that gains, and costs: docs/operating.md.
"""

from __future__ import annotations

import collections
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_awake() -> Iterator[None]:
    """While the block lasts, and no longer than this process lives."""
    process = subprocess.Popen([sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        process.wait()


def main() -> None:
    """One busy child a CPU that this process may use; they end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's, who closes our input
    children = []
    for cpu in os.sched_getaffinity(0):
        child = os.fork()
        if not child:
            be_busy(cpu)
        children.append(child)
    sys.stdin.buffer.read()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def be_busy(cpu: int) -> None:
    """Never returns."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: killed when the parent ends, however it ends
    os.sched_setaffinity(0, {cpu})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    collections.deque(itertools.repeat(None), maxlen=0)  # for ever, and without a byte of Python


if __name__ == "__main__":
    main()
