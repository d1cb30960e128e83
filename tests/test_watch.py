"""Listeners who leave while a call of theirs is under way."""

from __future__ import annotations

import threading
import time

import pytest

from barkstream.watch import PERIOD_S, Watch


@pytest.fixture
def watch():
    watch = Watch(n_most=4)
    yield watch
    watch.close()


def test_who_leaves_is_seen_to_once_and_soon(watch):
    gone, seen_to = threading.Event(), []
    with watch.listener(gone.is_set, lambda: seen_to.append(time.monotonic())):
        time.sleep(3 * PERIOD_S)
        assert not seen_to
        gone.set()
        left_at = time.monotonic()
        time.sleep(5 * PERIOD_S)
    assert len(seen_to) == 1 and seen_to[0] - left_at < 4 * PERIOD_S


def test_nobody_is_asked_after_their_block(watch):
    asked = []

    def has_left():
        asked.append(1)
        return False

    with watch.listener(has_left, lambda: None):
        time.sleep(2 * PERIOD_S)
    n = len(asked)
    assert n
    time.sleep(3 * PERIOD_S)
    assert len(asked) == n


def test_who_is_slow_to_be_seen_to_holds_up_nobody_else(watch):
    wait, others = threading.Event(), threading.Event()
    with watch.listener(lambda: True, wait.wait), watch.listener(lambda: True, others.set):
        assert others.wait(timeout=2)
        wait.set()
