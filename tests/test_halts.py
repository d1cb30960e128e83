"""A listener without audio has what runs on the GPU halted: turns and workers, with work that ends when it is told to."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from barkstream.engines import Chain, Chunk, Generation, Row, Window
from barkstream.engines.turns import AT_ONCE, FOLLOW_S, HEAD_START_S, LONE, Launch, Turns
from barkstream.engines.workers import (
    AT_LEISURE_S,
    BUSY,
    COMFORTABLE_S,
    CROWDED,
    DUE_S,
    FIRST,
    HURRIED,
    LAST,
    POLICIES,
    REST,
    CausalWorker,
    FineWorker,
    Worker,
    at_once,
)
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

    def make(turns, name="coarse", max_batch=32, **more):
        engine = Haltable()
        worker = CausalWorker(
            engine.start, engine.release, max_batch, turns, POLICIES[name], lambda n: 0.0002, halt=engine.halt, rate_hz=150.0,
            **more,
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


def test_a_piece_is_halted_for_a_listener_who_leaves_and_the_others_go_on_without_it(stage):
    engine, worker = stage(Turns())
    left, stays = worker.submit([row(stream=1), row(stream=2)])
    engine.begun(1)
    worker.drop(3)  # of whom nothing is under way
    assert not engine.n_halts
    worker.drop(1)
    assert len(left.result(LONG_S).tokens) == 7 and not left.result().ended
    engine.begun(2)
    assert engine.n_halts == 1 and engine.batches[1] == [(2, 53)]
    engine.let()
    assert stays.result(LONG_S).tokens.tolist() == list(range(5, 65))


def test_who_leaves_while_a_batch_is_being_prepared_has_it_halted_when_it_is_launched(stage):
    engine, worker = stage(Turns())
    start = worker._start

    def slow_start(rows):
        if not engine.batches:
            worker.drop(1)
        return start(rows)

    worker._start = slow_start
    left, stays = worker.submit([row(stream=1), row(stream=2)])
    assert len(left.result(LONG_S).tokens) == 7
    engine.begun(2)
    engine.let()
    assert len(stays.result(LONG_S).tokens) == 60 and engine.n_halts == 1


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
    codec.submit([Chunk(np.zeros((8, 24), np.int32), np.zeros(1, np.float32))])[0].result(LONG_S)
    assert engine.n_halts == 1 and len(said) == 1
    codec.close()
    thread.join()


@pytest.mark.parametrize("n_streams", [CROWDED - 1, CROWDED])
def test_in_a_crowd_the_codecs_call_for_a_second_chunk_ends_a_first_batch(stage, n_streams):
    """There most of coarse's batches have a row that ranks as first, and a second chunk is due soon."""
    turns = Turns()
    engine, worker = stage(turns)
    worker.submit([row(position=0)])
    engine.begun(1)
    codec = Worker(at_once(lambda calls: calls), 4, turns, POLICIES["codec"], lambda: n_streams)
    thread = threading.Thread(target=codec.work, daemon=True)
    thread.start()
    answer = codec.submit([Chunk(np.zeros((8, 28), np.int32), np.ones(1, np.float32))])[0]
    answer.result(LONG_S)
    assert engine.n_halts == (n_streams >= CROWDED)
    engine.let()
    codec.close()
    thread.join()


CHUNKS = (
    (27, 0),
    (27, 1),
    (54, 0),
    (60, 1),
    (90, 1),
    (1154, 0),
)  # frames, state; a crowd's first one and an offline one are among them


def window(n_frames, n_before, n_asked=None):
    """n_asked: frames behind n_before that are known, in their first codebooks."""
    codes = np.full((8, n_frames), 1024, np.int32)
    codes[:, :n_before] = codes[:2, : n_before + (n_frames if n_asked is None else n_asked)] = 5
    return Window(codes, n_before, np.zeros((6, n_frames), np.float32), 0.5)


