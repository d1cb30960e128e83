"""Semantic tokens that are made before they are needed: what is there, and what is waited for."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np

from barkstream.options import Schedule
from barkstream.sampling import Sampling
from barkstream.semantic import SemanticTokens

SCHEDULE = Schedule(semantic_ahead=60, semantic_least=60)
N_MOST = 200


class ByHand:
    """An executor whose calls are over when somebody says so."""

    def __init__(self):
        self.calls = []

    def submit(self, generate, prefix, n, position, *others):
        self.calls.append((Future(), n, position))
        return self.calls[-1][0]

    def settle(self):
        """The latest call: tokens that count up."""
        future, n, position = self.calls[-1]
        future.set_result((np.arange(position, position + n, dtype=np.int32), False))


def semantic_tokens(worker, schedule=SCHEDULE):
    """Of which 46 are there, and the next call has been started, if any."""
    layout, stages = SimpleNamespace(rate_hz=50, max_new_tokens=N_MOST), SimpleNamespace(semantic=None)
    semantic = SemanticTokens(np.zeros(1, np.int32), layout, Sampling(), np.inf, schedule, stages, 1, worker)
    with ThreadPoolExecutor(1) as waits:
        ready = waits.submit(semantic.ensure, 46)
        while not worker.calls:
            time.sleep(0.001)
        worker.settle()
        ready.result(timeout=10)
    return semantic


def test_a_call_that_was_made_ahead_is_taken_once_it_is_over_and_not_waited_for():
    worker = ByHand()
    semantic = semantic_tokens(worker)
    assert semantic.has(46) and not semantic.has(47)
    assert len(semantic.tokens) == 46 and len(worker.calls) == 2  # the second is under way
    worker.settle()
    assert semantic.has(106) and semantic.tokens.tolist() == list(range(106))
    assert [n for _, n, _ in worker.calls] == [46, 60, 60]  # and the next one has begun


def test_what_nobody_asks_for_stays_where_it_is_so_calls_do_not_run_further_ahead():
    worker = ByHand()
    semantic = semantic_tokens(worker)
    worker.settle()
    assert semantic.has(40) and len(semantic.tokens) == 46 and len(worker.calls) == 2


def test_where_nothing_is_made_ahead_there_is_what_was_asked_for():
    worker = ByHand()
    semantic = semantic_tokens(worker, Schedule(semantic_ahead=0))
    assert semantic.has(46) and not semantic.has(47) and len(worker.calls) == 1


def test_all_that_there_will_be_is_enough():
    worker = ByHand()
    semantic = semantic_tokens(worker)
    worker.settle()
    assert semantic.has(106)
    worker.settle()
    assert semantic.has(166)
    worker.settle()  # what is left: 34
    assert semantic.has(N_MOST + 1) and len(semantic.tokens) == N_MOST
