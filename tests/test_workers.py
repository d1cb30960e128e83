"""Workers of the process that a GPU's stages share: stages that cost nothing, so this runs anywhere."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from barkstream.engines import Chunk, Generation, Row, Window
from barkstream.engines.slots import Slot, Slots
from barkstream.engines.turns import FOLLOW_S, HEAD_START_S, HURRIED, LONE, UNHURRIED, Launch, Turns
from barkstream.engines.workers import (
    HURRIED_BATCH_S,
    PIECE_S,
    POLICIES,
    TIGHT_BATCH_S,
    TIGHT_S,
    CausalWorker,
    Policy,
    Worker,
    at_once,
    measure,
)
from barkstream.sampling import Sampling


class FakeGPT:
    """Says the number of ids before; ends at end_at. Remembers its batches: (stream, position, n_tokens) of each row."""

    def __init__(self, end_at=10**9):
        self.batches, self.released, self.end_at = [], [], end_at
        self.gate = threading.Semaphore(10**6)

    def generate(self, rows):
        self.gate.acquire()
        self.batches.append([(row.stream, row.position, row.n_tokens) for row in rows])
        if any(row.sampling.seed == 13 for row in rows):
            raise RuntimeError("unlucky")
        return [self._said(row) for row in rows]

    def _said(self, row):
        tokens = len(row.ids) + np.arange(row.n_tokens, dtype=np.int32)
        kept = tokens[tokens < self.end_at]
        return Generation(kept, len(kept) < len(tokens))

    def release(self, *streams):
        self.released += streams


def row(n_tokens, stream=1, seed=0, n_ids=5, position=60):
    return Row(np.zeros((n_ids, 1), np.int32), n_tokens, position, Sampling(seed=seed), stream)


@pytest.fixture
def start():
    """Starts workers; stops them at the end."""
    workers, threads = [], []

    def start(worker):
        workers.append(worker)
        threads.append(threading.Thread(target=worker.work))
        threads[-1].start()
        return worker

    yield start
    for worker in workers:
        worker.close()
    for thread in threads:
        thread.join()


STEP_S = PIECE_S / 20  # so pieces are of 15 tokens
POLICY = Policy(lambda row: False, lambda row: row.position == 0, hurried=2, urgency=3, company=4, patience_s=0.2)


def causal(gpt, max_batch=4, turns=None):
    """Pieces of 15 tokens."""
    return CausalWorker(at_once(gpt.generate), gpt.release, max_batch, turns or Turns(), POLICY, lambda n_rows: STEP_S)


def test_what_a_piece_will_take_is_its_steps_and_the_prefills_of_calls_that_do_not_go_on(start):
    """Pieces of 15 tokens; a prefill is said to take 1 s, and nobody is in a hurry."""
    said = []

    class Listening(Turns):
        def _launched(self, turn, launch):
            said.append(launch.takes_s)
            super()._launched(turn, replace(launch, takes_s=0.0))

    gpt = FakeGPT()
    worker = start(
        CausalWorker(
            at_once(gpt.generate),
            gpt.release,
            4,
            Listening(),
            POLICY,
            lambda n_rows: STEP_S,
            lambda n_rows: 1.0 * n_rows,
            rate_hz=1.0,
        )
    )

    def takes_s(*rows):
        said.clear()
        for answer in worker.submit(rows):
            answer.result()
        return said

    assert takes_s(row(20, n_ids=5)) == pytest.approx([1 + 15 * STEP_S, 5 * STEP_S])
    assert takes_s(row(4, n_ids=25)) == pytest.approx([4 * STEP_S])  # goes on
    assert takes_s(row(4, n_ids=25)) == pytest.approx([1 + 4 * STEP_S])  # has slid
    assert takes_s(row(4, n_ids=29), row(4, stream=2)) == pytest.approx([1 + 4 * STEP_S])
    worker.drop(1)
    assert takes_s(row(4, n_ids=33)) == pytest.approx([1 + 4 * STEP_S])
    assert takes_s(row(20, stream=0), row(20, stream=0)) == pytest.approx([2 + 15 * STEP_S, 5 * STEP_S])
    assert set(worker._held) == set(worker._began_s) == {1, 2}  # and nothing is kept of those without a name


def test_costs_are_measured_at_both_ends_of_every_kernel(monkeypatch):
    """An engine that takes 1 ms a step and row of its kernels, which are for 1, 2, 4 and 8 rows, and .1 ms a row that there is; and
    100 ms for the prefill of a row whose slot, free before or not, holds other ids; at first, ten times that."""
    clock, held, n_calls = [0.0], {}, 0
    slots = Slots([Slot(np.zeros((0, 1), np.int32)) for _ in range(8)])

    def generate(rows):
        nonlocal n_calls
        n_calls += 1
        took_s = rows[0].n_tokens * (0.001 * min(n for n in (1, 2, 4, 8) if n >= len(rows)) + 0.0001 * len(rows))
        with slots.lease(rows) as leased:
            for row, slot in zip(rows, leased, strict=True):
                took_s += 0.1 * (slot.n_known(row.ids) < len(row.ids))
                slot.ids = row.ids
        clock[0] += took_s * (10 if n_calls <= 3 else 1)
        held.update(dict.fromkeys(row.stream for row in rows))
        return []

    def release(*streams):
        for stream in streams:
            slots.release(stream)
            del held[stream]

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    costs = measure(generate, release, np.zeros((5, 1), np.int32), [1, 2, 4, 8])
    assert [costs.step_s(n) for n in (1, 4, 5, 6, 8, 9)] == pytest.approx(
        [0.0011, 0.0044, 0.0085, 0.0086, 0.0088, 0.0088]
    )
    assert [costs.prefill_s(n) for n in (1, 3, 8)] == pytest.approx([0.1, 0.3, 0.8])
    assert not held


def test_a_call_in_pieces_says_what_it_says_in_one(start):
    gpt = FakeGPT()
    generation = start(causal(gpt)).submit([row(60)])[0].result()
    assert generation.tokens.tolist() == list(range(5, 65)) and not generation.ended
    assert [n for ((_, _, n),) in gpt.batches] == [15, 15, 15, 15]


def test_a_row_that_somebody_waits_for_is_not_cut(start):
    gpt = FakeGPT()
    for answer in start(causal(gpt)).submit([row(30, stream=1, position=0), row(60, stream=2)]):
        answer.result()
    assert [n for _, _, n in gpt.batches[0]] == [30, 30]


def test_rows_that_began_apart_end_together_so_no_step_is_made_for_one_that_is_whole(start):
    gpt = FakeGPT()
    for answer in start(causal(gpt)).submit([row(45), row(60, stream=2)]):
        answer.result()
    assert [[n for _, _, n in batch] for batch in gpt.batches] == [[15, 15]] * 3 + [[15]]


@pytest.mark.parametrize(("took_s", "n"), [(PIECE_S / 60, 60), (PIECE_S / 59, 30), (PIECE_S / 15, 15), (1.0, 10)])
def test_a_piece_is_the_largest_part_of_a_window_that_is_short_enough(start, took_s, n):
    gpt = FakeGPT()
    worker = start(CausalWorker(at_once(gpt.generate), gpt.release, 4, Turns(), POLICY, lambda n_rows: took_s))
    worker.submit([row(60)])[0].result()
    assert {tokens for ((_, _, tokens),) in gpt.batches} == {n}


class Clock:
    """Seconds that pass when somebody says so."""

    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def crowd(start, monkeypatch):
    """A worker whose steps take next to no time and four prefills just less than TIGHT_BATCH_S; speech has a token a second. Its clock."""
    clock = Clock()
    monkeypatch.setattr("barkstream.engines.workers.time", SimpleNamespace(monotonic=clock))
    gpt, turns = FakeGPT(), Turns()
    prefill_s = TIGHT_BATCH_S / 4.1
    worker = CausalWorker(
        at_once(gpt.generate), gpt.release, 32, turns, POLICY, lambda n_rows: 1e-6, lambda n_rows: n_rows * prefill_s,
        rate_hz=1.0,
    )  # fmt: skip
    start(worker)
    return worker, gpt, turns, clock


def together(worker, gpt, turns, rows):
    """Streams of the batches in which these rows run, which all wait before the first begins."""
    gpt.batches.clear()
    with turns.turn(lambda: 0):
        answers = worker.submit(rows)
    for answer in answers:
        answer.result()
    return [[stream for stream, _, _ in batch] for batch in gpt.batches]


def test_while_a_listener_may_run_dry_the_ones_ahead_do_not_make_the_batch_long(crowd):
    worker, gpt, turns, clock = crowd
    for stream in range(1, 9):  # all began now; whoever has been made more is further ahead
        together(worker, gpt, turns, [row(4, stream=stream, position=0)])
    rows = [row(4, stream=stream, position=stream) for stream in range(8, 0, -1)]
    assert together(worker, gpt, turns, rows) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    clock.now_s -= TIGHT_S  # so much more is in everyone's hand
    assert together(worker, gpt, turns, rows) == [[1, 2, 3, 4, 5, 6, 7, 8]]


def test_few_go_along_with_a_hurried_row_if_more_would_make_it_late(start):
    gpt, turns = FakeGPT(), Turns()
    a_window_of_six_s = HURRIED_BATCH_S / 1.01
    worker = start(
        CausalWorker(at_once(gpt.generate), gpt.release, 32, turns, POLICY, lambda n: n / 6 * a_window_of_six_s / 60)
    )
    others = [row(4, stream=stream, position=1) for stream in range(2, 12)]
    assert [len(batch) for batch in together(worker, gpt, turns, others)] == [10]
    hurried = row(4, stream=1, position=0)
    assert [len(batch) for batch in together(worker, gpt, turns, [*others, hurried])] == [6, 5]


def test_a_stream_that_is_not_known_yet_counts_as_one_with_nothing_in_hand(crowd):
    """After a process has been lost its sentences go on in the next one."""
    worker, gpt, turns, _ = crowd
    for stream in range(1, 6):
        together(worker, gpt, turns, [row(4, stream=stream, position=0)])
    rows = [row(4, stream=stream, position=stream) for stream in range(1, 6)]
    assert together(worker, gpt, turns, [*rows, row(4, stream=6, position=500)]) == [[6, 1, 2, 3], [4, 5]]


def test_who_goes_on_needs_no_prefill_and_goes_along(crowd):
    worker, gpt, turns, _ = crowd
    for stream in range(1, 9):
        together(worker, gpt, turns, [row(4, stream=stream, position=0)])
    goes_on = [row(4, stream=stream, n_ids=9, position=stream) for stream in (7, 8)]
    rows = [row(4, stream=stream, position=stream) for stream in range(1, 7)]
    assert together(worker, gpt, turns, rows + goes_on) == [
        [1, 2, 3, 4, 7, 8],
        [5, 6],
    ]  # in the order of what they have


def test_a_row_that_comes_later_joins_at_the_next_piece(start):
    gpt = FakeGPT()
    gpt.gate = threading.Semaphore(0)
    worker = start(causal(gpt))
    first = worker.submit([row(40, stream=1)])
    gpt.gate.release()
    while not gpt.batches:
        pass
    second = worker.submit([row(20, stream=2)])
    gpt.gate.release(100)
    assert len(first[0].result().tokens) == 40 and len(second[0].result().tokens) == 20
    assert any({stream for stream, _, _ in batch} == {1, 2} for batch in gpt.batches)


def test_more_rows_than_a_batch_holds_go_oldest_first(start):
    gpt = FakeGPT()
    answers = start(causal(gpt, max_batch=4)).submit([row(15, stream=i) for i in range(1, 8)])
    assert [len(answer.result().tokens) for answer in answers] == [15] * 7
    assert [[stream for stream, _, _ in batch] for batch in gpt.batches] == [[1, 2, 3, 4], [5, 6, 7]]


def test_a_sentences_first_call_goes_before_the_rest_of_a_crowd(start):
    gpt = FakeGPT()
    crowd = [row(15, stream=i) for i in range(1, 6)]
    for answer in start(causal(gpt, max_batch=4)).submit([*crowd, row(15, stream=9, position=0)]):
        answer.result()
    assert [[stream for stream, _, _ in batch] for batch in gpt.batches] == [[9, 1, 2, 3], [4, 5]]


def test_speech_that_ends_in_the_middle_ends_the_call(start):
    gpt = FakeGPT(end_at=30)
    generation = start(causal(gpt)).submit([row(60)])[0].result()
    assert generation.ended and generation.tokens.tolist() == list(range(5, 30))


def test_rows_without_a_stream_keep_a_cache_until_they_are_whole(start):
    gpt = FakeGPT()
    for answer in start(causal(gpt)).submit([row(20, stream=0), row(20, stream=0)]):
        answer.result()
    names = {stream for batch in gpt.batches for stream, _, _ in batch}
    assert len(names) == 2 and max(names) < 0 and set(gpt.released) == names


def test_a_batch_that_fails_tells_all_its_callers_and_the_next_works(start):
    worker = start(causal(FakeGPT()))
    for answer in worker.submit([row(4, seed=13), row(4, stream=2)]):
        with pytest.raises(RuntimeError, match="unlucky"):
            answer.result()
    assert len(worker.submit([row(4)])[0].result().tokens) == 4


def test_an_errand_runs_between_batches_and_its_failure_is_its_callers(start):
    worker = start(causal(FakeGPT()))
    assert worker.between(lambda: 7).result() == 7
    with pytest.raises(ZeroDivisionError):
        worker.between(lambda: 1 / 0).result()


def test_calls_that_came_during_anothers_turn_go_together(start):
    turns, batches = Turns(), []
    worker = Worker(
        at_once(lambda calls: batches.append(calls) or calls),
        8,
        turns,
        Policy(lambda call: False, lambda call: False, hurried=0, urgency=0),
    )
    with turns.turn(lambda: 5):
        start(worker)
        answers = [worker.submit([i])[0] for i in range(3)]
    assert [answer.result() for answer in answers] == [0, 1, 2]
    assert batches == [[0, 1, 2]]


def one_by_one(is_hurried, turns=None):
    """A worker of two calls, and what it says of them when it starts the second, and when that runs: whether each is answered."""
    turns, answers, answered = turns or Turns(), [], []

    def note(calls):
        answered.append([answer.done() for answer in answers])
        return calls

    def begin(calls):
        note(calls)
        return lambda: note(calls)

    policy = Policy(lambda call: False, lambda call: is_hurried, hurried=3, urgency=3)
    return Worker(begin, 1, turns, policy), answers, answered


@pytest.mark.parametrize("is_hurried", [True, False])
def test_answers_that_are_in_no_hurry_come_when_the_next_batch_is_launched(start, is_hurried):
    turns = Turns()
    worker, answers, answered = one_by_one(is_hurried, turns)
    with turns.turn(lambda: 0):
        answers += worker.submit([1, 2])
        start(worker)
    assert [answer.result(timeout=5) for answer in answers] == [1, 2]
    assert answered == [[False, False], [False, False], [is_hurried, False], [True, False]]


def test_answers_do_not_wait_for_a_next_batch_that_somebody_else_goes_before(start):
    turns = Turns()
    worker, answers, answered = one_by_one(False, turns)
    begin = worker._start

    def go_between():
        with turns.turn(lambda: 0):
            answers[0].result(timeout=5)

    def begin_and_be_followed(calls):
        finish = begin(calls)
        if calls == [1]:
            threading.Thread(target=go_between).start()
            while not turns._waiting:
                pass
        return finish

    worker._start = begin_and_be_followed
    with turns.turn(lambda: 0):
        answers += worker.submit([1, 2])
        start(worker)
    assert answers[1].result(timeout=5) == 2 and answered[2] == [True, False]


def test_an_answer_is_not_lost_when_the_next_batch_fails(start):
    turns, begun = Turns(), []
    policy = Policy(lambda call: False, lambda call: False, hurried=3, urgency=3)
    worker = Worker(at_once(lambda calls: begun.append(calls) or [1 / (2 - call) for call in calls]), 1, turns, policy)
    with turns.turn(lambda: 0):
        answers = worker.submit([1, 2])
        start(worker)
    with pytest.raises(ZeroDivisionError):
        answers[1].result(timeout=5)
    assert answers[0].result(timeout=5) == 1 and begun == [[1], [2]]


def test_the_most_urgent_goes_next():
    turns, order = Turns(), []

    def work(urgency):
        with turns.turn(lambda: urgency):
            order.append(urgency)

    with ThreadPoolExecutor(4) as pool:
        with turns.turn(lambda: 0):
            for urgency in (3, 1, 2):
                pool.submit(work, urgency)
            while len(turns._waiting) < 3:
                pass
        pool.shutdown(wait=True)
    assert order == [1, 2, 3]


def test_of_equals_the_stage_goes_next_whose_hurried_call_came_first(start):
    """And not the one that has waited longest, for whom nobody waits."""
    turns, order = Turns(), []
    policy = Policy(lambda call: False, lambda call: call == "hurried", hurried=2, urgency=3)

    def stage(name):
        return start(Worker(at_once(lambda calls: order.append(name) or calls), 4, turns, policy))

    one, other = stage("one"), stage("other")
    with turns.turn(lambda: -1):
        answers = one.submit(["rest"])
        while len(turns._waiting) < 1:
            time.sleep(0.001)
        answers += other.submit(["hurried"])
        while len(turns._waiting) < 2:
            time.sleep(0.001)
        answers += one.submit(["hurried"])
    for answer in answers:
        answer.result(timeout=5)
    assert order == ["other", "one"]


def test_a_turn_ends_with_an_exception_too():
    turns = Turns()
    with pytest.raises(ValueError, match="oh"), turns.turn(lambda: 1):
        raise ValueError("oh")
    with turns.turn(lambda: 2):
        pass


def test_the_next_turn_begins_before_the_work_is_over_and_no_third_one():
    turns, began, over, takes_s = Turns(), {}, {}, 0.04  # takes_s: what is thought; it takes .1 s in truth
    first_runs = threading.Event()

    def work(name):
        if name != "first":
            first_runs.wait()
        with turns.turn(lambda: 1) as turn:
            began[name] = time.monotonic()
            turn.launched(Launch(takes_s))
            first_runs.set()
            time.sleep(0.1 if name == "first" else 0.1 + HEAD_START_S + 0.06)
            over[name] = time.monotonic()
        assert turn.busy_s == pytest.approx(0.1, abs=0.04)  # the second one's begins when the first one's is over

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(work, name) for name in ("first", "second")]:
            done.result()
        time.sleep(0.01)
    assert began["first"] + takes_s / 2 < began["second"] < over["first"]
    assert over["second"] > over["first"]


def test_work_goes_on_only_while_nobody_else_waits():
    turns, had, over = Turns(), threading.Event(), threading.Event()

    def other():
        with turns.turn(lambda: 0) as turn:
            turn.launched(Launch(0.0))
            had.set()
            over.wait(timeout=5)

    with ThreadPoolExecutor(1) as pool, turns.turn(lambda: 1) as turn:
        assert not turn.extended(1.0), "it has not been launched"
        turn.launched(Launch(0.0))
        over_at_s = turn.over_at_s
        assert turn.extended(0.2) and turn.extended(0.2)
        assert turn.over_at_s == pytest.approx(over_at_s + 0.4, abs=0.1)
        pool.submit(other)
        while not turns._waiting:
            time.sleep(0.001)
        assert not turn.extended(0.2)
        assert had.wait(timeout=5)  # shortly before the work is over
        assert not turn.extended(0.2), "another is under way"
        over.set()


def test_two_at_most_are_under_way():
    turns, under_way, most = Turns(), [], []

    def work(name):
        with turns.turn(lambda: 1) as turn:
            under_way.append(name)
            most.append(len(under_way))
            turn.launched(Launch(0.0))
            time.sleep(0.002)
            under_way.remove(name)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(30)))
    assert max(most) == 2


def test_those_who_let_others_go_first_do_not_slip_in_between_two_pieces(monkeypatch):
    monkeypatch.setattr("barkstream.engines.turns.GRACE_S", 0.5)
    turns, order = Turns(), []

    def lone():
        with turns.turn(lambda: LONE):
            order.append("lone")

    with ThreadPoolExecutor(1) as pool:
        for piece in range(3):
            with turns.turn(lambda: 4) as turn:
                order.append(piece)
                if not piece:
                    pool.submit(lone)
                    while not turns._waiting:
                        pass
                turn.launched(Launch(0.0))
    assert order == [0, 1, 2, "lone"]


def test_who_is_not_waited_for_lets_a_listeners_next_call_go_first(monkeypatch):
    monkeypatch.setattr("barkstream.engines.turns.FOLLOW_S", 0.5)  # a busy machine may sleep longer than it is asked to
    turns, order = Turns(), []

    def crowd():
        with turns.turn(lambda: 4):
            order.append("crowd")

    with ThreadPoolExecutor(1) as pool:
        for stage in ("semantic", "coarse", "fine", "codec"):
            with turns.turn(lambda: 1) as turn:
                order.append(stage)
                if stage == "semantic":
                    pool.submit(crowd)
                    while not turns._waiting:
                        pass
                turn.launched(Launch(0.0, is_followed=stage != "codec"))
            time.sleep(0.001)  # the way back and forth
    assert order == ["semantic", "coarse", "fine", "codec", "crowd"]


def test_a_next_call_that_does_not_come_is_not_waited_for_long():
    turns = Turns()
    with turns.turn(lambda: 1) as turn:
        turn.launched(Launch(0.0, is_followed=True))
    began = time.monotonic()
    with turns.turn(lambda: 4):
        assert FOLLOW_S / 2 < time.monotonic() - began < 20 * FOLLOW_S


def test_a_stage_lets_others_go_until_it_has_company_or_somebody_who_waits_or_waited_long(start):
    """Against a stage that wants every turn (urgency 4): who has it next?"""
    turns, order = Turns(), []

    def next_turn(*rows, wait_s=0.0, n_known=2 * POLICY.company):
        gpt = FakeGPT()
        worker = CausalWorker(
            at_once(lambda batch: order.append("patient") or gpt.generate(batch)),
            gpt.release,
            16,
            turns,
            POLICY,
            lambda n: 1.0,
        )
        start(worker)
        for known in worker.submit([row(1, stream=100 + i, position=0) for i in range(n_known)]):
            known.result()
        order.clear()
        with ThreadPoolExecutor(1) as pool:
            with turns.turn(lambda: -1):
                answers = worker.submit(rows)
                other = pool.submit(take_turn)
                while len(turns._waiting) < 2:
                    pass
                time.sleep(wait_s)
            other.result()
        for answer in answers:
            answer.result()
        return order[0]

    def take_turn():
        with turns.turn(lambda: 4):
            order.append("other")

    later = row(4)
    assert next_turn(later) == "other"
    assert next_turn(later, n_known=1) == "patient"  # whose company would it wait for?
    assert next_turn(later, row(4, stream=2, position=0)) == "patient"  # a new stream
    assert next_turn(*[replace(later, stream=i) for i in range(1, POLICY.company + 1)]) == "patient"
    assert next_turn(later, wait_s=2 * POLICY.patience_s) == "patient"


def window(n_frames, fill_from):
    codes = np.zeros((8, n_frames), np.int32)
    codes[2:, fill_from:] = 1024  # unknown
    return Window(codes, fill_from, np.zeros((6, n_frames), np.float32), 1.0)


def chunk(n_frames):
    return Chunk(np.zeros((8, n_frames), np.int32), np.zeros(1, np.float32))


OFFLINE = {"fine": window(1024, 512), "codec": chunk(1154)}
LISTENED_TO = {"fine": window(256, 128), "codec": chunk(90)}


@pytest.mark.parametrize("stage", OFFLINE)
def test_what_is_longer_than_a_listeners_call_waits_for_no_company(start, monkeypatch, stage):
    patience_s = 0.2
    monkeypatch.setattr("barkstream.engines.turns.GRACE_S", 0.5)
    policy = replace(POLICIES[stage], patience_s=patience_s)

    def begins_after_s(call):
        turns, began_s = Turns(), []
        worker = Worker(at_once(lambda calls: began_s.append(time.monotonic()) or calls), 4, turns, policy)
        with turns.turn(lambda: UNHURRIED):
            start(worker)
            answer = worker.submit([call])[0]
        over_s = time.monotonic()
        answer.result(timeout=5)
        return began_s[0] - over_s

    assert begins_after_s(LISTENED_TO[stage]) > 0.9 * patience_s
    assert begins_after_s(OFFLINE[stage]) < 0.5 * patience_s


@pytest.mark.parametrize("stage", OFFLINE)
def test_what_is_longer_than_a_listeners_call_lets_who_is_hurried_go_first(start, stage):
    turns, order = Turns(), []
    worker = start(Worker(at_once(lambda calls: order.append("offline") or calls), 4, turns, POLICIES[stage]))

    def hurried():
        with turns.turn(lambda: HURRIED):
            order.append("hurried")

    with ThreadPoolExecutor(1) as pool, turns.turn(lambda: -1):
        answer = worker.submit([OFFLINE[stage]])[0]
        while len(turns._waiting) < 1:
            time.sleep(0.001)
        pool.submit(hurried)
        while len(turns._waiting) < 2:
            time.sleep(0.001)
    answer.result(timeout=5)
    assert order == ["hurried", "offline"]


def test_urgencies_that_change_while_they_are_compared_leave_nobody_waiting():
    """They depend on the time, so each of two could find, a moment apart, that it is the other's turn. Here it always does."""
    turns, done = Turns(), []

    def work(name):
        me = threading.current_thread()
        with turns.turn(lambda: 5 if threading.current_thread() is me else 3):
            done.append(name)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in ("one", "other")]
    with turns.turn(lambda: 0):
        for thread in threads:
            thread.start()
        while len(turns._waiting) < 2:
            pass
    for thread in threads:
        thread.join(timeout=5)
    assert sorted(done) == ["one", "other"]