def test_ranks():
    chain = Chain(np.zeros((1, 257), np.int32), np.array([[60, 630]], np.int32))
    chunks = [Chunk(np.zeros((8, n), np.int32), np.full(9, state, np.float32)) for n, state in CHUNKS]
    assert [POLICIES["codec"].rank(chunk) for chunk in chunks] == [LAST, FIRST, HURRIED, HURRIED, REST, REST]
    crowd = [POLICIES["codec"].rank(chunk, n_streams=CROWDED) for chunk in chunks]
    assert crowd == [LAST, LAST, HURRIED, HURRIED, REST, REST]
    in_hand = [(n, POLICIES["codec"].rank(chunks[4]._replace(lead_s=n))) for n in (-1.0, 0.5 * DUE_S, 1.5 * DUE_S)]
    assert in_hand == [(-1.0, LAST), (0.5 * DUE_S, LAST), (1.5 * DUE_S, REST)]
    ranks = [POLICIES["fine"].rank(window(256, 256 - n)) for n in (30, 33, 66, 126)]
    assert ranks == [FIRST, HURRIED, HURRIED, REST]
    without_preset = [window(256, n_before, n_asked) for n_before, n_asked in ((0, 30), (27, 33), (54, 66), (114, 66))]
    assert [POLICIES["fine"].rank(each) for each in without_preset] == [FIRST, HURRIED, HURRIED, HURRIED]
    assert POLICIES["fine"].rank(window(1024, 512, 20)) == REST  # offline
    ranks = [
        POLICIES["semantic"].rank(row(n, position=position)) for n, position in ((46, 0), (60, 46), (60, 106), (768, 0))
    ]
    assert ranks == [FIRST, HURRIED, REST, REST]
    offline = replace(row(120, position=0), chain=chain)
    ranks = [POLICIES["coarse"].rank(each) for each in (row(position=0), row(position=60), row(position=120), offline)]
    assert ranks == [FIRST, HURRIED, REST, HURRIED]


def test_semantic_calls_are_hurried_until_coarse_has_heard_of_their_stream(stage):
    """Without a preset four of them come before a listener's first window; an offline sentence's are one long one."""
    turns = Turns()
    coarse_engine, coarse = stage(turns)
    engine, semantic = stage(turns, "semantic", max_batch=1, has_begun=coarse.knows)
    began = coarse.submit([row(stream=1, position=0)])[0]
    coarse_engine.begun(1)
    coarse_engine.let()
    began.result(LONG_S)
    with turns.turn(lambda: -1):
        known, unknown = (semantic.submit([row(60, stream=i, position=128)])[0] for i in (1, 2))
    for n, answer in enumerate((unknown, known), 1):  # by rank, not in the order of their coming
        engine.begun(n)
        engine.let()
        answer.result(LONG_S)
    assert [batch[0][0] for batch in engine.batches] == [2, 1]
    assert semantic._rank(row(60, stream=2, position=192)) == HURRIED
    assert semantic._rank(row(768, stream=2, position=128)) == REST
    coarse.drop(1)
    assert not coarse.knows(1)


