"""A listener without audio has what runs on the GPU halted: turns and workers, with work that ends when it is told to."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from barkstream.engines import Chain, Generation, Row, Window
from barkstream.engines.turns import AT_ONCE, FOLLOW_S, LONE, Launch, Turns
from barkstream.engines.workers import COMFORTABLE_S, FIRST, HURRIED, LAST, POLICIES, REST, CausalWorker, Worker
from barkstream.sampling import Sampling

LONG_S = 5.0


class Haltable:
    """Says the number of ids before, all of it at once when `let` is called, or 7 tokens when it is halted."""

    def __init__(self):
        self.batches, self.is_over, self.is_halted, self.n_halts = [], threading.Event(), False, 0

    def start(self, rows):
        self.is_over.clear()
        self.is_halted = False
        self.batches.append([(row.stream, row.n_tokens) for row in rows])

        def finish():
            assert self.is_over.wait(LONG_S)
            return [self._said(row) for row in rows]

        return finish

    def _said(self, row):
        n = min(7, row.n_tokens) if self.is_halted else row.n_tokens
        return Generation(len(row.ids) + np.arange(n, dtype=np.int32), False)

    def halt(self):
        self.is_halted, self.n_halts = True, self.n_halts + 1
        self.is_over.set()

    def let(self):
        self.is_over.set()

    def release(self, *streams):
        pass

    def begun(self, n):
        """Wait for the n-th batch."""
        until = time.monotonic() + LONG_S
        while len(self.batches) < n:
            assert time.monotonic() < until
            time.sleep(0.001)


def row(n_tokens=60, stream=1, position=600):
    return Row(np.zeros((5, 1), np.int32), n_tokens, position, Sampling(), stream)


@pytest.fixture
def stage():
    """What makes workers of coarse, or another stage, which are stopped at the end: the engine and the worker."""
    made = []

    def make(turns, name="coarse", max_batch=32):
        engine = Haltable()
        worker = CausalWorker(
            engine.start, engine.release, max_batch, turns, POLICIES[name], lambda n: 0.0002, halt=engine.halt, rate_hz=150.0
        )  # fmt: skip
        thread = threading.Thread(target=worker.work)
        thread.start()
        made.append((engine, worker, thread))
        return engine, worker

    yield make
    for _, worker, _ in made:
        worker.close()
    for engine, _, thread in made:
        while thread.is_alive():
            engine.let()
            thread.join(0.01)


def test_a_newcomer_does_not_wait_for_the_piece_that_runs_but_goes_along(stage):
    engine, worker = stage(Turns())
    long = worker.submit([row(stream=1)])[0]
    engine.begun(1)
    first = worker.submit([row(stream=2, position=0)])[0]
    engine.begun(2)  # nobody let the first batch go on
    assert sorted(engine.batches[1]) == [(1, 53), (2, 60)]
    engine.let()
    assert len(first.result(LONG_S).tokens) == 60
    assert long.result(LONG_S).tokens.tolist() == list(range(5, 65))  # as if nothing had been


def test_one_who_comes_while_a_batch_is_being_prepared_has_it_halted_when_it_is_launched(stage):
    engine, worker = stage(Turns())
    start, submitted = worker._start, []

    def slow_start(rows):
        if not submitted:
            submitted.append(worker.submit([row(stream=2, position=0)])[0])
        return start(rows)

    worker._start = slow_start
    worker.submit([row(stream=1)])
    engine.begun(2)
    assert [stream for stream, _ in engine.batches[0]] == [1] and {2, 1} == {stream for stream, _ in engine.batches[1]}
    engine.let()
    assert len(submitted[0].result(LONG_S).tokens) == 60


def test_a_full_batch_is_not_halted_again_and_again_for_who_has_no_room_in_it(stage):
    engine, worker = stage(Turns(), max_batch=2)
    answers = worker.submit([row(stream=i, position=0) for i in (1, 2, 3)])
    engine.begun(1)
    assert len(engine.batches[0]) == 2 and not engine.n_halts
    engine.let()
    engine.begun(2)
    engine.let()
    assert all(len(answer.result(LONG_S).tokens) == 60 for answer in answers)


@pytest.mark.parametrize(
    ("running", "comes", "is_halted"),
    [(600, 60, True), (600, 0, True), (0, 60, False), (60, 60, False), (60, 0, True), (600, 600, False)],
)
def test_who_is_hurried_halts_who_is_not_and_who_has_no_audio_all_who_have(stage, running, comes, is_halted):
    """By positions: 0 is a first window, 60 the second, which somebody will soon wait for. Of two stages."""
    turns = Turns()
    engine, worker = stage(turns)
    worker.submit([row(position=running)])
    engine.begun(1)
    other, others_worker = stage(turns, "semantic")
    answer = others_worker.submit([row(n_tokens=46, stream=2, position=comes)])[0]
    if is_halted:
        other.begun(1)
        other.let()
        answer.result(LONG_S)
    assert engine.n_halts == is_halted
    engine.let()


def test_the_last_call_before_first_audio_halts_a_first_one(stage):
    turns = Turns()
    engine, worker = stage(turns)
    worker.submit([row(position=0)])
    engine.begun(1)
    said = []
    codec = Worker(lambda calls: lambda: said.extend(calls) or calls, 4, turns, POLICIES["codec"])
    thread = threading.Thread(target=codec.work)
    thread.start()
    codec.submit([(np.zeros((8, 24), np.int32), np.zeros(1, np.float32))])[0].result(LONG_S)
    assert engine.n_halts == 1 and len(said) == 1
    codec.close()
    thread.join()


def test_ranks():
    chunk, window = (lambda n: (np.zeros((8, n), np.int32), np.zeros(1, np.float32))), Window
    uniforms = np.zeros((6, 256), np.float32)
    chain = Chain(np.zeros((1, 257), np.int32), 60, 630)
    ranks = [POLICIES["codec"].rank(chunk(n)) for n in (24, 30, 60, 90)]
    assert ranks == [LAST, HURRIED, HURRIED, REST]
    ranks = [
        POLICIES["fine"].rank(window(np.zeros((8, 256), np.int32), 256 - n, uniforms, 0.5)) for n in (30, 36, 66, 126)
    ]
    assert ranks == [FIRST, HURRIED, HURRIED, REST]
    ranks = [
        POLICIES["semantic"].rank(row(n, position=position)) for n, position in ((46, 0), (60, 46), (60, 106), (768, 0))
    ]
    assert ranks == [FIRST, HURRIED, REST, REST]
    offline = replace(row(120, position=0), chain=chain)
    ranks = [POLICIES["coarse"].rank(each) for each in (row(position=0), row(position=60), row(position=120), offline)]
    assert ranks == [FIRST, HURRIED, REST, HURRIED]


def test_few_go_along_with_a_first_call_and_nobody_who_is_comfortable(stage):
    turns = Turns()
    engine, worker = stage(turns)
    now_s = time.monotonic()
    with turns.turn(lambda: 0):
        for stream in range(2, 22):  # began so that all have little in hand, but 20 and 21
            worker._began_s[stream] = now_s - 600 / 150 + (10 * COMFORTABLE_S if stream >= 20 else 0.5)
        worker.submit([row(stream=stream) for stream in range(2, 22)])
        worker.submit([row(stream=1, position=0)])
    engine.begun(1)
    streams = [stream for stream, _ in engine.batches[0]]
    assert streams[0] == 1 and len(streams) == POLICIES["coarse"].first_batch and not {20, 21} & set(streams)
    engine.let()


def test_a_later_sentence_halts_nobody_who_is_hurried(stage):
    turns = Turns()
    engine, worker = stage(turns)
    first = worker.submit([row(stream=1, position=0)])[0]
    engine.begun(1)
    engine.let()
    first.result(LONG_S)
    other, others_worker = stage(turns, "semantic")
    others_worker.submit([row(60, stream=2, position=46)])
    other.begun(1)
    worker.submit([row(stream=1, position=0)])  # its second sentence
    assert not other.n_halts
    other.let()
    engine.begun(2)
    worker.submit([row(stream=3, position=0)])  # somebody else's first
    engine.begun(3)
    assert engine.n_halts == 1
    engine.let()


def test_semantic_rows_of_others_do_not_go_along_with_a_first_call(stage):
    turns = Turns()
    engine, worker = stage(turns, "semantic")
    with turns.turn(lambda: 0):
        worker.submit([row(stream=2), row(46, stream=1, position=0), row(46, stream=3, position=0)])
    engine.begun(1)
    assert sorted(stream for stream, _ in engine.batches[0]) == [1, 3]
    engine.let()


def test_the_turn_behind_is_kept_for_who_waits_for_its_own_stage():
    """A fine batch runs, and a first call waits for it to be over: coarse does not go in between."""
    turns, went = Turns(), []
    urgencies = {"fine": LONE}

    def take(stage, urgency):
        with turns.turn(urgency) as turn:
            went.append(stage)
            turn.launched(Launch(0.0))

    with turns.turn(lambda: urgencies["fine"]) as turn:
        turn.launched(Launch(0.0))
        urgencies["fine"] = AT_ONCE  # one waits in the stage
        turns.hurry(FIRST)
        coarse = threading.Thread(target=take, args=("coarse", lambda: 4))
        coarse.start()
        time.sleep(FOLLOW_S / 2)
        assert not went
    take("fine", lambda: AT_ONCE)
    urgencies["fine"] = LONE
    coarse.join(LONG_S)
    assert went == ["fine", "coarse"]


def test_what_is_halted_does_not_go_on_and_is_expected_to_be_over_soon():
    turns, halted = Turns(), []
    with turns.turn(lambda: 4) as turn:
        turn.launched(Launch(LONG_S, halt=lambda: halted.append(1), rank=REST, least_s=0.01))
        assert turn.extended(1.0)
        before_s = turn.over_at_s
        turns.hurry(REST)
        assert not halted and turn.extended(0.0)
        turns.hurry(HURRIED)
        turns.hurry(FIRST)
        assert halted == [1] and not turn.extended(1.0)
        assert turn.over_at_s < before_s - 4 and turn.over_at_s >= turn.begins_s + 0.01


def test_work_that_nothing_ends_is_waited_for():
    turns = Turns()
    with turns.turn(lambda: 4) as turn:
        turn.launched(Launch(1.0, rank=REST))
        turns.hurry(FIRST)
        assert not turn.is_halted and turn.over_at_s > time.monotonic() + 0.9
