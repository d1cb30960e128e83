"""Streams over GPUs."""

from __future__ import annotations

import collections
from contextlib import ExitStack

import pytest

from barkstream.spread import StreamKeys, usable_gpus


def gpus_of(keys, n):
    return collections.Counter(key % n for key in keys)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_streams_are_spread_evenly_and_no_key_is_given_out_twice(n):
    keys = StreamKeys(n)
    with ExitStack() as live:
        given = [live.enter_context(keys.key()) for _ in range(4 * n)]
    assert set(gpus_of(given, n).values()) == {4}
    with keys.key() as another:
        assert another not in given and min(given) > 0
    assert max(given) < 1 << 63


def test_who_comes_goes_where_somebody_has_left():
    """In the closed loop of a load test those who end first make room, wherever they were."""
    keys, n = StreamKeys(4), 4
    with ExitStack() as others:
        streams = [keys.key() for _ in range(12)]
        given = [stream.__enter__() for stream in streams]
        gone = [i for i, key in enumerate(given) if key % n == 2][:2]
        for i in gone:
            streams[i].__exit__(None, None, None)
        assert [others.enter_context(keys.key()) % n for _ in gone] == [2, 2]
        for i in set(range(12)) - set(gone):
            streams[i].__exit__(None, None, None)


def test_one_after_another_they_take_turns():
    """Nobody else being there, no GPU is the first choice always."""
    keys, used = StreamKeys(2), set()
    for _ in range(8):
        with keys.key() as key:
            used.add(key % 2)
    assert used == {0, 1}


def test_without_a_gpu_there_is_one_place(monkeypatch):
    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr("barkstream.spread.ctypes.CDLL", no_driver)
    assert usable_gpus() == 1
