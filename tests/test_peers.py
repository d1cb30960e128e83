"""What the processes of `bark` know of one another: limits, GPUs and pacing are for all of them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from barkstream import peers
from barkstream.admission import Admission
from barkstream.pacing import Pacer
from barkstream.peers import Peers
from barkstream.spread import StreamKeys

REPOSITORY = Path(__file__).resolve().parents[1]
# A process of its own that takes a place in the table, says so, and waits to be killed.
LIVES = """
import sys, time
from pathlib import Path
from barkstream.peers import Peers
peers = Peers(2, Path(sys.argv[1]))
with peers.together():
    peers.count_live(3)
    peers.count_stream(1, 2)
peers.tell_need(1, 0.0)
print("there", flush=True)
time.sleep(60)
"""


@pytest.fixture
def table(tmp_path):
    return tmp_path / "bark.peers"


@pytest.fixture
def other(table):
    """A process, killed at the end at the latest."""
    command = [sys.executable, "-c", LIVES, str(table)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "there\n"
        yield process
        process.kill()


def test_another_processs_requests_streams_and_needs_are_seen(table, other):
    here = Peers(2, table)
    assert here.n_live == 3
    assert here.n_streams == [0, 2]
    assert here.is_needy_elsewhere(1, time.monotonic())
    assert not here.is_needy_elsewhere(0, time.monotonic())


def test_a_process_that_was_killed_counts_no_more_once_another_one_starts(table, other):
    here = Peers(2, table)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    Peers(2, table)
    assert here.n_live == 0
    assert here.n_streams == [0, 0]
    assert not here.is_needy_elsewhere(1, time.monotonic())


def test_another_process_of_the_same_number_is_another_process(table, other, monkeypatch):
    """As after a container's restart, whose files are still there."""
    born = peers._born
    monkeypatch.setattr(peers, "_born", lambda pid: born(pid) + 1)
    assert Peers(2, table).n_live == 0


def test_a_closed_one_counts_no_more(table):
    one, another = Peers(1, table), Peers(1, table)
    with one.together():
        one.count_live(1)
    one.tell_need(0, -math.inf)
    assert another.n_live == 1
    one.close()
    assert another.n_live == 0
    assert not another.is_needy_elsewhere(0, 0.0)


def test_the_table_is_for_so_many_processes(table, monkeypatch):
    monkeypatch.setattr(peers, "N_ROWS", 2)
    kept = [Peers(1, table), Peers(1, table)]
    with pytest.raises(RuntimeError, match="room for 2 processes: bark has more instances"):
        Peers(1, table)
    kept[0].close()
    Peers(1, table)


def test_a_limit_is_for_all_and_holds_when_all_come_at_once(table):
    admissions = [Admission(20, Peers(1, table)) for _ in range(4)]
    together = threading.Barrier(4)

    def enter(admission):
        together.wait(5)
        return sum(admission.enter() is None for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        admitted = list(pool.map(enter, admissions))
    assert sum(admitted) == 20
    admissions[admitted.index(max(admitted))].leave(1.0)
    assert [admission.enter() is None for admission in admissions] == [True, False, False, False]


def test_what_other_processes_listeners_have_in_hand_is_seen(table):
    here, there = Peers(2, table), Peers(2, table)
    pacers = [Pacer(4.0, peers=there, gpu=gpu) for gpu in range(2)]
    with pacers[0].player() as near, pacers[1].player() as far:
        pacers[0].take(near, 1.0)
        pacers[1].take(far, 60.0)
        assert here.in_hand_elsewhere_s == pytest.approx(5.0, abs=0.1)
        assert there.in_hand_elsewhere_s == 0.0
    assert here.in_hand_elsewhere_s == 0.0


def test_streams_of_all_are_spread_evenly_and_no_key_is_given_out_twice(table):
    everybody = [StreamKeys(3, Peers(3, table)) for _ in range(2)]
    with ExitStack() as live:
        given = [live.enter_context(everybody[i % 5 % 2].key()) for i in range(12)]
    assert set(Counter(key % 3 for key in given).values()) == {4}
    assert len(set(given)) == 12


def test_a_stream_far_ahead_yields_to_one_of_another_process_on_its_gpu(table):
    here, there = Peers(2, table), Peers(2, table)
    pacers = [Pacer(4.0, peers=here, gpu=gpu) for gpu in range(2)]
    with pacers[0].player() as on_0, pacers[1].player() as on_1, ThreadPoolExecutor(2) as pool:
        for pacer, player in zip(pacers, (on_0, on_1), strict=True):
            pacer.take(player, 60.0)
        far_away = Pacer(4.0, peers=there, gpu=1)
        with far_away.player() as fresh:
            assert pacers[0].wait(on_0, lambda: False) == 0
            waits = pool.submit(pacers[1].wait, on_1, lambda: False)
            time.sleep(0.2)
            assert not waits.done()
            far_away.take(fresh, 4.0)
            assert 0.1 < waits.result(5) < 5


def test_who_waits_for_another_process_and_leaves_goes_at_once(table):
    pacer, far_away = Pacer(4.0, peers=Peers(1, table)), Pacer(4.0, peers=Peers(1, table))
    with pacer.player() as ahead, far_away.player():
        pacer.take(ahead, 60.0)
        began_s = time.monotonic()
        pacer.wait(ahead, lambda: time.monotonic() > began_s + 0.1)
        assert time.monotonic() - began_s < 2