@pytest.mark.parametrize("n_others", [BUSY - 2, BUSY - 1, 2 * BUSY - 1])
def test_few_go_along_with_a_first_call_and_nobody_who_is_comfortable_unless_many_are_live(stage, n_others):
    turns, others = Turns(), range(2, 2 + n_others)
    engine, worker = stage(turns)
    now_s = time.monotonic()
    comfortable = set(others[:-10])  # the others have little in hand, half of what these have
    with turns.turn(lambda: 0):
        for stream in others:
            worker._began_s[stream] = now_s - 600 / 150 + COMFORTABLE_S * (1.5 if stream in comfortable else 0.5)
        worker.submit([row(stream=stream) for stream in others])
        worker.submit([row(stream=1, position=0)])
    engine.begun(1)
    streams = [stream for stream, _ in engine.batches[0]]
    assert streams[0] == 1
    if n_others + 1 < BUSY:
        assert set(streams[1:]) == set(others) - comfortable
    else:
        assert len(streams) == max(POLICIES["coarse"].busy_first_batch, (n_others + 1) // 2)
        assert comfortable & set(streams)
    engine.let()


@pytest.mark.parametrize(
    ("lead_s", "rank"), [(0.0, HURRIED), (0.6 * AT_LEISURE_S, HURRIED), (1.2 * AT_LEISURE_S, REST)]
)
def test_a_later_sentence_is_in_no_hurry_while_its_listener_has_enough_of_those_before(stage, lead_s, rank):
    engine, worker = stage(Turns())
    began = worker.submit([row(stream=1, position=0)])[0]
    engine.begun(1)
    engine.let()
    began.result(LONG_S)
    with worker._turns.turn(lambda: -1):
        worker.submit([replace(row(stream=1, position=0), lead_s=lead_s), row(stream=1, position=60)])
        # The latter has .4 s more, and no time has gone by.
        assert [each.rank for each in worker._waiting] == [rank, rank]
        worker._began_s[1] -= 2 * AT_LEISURE_S  # now it has
        worker.submit([row(stream=1, position=60)])
        assert worker._waiting[-1].rank == HURRIED
        worker.drop(1)


@pytest.mark.parametrize(("lead_s", "rank"), [(0.0, FIRST), (0.6 * AT_LEISURE_S, HURRIED), (1.2 * AT_LEISURE_S, REST)])
def test_a_new_stream_whose_listener_has_something_in_hand_is_no_newcomer(stage, lead_s, rank):
    engine, worker = stage(Turns())
    with worker._turns.turn(lambda: -1):
        worker.submit([replace(row(stream=1, position=0), lead_s=lead_s)])
        assert [each.rank for each in worker._waiting] == [rank]
        worker.drop(1)


def test_with_a_first_call_no_sentence_begins_for_a_listener_who_has_enough_however_many_are_live(stage):
    """It would hold up who has no audio yet."""
    turns, others, leisurely, needy = Turns(), range(10, 10 + BUSY), [2, 3], [4, 5]
    engine, worker = stage(turns)
    with turns.turn(lambda: 0):
        now_s = time.monotonic()
        for stream in (*others, *leisurely, *needy):
            worker._began_s[stream] = now_s - 600 / 150
        worker.submit([row(stream=stream) for stream in others])
        worker.submit([replace(row(stream=stream, position=0), lead_s=2 * AT_LEISURE_S) for stream in leisurely])
        worker._later.add(6)
        worker._began_s[6] = now_s + AT_LEISURE_S
        worker.submit([row(stream=6, position=120)])  # behind its first two windows
        worker.submit([replace(row(stream=stream, position=0), lead_s=0.1) for stream in needy])
        worker.submit([row(stream=1, position=0)])
    engine.begun(1)
    streams = [stream for stream, _ in engine.batches[0]]
    assert streams[:3] == [1, 4, 5] and not {2, 3, 6} & set(streams)
    assert len(streams) == POLICIES["coarse"].busy_first_batch
    engine.let()
    engine.begun(2)
    assert {2, 3, 6} <= {stream for stream, _ in engine.batches[1]}
    engine.let()


def test_few_go_along_with_a_first_call_however_little_all_have(stage):
    turns, others = Turns(), range(2, BUSY)
    engine, worker = stage(turns)
    with turns.turn(lambda: 0):
        worker.submit([row(stream=stream) for stream in others])
        worker.submit([row(stream=1, position=0)])
    engine.begun(1)
    assert len(engine.batches[0]) == POLICIES["coarse"].first_batch < len(others)
    engine.let()


@pytest.mark.parametrize("n_others", [10, BUSY])
def test_with_a_first_semantic_call_goes_who_is_hurried_and_others_only_if_many_are_live(stage, n_others):
    """Newcomers one after the other would each have a turn of their own before his."""
    turns = Turns()
    engine, worker = stage(turns, "semantic")
    with turns.turn(lambda: 0):
        worker.submit([row(stream=stream, position=106) for stream in range(20, 20 + n_others)])
        worker.submit([row(stream=stream, position=46) for stream in range(2, 5)])
        worker.submit([row(46, stream=1, position=0)])
    engine.begun(1)
    streams = [stream for stream, _ in engine.batches[0]]
    assert streams[0] == 1 and set(streams[1:4]) == {2, 3, 4}
    assert len(streams) == (POLICIES["semantic"].first_batch if n_others == BUSY else 4)
    engine.let()


def test_no_more_than_a_first_batch_go_along_however_many_are_hurried(stage):
    turns = Turns()
    engine, worker = stage(turns, "semantic")
    with turns.turn(lambda: 0):
        worker.submit([row(stream=stream, position=106) for stream in range(20, 25)])
        worker.submit([row(stream=stream, position=46) for stream in range(2, 12)])
        worker.submit([row(46, stream=1, position=0)])
    engine.begun(1)
    streams = [stream for stream, _ in engine.batches[0]]
    assert streams[0] == 1 and len(streams) == POLICIES["semantic"].first_batch
    assert set(streams[1:]) < set(range(2, 12))
    engine.let()


def test_a_semantic_call_that_has_waited_for_long_is_hurried_and_an_offline_one_is_not(stage):
    """Newcomers one after the other would have all turns, and semantic rows do not go along with their first calls."""
    engine, worker = stage(Turns(), "semantic")
    with worker._turns.turn(lambda: 0):
        answers = worker.submit([row(stream=2), row(768, stream=3), row(stream=4)])
        for each in worker._waiting[:2]:
            each.since_s -= POLICIES["semantic"].old_s
        assert worker._lowest_rank() == HURRIED
        worker.submit([row(46, stream=1, position=0)])
    engine.begun(1)
    assert [stream for stream, _ in engine.batches[0]] == [1, 2]
    engine.let()
    assert len(answers[0].result(LONG_S).tokens) == 60


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


@pytest.mark.parametrize("n_others", [CROWDED - 2, CROWDED - 1])
def test_in_a_crowd_a_second_window_is_as_urgent_as_a_first_but_not_a_later_sentences(stage, n_others):
    _, worker = stage(Turns())
    for stream in range(2, 2 + n_others):
        worker._began_s[stream] = time.monotonic()
    worker.submit([row(stream=1, position=0)])
    is_crowded = n_others + 1 >= CROWDED
    assert worker._rank(row(stream=1, position=60)) == (FIRST if is_crowded else HURRIED)
    assert worker._rank(row(stream=1, position=120)) == REST
    worker.submit([row(stream=1, position=0)])
    assert [worker._rank(row(stream=1, position=position)) for position in (0, 60)] == [HURRIED, HURRIED]
    worker.drop(1)
    assert worker._rank(row(stream=1, position=0)) == FIRST
    assert not worker._later


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


def test_what_is_to_be_halted_does_not_go_on_and_is_expected_to_be_over_soon():
    turns, halted = Turns(), []
    with turns.turn(lambda: 4) as turn:
        turn.launched(Launch(LONG_S, halt=lambda: halted.append(1), rank=REST, least_s=0.01))
        assert turn.extended(1.0)
        before_s = turn.over_at_s
        turns.hurry(REST)
        assert turn.extended(0.0)
        turns.hurry(HURRIED)
        assert not turn.extended(1.0) and not halted
        with turns.turn(lambda: 2, lambda: HURRIED) as other:
            other.launched(Launch(0.0, rank=HURRIED))
            assert halted == [1]
            assert turn.over_at_s < before_s - 4 and turn.over_at_s >= turn.begins_s + 0.01


class Others:
    """Turns that others have: `runs` launches haltable work, which is over at the end of the test; `prepares` waits to be told to."""

    def __init__(self):
        self.turns, self.halted = Turns(), []
        self._over, self._threads, self._told = threading.Event(), [], []

    def runs(self, name, rank=REST, urgency=4, least_s=0.0):
        """The turn, once its work is launched."""
        turn, go = self.prepares(name, rank, urgency, least_s)
        go()
        return turn

    def prepares(self, name, rank=REST, urgency=4, least_s=0.0):
        """The turn, once it has begun, and what launches its work and returns when that is done."""
        begun, told, launched, turns = threading.Event(), threading.Event(), threading.Event(), []
        launch = Launch(LONG_S, halt=lambda: self.halted.append(name), rank=rank, least_s=least_s)
        self._told.append(told)

        def go():
            told.set()
            assert launched.wait(LONG_S)

        def take():
            with self.turns.turn(lambda: urgency, lambda: rank) as turn:
                turns.append(turn)
                begun.set()
                assert told.wait(LONG_S)
                turn.launched(launch)
                launched.set()
                assert self._over.wait(LONG_S)

        self.spawn(take)
        assert begun.wait(LONG_S / 2)
        return turns[0], go

    def spawn(self, work):
        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()
        return self._threads[-1]

    def waits(self):
        """Until somebody waits for a turn."""
        while not self.turns._waiting:
            time.sleep(0.0001)

    def end(self):
        for event in (self._over, *self._told):
            event.set()
        for thread in self._threads:
            thread.join(LONG_S)


@pytest.fixture
def others():
    others = Others()
    yield others
    others.end()


def test_what_runs_is_halted_when_what_comes_in_its_place_is_launched(others):
    others.runs("coarse")
    others.turns.hurry(FIRST)
    _, go = others.prepares("semantic", FIRST, AT_ONCE)  # has its turn, though what runs takes 5 s
    assert not others.halted
    go()
    assert others.halted == ["coarse"]


def test_or_a_little_earlier_for_who_says_so(others):
    others.runs("coarse")
    turn, _ = others.prepares("semantic", FIRST, AT_ONCE)
    turn.launching(REST)
    assert not others.halted
    turn.launching(FIRST)
    assert others.halted == ["coarse"]


def test_work_of_the_calls_own_stage_is_halted_at_once_or_when_it_is_launched(others):
    coarse, go = others.prepares("coarse")
    others.turns.hurry(REST, coarse)
    others.turns.hurry(HURRIED, coarse)
    assert not others.halted
    go()
    assert others.halted == ["coarse"]
    semantic = others.runs("semantic", HURRIED, 2)
    others.turns.hurry(HURRIED, semantic)
    assert others.halted == ["coarse"]
    others.turns.hurry(FIRST, semantic)
    assert others.halted == ["coarse", "semantic"]


def test_what_another_stage_was_preparing_runs_until_the_call_is_launched(others):
    _, launch_semantic = others.prepares("semantic", HURRIED, 2)
    others.turns.hurry(FIRST)
    launch_semantic()
    assert not others.halted
    _, launch_coarse = others.prepares("coarse", FIRST, AT_ONCE)
    assert not others.halted
    launch_coarse()
    assert others.halted == ["semantic"]


def test_of_two_that_run_the_first_is_halted_at_once_for_there_is_no_room(others):
    semantic = others.runs("semantic", HURRIED)
    semantic.over_at_s = 0.0  # so another may have its turn
    others.runs("coarse")
    others.turns.hurry(HURRIED)
    assert not others.halted, "the first is as urgent as the call"
    others.turns.hurry(FIRST)
    assert others.halted == ["semantic"]


def test_for_a_call_that_waits_without_having_been_announced_too(others):
    semantic = others.runs("semantic")
    semantic.over_at_s = 0.0
    others.runs("coarse")
    others.spawn(lambda: others.prepares("fine", FIRST, AT_ONCE))
    others.waits()
    while not others.halted:
        time.sleep(0.0001)
    assert others.halted == ["semantic"]


def test_who_goes_before_a_call_does_not_keep_it_waiting(others):
    """Long chunks of the codec are more urgent than a second window, and halt nobody; but the window waits behind them."""
    others.runs("semantic")
    ranks = {"coarse": REST}

    def wait_for_coarse():
        with others.turns.turn(lambda: 2, lambda: ranks["coarse"]):
            pass

    others.spawn(wait_for_coarse)
    others.waits()
    ranks["coarse"] = HURRIED
    _, go = others.prepares("codec", REST, 1)  # has its turn at once, too
    assert not others.halted
    go()
    assert others.halted == ["semantic"]


def test_nothing_is_halted_for_a_call_that_was_taken_back_and_others_go_on():
    turns, halted = Turns(), []
    with turns.turn(lambda: 4) as turn:
        turn.launched(Launch(LONG_S, halt=lambda: halted.append(1), rank=REST))
        turns.hurry(FIRST)
        with turns.turn(lambda: AT_ONCE, lambda: FIRST):
            pass  # nothing to launch any more
        assert not halted and turn.over_at_s > time.monotonic() + LONG_S / 2
        turns.hurry(FIRST)  # nor does this one ever ask for its turn
    began_s = time.monotonic()
    with turns.turn(lambda: 4):
        assert not halted and time.monotonic() - began_s < LONG_S / 2


def test_prefills_cannot_be_halted_so_there_is_time_for_others_to_come_along(others):
    coarse = others.runs("coarse", least_s=0.2)
    others.turns.hurry(FIRST)
    turn, _ = others.prepares("semantic", FIRST, AT_ONCE)
    assert turn.began_s >= coarse.begins_s + 0.2 - HEAD_START_S


def test_a_worker_prepares_while_what_runs_goes_on_and_has_it_halted_when_prefills_are_launched(stage):
    turns, n_halts = Turns(), {}
    engine, worker = stage(turns)
    worker.submit([row(stream=1)])
    engine.begun(1)

    def windows_start(windows):
        n_halts["fine, at its start"] = engine.n_halts
        return lambda: windows

    fine = Worker(windows_start, 8, turns, POLICIES["fine"])
    thread = threading.Thread(target=fine.work)
    thread.start()
    window = Window(np.zeros((8, 256), np.int32), 256 - 30, np.zeros((6, 256), np.float32), 0.5)
    fine.submit([window])[0].result(LONG_S)
    fine.close()
    thread.join()
    assert n_halts == {"fine, at its start": 0} and engine.n_halts == 1
    engine.begun(2)
    other, others_worker = stage(turns, "semantic")
    start = others_worker._start
    others_worker._start = lambda rows: n_halts.update(semantic=engine.n_halts) or start(rows)
    others_worker.submit([row(46, stream=2, position=0)])
    other.begun(1)
    assert n_halts["semantic"] == 2
    other.let()
    engine.let()


def test_of_equally_hurried_windows_the_shortest_go_first():
    """Those of listeners who have the least in hand. Who is in no hurry goes in the order of coming."""
    turns, batches = Turns(), []
    fine = FineWorker(at_once(lambda windows: batches.append(windows) or windows), 2, turns, POLICIES["fine"])
    thread = threading.Thread(target=fine.work, daemon=True)
    thread.start()
    with turns.turn(lambda: -1):
        answers = fine.submit([window(256, 256 - n) for n in (126, 123, 93, 63, 33, 30)])
    for answer in answers:
        answer.result(LONG_S)
    asked = [[256 - each.fill_from for each in batch] for batch in batches]
    assert asked == [[30, 33], [63, 93], [126, 123]]
    fine.close()
    thread.join()


@pytest.mark.parametrize("n_first", [0, 1, 6])
def test_few_fine_windows_go_along_with_a_first_one(n_first):
    """Each adds to what somebody waits for who has no audio yet; those who have none go together."""
    turns, batches = Turns(), []
    fine = FineWorker(at_once(lambda windows: batches.append(len(windows)) or windows), 8, turns, POLICIES["fine"])
    thread = threading.Thread(target=fine.work, daemon=True)
    thread.start()
    with turns.turn(lambda: -1):
        answers = fine.submit([window(256, 256 - n) for n in (*[63] * (9 - n_first), *[30] * n_first)])
    for answer in answers:
        answer.result(LONG_S)
    assert batches == {0: [8, 1], 1: [4, 5], 6: [6, 3]}[n_first]
    fine.close()
    thread.join()


def test_work_that_nothing_ends_is_waited_for():
    turns = Turns()
    with turns.turn(lambda: 4) as turn:
        turn.launched(Launch(1.0, rank=REST))
        turns.hurry(FIRST)
        assert not turn.is_halted and turn.over_at_s > time.monotonic() + 0.9


def test_who_waits_for_tokens_sooner_is_first_whatever_tokens_they_are(stage):
    """A long window reads far ahead: its tokens come late in the sentence, and somebody waits for them early."""
    engine, worker = stage(Turns(), "semantic", 4)
    with worker._turns.turn(lambda: -1):
        now_s = time.monotonic()
        worker._began_s |= dict.fromkeys((1, 2, 3, 4, 5), now_s)
        # Of stream 1 window 240 waits, 1.6 s into its sentence; of the others windows 600, 4 s into theirs.
        worker.submit([replace(row(stream=stream, position=225), due_s=4.0) for stream in (2, 3, 4, 5)])
        worker.submit([replace(row(stream=1, position=285, n_tokens=70), due_s=1.6)])
        assert [each.call.stream for each in worker._together(worker._waiting)][0] == 1
        left = worker._waiting[-1].call.after(np.arange(60, dtype=np.int32))
        assert left.position == 345 and left.due_s == 1.6  # and so for what is left of the call
        worker.submit([replace(row(stream=6, position=285), due_s=1.6)])  # of whom this process has not heard before
        assert worker._slack_s(worker._waiting[-1].call, time.monotonic()) == pytest.approx(0, abs=0.1)
        worker.drop(1, 2, 3, 4, 5, 6)