def test_many_streams_on_a_pretend_gpu_all_finish(start):
    """The real policies and patience, four stages that only sleep: nobody is forgotten, whatever meets whatever."""
    turns = Turns()

    def generate(rows):
        time.sleep(max(row.n_tokens for row in rows) * 1e-5)
        return [Generation(np.zeros(row.n_tokens, np.int32), False) for row in rows]

    workers = {
        name: CausalWorker(at_once(generate), lambda *streams: None, 8, turns, POLICIES[name], lambda n: PIECE_S / 30)
        for name in ("semantic", "coarse")
    }
    for name in ("fine", "codec"):
        workers[name] = Worker(at_once(lambda calls: time.sleep(0.0005) or calls), 4, turns, POLICIES[name])
    for worker in workers.values():
        start(worker)

    def speak(stream):
        wait = lambda name, call: workers[name].submit([call])[0].result(timeout=20)  # noqa: E731
        wait("semantic", row(47, stream, position=0))
        ahead = []
        for chunk in (24, 60, 120, 240):
            for position in range(60, 60 + chunk, 60):
                ahead += workers["semantic"].submit([row(60, stream, position=position)])
                wait("coarse", row(60, stream, position=position))
            wait("fine", window(134 + chunk, 128))
            wait("codec", Chunk(np.zeros((8, chunk), np.int32), np.zeros(1, np.float32)))
        for call in ahead:
            call.result(timeout=20)
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(speak, range(1, 49)))


def test_rows_of_a_listener_who_left_are_answered_at_once(start):
    gpt = FakeGPT()
    gpt.gate = threading.Semaphore(0)
    worker = start(causal(gpt, max_batch=1))
    under_way, waiting, other = worker.submit([row(40, stream=1), row(40, stream=2), row(16, stream=3)])
    gpt.gate.release()
    while not gpt.batches:  # stream 1's first piece is over, its second one under way or about to be
        pass
    worker.drop(2)
    assert waiting.result(timeout=5).tokens.tolist() == [] and not waiting.result().ended
    worker.drop(1)
    gpt.gate.release(100)
    assert 15 <= len(under_way.result(timeout=5).tokens) <= 30  # not the piece after
    assert len(other.result(timeout=5).tokens) == 16
    assert all(stream != 2 for batch in gpt.batches for stream, _, _ in batch)


def test_a_worker_whose_only_row_left_waits_for_the_next(start):
    turns, gpt = Turns(), FakeGPT()
    worker = causal(gpt, turns=turns)
    with turns.turn(lambda: 0):  # somebody else's, so the row waits for its own
        left = worker.submit([row(15, stream=1)])[0]
        start(worker)
        time.sleep(0.05)
        worker.drop(1)
        assert left.result(timeout=5).tokens.tolist() == []
    assert len(worker.submit([row(15, stream=2)])[0].result(timeout=5).tokens) == 15
    assert [stream for batch in gpt.batches for stream, _, _ in batch] == [2]
