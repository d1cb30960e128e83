"""Stages at work in one process: a thread each, which puts together what its callers ask for and takes turns on the GPU.

A GPT decodes the rows of all calls together, a piece of a call at a time. So a row that comes joins the others at the next
piece, and a more urgent stage never waits longer than a piece takes.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from barkstream.engines import Generation, Row, Window, Windows
from barkstream.engines.turns import AT_ONCE, LONE, UNHURRIED, Launch, Turn, Turns
from barkstream.sampling import Ints, Sampling

PIECE_S = 0.08  # how long a GPT's piece may take, prefills aside: who cannot have it halted waits so long at most
HURRIED_PIECE_S = 0.12  # the same, if somebody waits for a row of it
# Tokens of a piece: parts of a coarse window, which has 60. So rows that began at different times end together, and no step is made
# for a row that is whole already.
PIECES = 60, 30, 15, 10
# What a call is to a listener: the last one before first audio, which is short; one of those before; one that somebody will soon wait
# for, with next to nothing in hand; the rest.
LAST, FIRST, HURRIED, REST = range(4)
COMFORTABLE_S = 1.5  # who has more made that has not been played does not go along with those
AT_LEISURE_S = 2.0  # with more of the sentences before in hand a listener's next one may take its time
BUSY = 24  # with so many streams known everybody does, and more rows
CROWDED = 36  # with so many second chunks are as urgent as first: those are held (pacing.py), and it is the second that is late
TIGHT_S = 2.0  # while somebody has less than this made that has not been played, batches are no larger
TIGHT_BATCH_S = 0.1  # than what takes so long for half a window, or this many rows:
FEW = 4
# For those who are in no hurry no window of a batch with a hurried row takes longer, prefills included: the second chunk is due .3 s
# after the first.
HURRIED_BATCH_S = 0.06
# With less in hand a listener cannot wait for a batch that nothing ends, and for another behind it. (In virtual time .15 s spared third
# chunks less, .35 s made less audio.)
DUE_S = 0.2
SOON = 240  # coarse tokens: a listener who has been sent less than these 1.6 s does not wait for company, and hears no longer calls
LISTENED_TO = 64  # semantic tokens of a call that a listener may be waiting for, at most
CHUNK, WINDOW = 120, 512  # frames of a listener's chunk, and of the window that it is filled in, at most
STEPS_TIMED, N_TRIES, N_TRIES_ON_CPU = (8, 24), 5, 2  # on a CPU a try takes seconds

Call = TypeVar("Call")
Result = TypeVar("Result")
Finish = Callable[[], Sequence[Result]]  # waits for what was started
Start = Callable[[list[Call]], Finish[Result]]
# An only row in pieces of so many tokens at most, one behind the other for as long as it may go on.
StartAlone = Callable[[Row, int, Callable[[], bool]], Finish[Generation]]


def at_once(run: Callable[[list[Call]], Sequence[Result]]) -> Start[Call, Result]:
    """For an engine whose results are there when it returns."""

    def start(calls: list[Call]) -> Finish[Result]:
        results = run(calls)
        return lambda: results

    return start


@dataclass(frozen=True)
class Policy(Generic[Call]):
    """When a stage has its turn: of the stages that want one, that with the lowest urgency.

    Batches are what makes a loaded GPU fast, so calls that nobody waits for let others go first until they have company.
    """

    is_first: Callable[[Call], bool]  # somebody waits for it
    is_hurried: Callable[[Call], bool]  # or will soon
    hurried: int  # urgency with such a call
    urgency: int  # without, but with company
    first: int = FIRST  # or LAST: rank of those
    # The last call before a listener's second chunk, which is due soon: it takes next to nothing, and ranks as FIRST. While CROWDED streams
    # are known as LAST: two of three of coarse's batches there, which take 60 ms, have a row of FIRST, and nobody of that rank ends them.
    is_second: Callable[[Call], bool] = lambda call: False
    # The last call before a chunk that a listener will be short of at once: as LAST, however many streams are known.
    is_due: Callable[[Call], bool] = lambda call: False
    # Of equally hurried calls those with less of this go first, whose listeners have less in hand; then the oldest.
    size: Callable[[Call], int] = lambda call: 0
    first_batch: int = 12  # rows of a batch with such a call, others that are such aside: with more it takes longer
    busy_first_batch: int = 12  # the same with BUSY streams, or
    first_batch_share: float = 0.0  # so many of them, if that is more: first audio comes later, and more is made
    # Whether only hurried rows go along, unless streams are BUSY. (None did, and where newcomers came one after the other, those before
    # them ran dry.)
    is_first_for_hurried: bool = False
    is_second_first: bool = False  # whether a sentence's second call ranks as FIRST while CROWDED streams are known
    company: int = 1  # calls that need wait no longer
    patience_s: float = 0.0  # nor does one that has waited so long
    old_s: float = math.inf  # one of a listener that has waited so long is hurried
    is_followed: bool = True  # a hurried call's listener calls another stage next
    # Who does not wait for company either: whom somebody will soon wait for, and, behind all who are hurried, who is longer than any
    # call that is listened to.
    is_soon: Callable[[Call], bool] = lambda call: False
    # What a sentence begins with. One for a listener who has enough of those before stays behind first calls.
    is_beginning: Callable[[Call], bool] = lambda call: False
    is_long: Callable[[Call], bool] = lambda call: False

    def rank(self, call: Call, n_streams: int = 0) -> int:
        """LAST, FIRST, HURRIED or REST, while so many streams are known."""
        if self.is_first(call):
            return self.first
        if self.is_due(call):
            return LAST
        if self.is_second(call):
            return LAST if n_streams >= CROWDED else FIRST
        return HURRIED if self.is_hurried(call) else REST

    def most_with_first(self, n_streams: int) -> int:
        """Rows of a batch with a first call while so many streams are known."""
        if n_streams < BUSY:
            return self.first_batch
        return max(self.busy_first_batch, int(self.first_batch_share * n_streams))


def n_asked(window: Window | Windows) -> int:
    """Frames to fill, and to look ahead at: without the unknown ones behind them that only make a window longer."""
    asked = window.codes[:, window.fill_from :]
    return int((asked[0] != asked[-1]).sum())


# Short work goes first, then what a sentence begins with, then the rest. Chunks and their look-ahead grow, so short ones belong to a
# listener who has little in hand (in the cuda profile: the first three of a sentence, and its end; of up to 30 frames the first two, and
# perhaps its end), the shortest windows, and chunks with nothing before them, to one who has no audio yet. Semantic calls are made 60
# tokens (1.2 s of speech) ahead; whoever asks for more at once does not stream. Two windows are a beginning: the first chunk, which takes
# one, plays for .4 s, and by then the second must be there.
POLICIES: dict[str, Policy[Any]] = {
    "codec": Policy(
        lambda chunk: chunk.codes.shape[1] <= 30 and not chunk.state.any(),
        lambda chunk: chunk.codes.shape[1] <= 60,
        hurried=0,
        urgency=1,
        first=LAST,
        is_second=lambda chunk: chunk.codes.shape[1] <= 30,
        is_due=lambda chunk: chunk.lead_s < DUE_S,
        company=4,
        patience_s=0.03,
        is_followed=False,
        is_long=lambda chunk: chunk.codes.shape[1] > CHUNK,
    ),
    "fine": Policy(
        lambda window: window.n_frames <= WINDOW and n_asked(window) <= 30,
        lambda window: window.n_frames <= WINDOW and n_asked(window) <= 96,
        hurried=1,
        urgency=1,
        size=n_asked,
        first_batch=4,
        busy_first_batch=4,
        company=4,
        patience_s=0.04,
        is_long=lambda window: window.n_frames > WINDOW,
    ),
    "semantic": Policy(
        lambda row: row.position == 0 and row.n_tokens <= LISTENED_TO,
        lambda row: row.position <= 60 and row.n_tokens <= LISTENED_TO,
        hurried=2,
        urgency=3,
        first_batch=8,
        busy_first_batch=8,
        is_first_for_hurried=True,
        company=16,
        patience_s=0.15,
        old_s=0.2,
        is_beginning=lambda row: row.position <= 60,
        is_long=lambda row: row.n_tokens > LISTENED_TO,
    ),
    "coarse": Policy(
        lambda row: row.position == 0 and row.chain is None,
        lambda row: row.position <= 60,
        hurried=2,
        urgency=4,
        busy_first_batch=16,
        first_batch_share=0.5,
        is_second_first=True,
        company=16,
        patience_s=0.3,
        is_soon=lambda row: row.position <= SOON or row.chain is not None,
        is_beginning=lambda row: row.position <= 120,
        is_long=lambda row: row.n_tokens > SOON,
    ),
}


@dataclass(frozen=True)
class Work:
    """What a stage has done, and holds."""

    n_batches: int = 0
    n_rows: int = 0  # of those batches
    busy_s: float = 0.0  # the GPU's time, as far as the host can tell, and what it takes to prepare them
    n_slots: int = 0  # KV slots that streams hold

    def __add__(self, other: Work) -> Work:
        return Work(
            self.n_batches + other.n_batches,
            self.n_rows + other.n_rows,
            self.busy_s + other.busy_s,
            self.n_slots + other.n_slots,
        )

    def __sub__(self, other: Work) -> Work:
        return self + Work(-other.n_batches, -other.n_rows, -other.busy_s, -other.n_slots)


class _Pending(Generic[Call, Result]):
    """A call that waits, or is under way."""

    def __init__(self, call: Call, rank: int, size: int = 0):
        self.call, self.rank, self.size = call, rank, size
        self.came_s = self.since_s = time.monotonic()  # the latter: since when it waits, for its next piece
        self.is_left = False  # its listener has gone
        self.drawn: list[Ints] = []  # a row's tokens so far, piece by piece
        self.answer: Future[Result] = Future()

    @property
    def is_hurried(self) -> bool:
        return self.rank < REST


class Worker(Generic[Call, Result]):
    """Runs the calls that wait, up to max_batch together: those of the lowest rank, of equally hurried ones the shortest, then the oldest.
    With somebody's first few of the others go. Callers' threads share it."""

    def __init__(
        self,
        start: Start[Call, Result],
        max_batch: int,
        turns: Turns,
        policy: Policy[Call],
        n_streams: Callable[[], int] = lambda: 0,
    ):
        """start: used by one thread at a time, in its turn. n_streams: that are known, of a stage whose calls do not say whose they are."""
        self._start, self._max_batch, self._turns, self._policy = start, max_batch, turns, policy
        self._n_streams = n_streams
        self._changed = threading.Condition()
        self._waiting: list[_Pending[Call, Result]] = []
        self._errands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._is_closed = False
        self._turn: Turn | None = None  # under way
        self._took_s: dict[int, float] = {}  # by the number of calls: the latest such batch
        self._owed: list[tuple[Future[Result], Result]] = []  # answers that nobody is in a hurry for
        self.work_done = Work()
        self.trace: Callable[[Sequence[_Pending[Call, Result]], Turn], None] | None = None  # is told of each batch

    def submit(self, calls: Sequence[Call]) -> list[Future[Result]]:
        """Results to come, in order."""
        n_streams = self._n_streams()
        return self._submit(calls, [self._policy.rank(call, n_streams) for call in calls])

    def _submit(self, calls: Sequence[Call], ranks: Sequence[int]) -> list[Future[Result]]:
        size = self._policy.size
        pending = [
            _Pending[Call, Result](call, rank, size(call) if rank < REST else 0)
            for call, rank in zip(calls, ranks, strict=True)
        ]
        with self._changed:
            self._waiting += pending
            self._changed.notify()
            turn = self._turn
        rank = min((each.rank for each in pending), default=REST)
        if rank < REST:
            self._turns.hurry(rank, turn)
        if rank <= FIRST and turn:
            turn.halt()  # so that it goes along
        return [each.answer for each in pending]

    def between(self, errand: Callable[[], Any]) -> Future[Any]:
        """Its result, once the worker has run it between two batches."""
        answer: Future[Any] = Future()
        with self._changed:
            self._errands.append((errand, answer))
            self._changed.notify()
        return answer

    def close(self) -> None:
        """Let `work` return. Nobody may be waiting for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def work(self) -> None:
        """Until closed. The thread that opened the engine."""
        while self._wait():
            with self._turns.turn(self._now_urgent, self._lowest_rank, self._pay, self._most_urgent_since) as turn:
                self._turn = turn  # whoever comes from now on and is not in the batch waits for it
                batch = self._next_batch()  # now, not before: whoever came while others had their turn is taken along
                if not batch:  # who waited has left
                    continue
                results = self._try(batch, turn)
                self._turn = None
            self._took_s[len(batch)] = turn.busy_s
            self.work_done += Work(1, len(batch), turn.busy_s)
            if self.trace:
                self.trace(batch, turn)
            self._settle(batch, results)

    def _try(self, batch: Sequence[_Pending[Call, Result]], turn: Turn) -> Sequence[Result] | Exception:
        try:
            finish = self._start_batch(batch, turn)
            turn.launched(self._launch(batch))
            if self._is_to_end(batch):
                turn.halt()
            self._pay()
            return finish()
        except Exception as error:
            return error

    def _start_batch(self, batch: Sequence[_Pending[Call, Result]], turn: Turn) -> Finish[Result]:
        return self._start([each.call for each in batch])

    def _launch(self, batch: Sequence[_Pending[Call, Result]]) -> Launch:
        """What is known of the batch that was just started. If it takes less than this says, the GPU idles behind it."""
        rank = min(each.rank for each in batch)
        return Launch(self._took_s.get(len(batch), 0.0), self._policy.is_followed and rank < REST, rank=rank)

    def _is_to_end(self, batch: Sequence[_Pending[Call, Result]]) -> bool:
        """Whether a batch that was just launched is to be halted: somebody who waits for first audio came while it was being prepared, and
        has room in it."""
        with self._changed:
            return len(batch) < self._max_batch and any(each.rank <= FIRST for each in self._waiting)

    def _now_urgent(self) -> int:
        policy = self._policy
        with self._changed:
            if not self._waiting:
                return LONE
            rank = self._lowest_waiting()
            if rank < REST:
                return AT_ONCE if rank <= FIRST else policy.hurried
            now_s = time.monotonic()
            longest_s = now_s - min(each.since_s for each in self._waiting)
            has_company = len(self._waiting) >= self._company() or longest_s >= policy.patience_s
            if has_company or any(policy.is_soon(each.call) for each in self._waiting):
                return policy.urgency
            is_long = any(policy.is_long(each.call) for each in self._waiting)
        return max(policy.urgency, UNHURRIED) if is_long else LONE

    def _hurry_old(self) -> None:
        """Where newcomers come one after the other, calls that are in no hurry would wait for as long as they do."""
        old_s, now_s = self._policy.old_s, time.monotonic()
        if old_s == math.inf:
            return
        for each in self._waiting:
            if each.rank == REST and now_s - each.since_s >= old_s and not self._policy.is_long(each.call):
                each.rank = HURRIED

    def _lowest_rank(self) -> int:
        """Of those who wait."""
        with self._changed:
            return self._lowest_waiting()

    def _most_urgent_since(self) -> float:
        """When the first of those came who are of the lowest rank."""
        with self._changed:
            return min([(each.rank, each.came_s) for each in self._waiting], default=(REST, math.inf))[1]

    def _lowest_waiting(self) -> int:
        rank = min([each.rank for each in self._waiting], default=REST)
        if rank < REST or self._policy.old_s == math.inf:
            return rank  # no call that is old now would make it lower
        self._hurry_old()
        return min([each.rank for each in self._waiting], default=REST)

    def _company(self) -> int:
        """Calls that need wait for no more."""
        return self._policy.company

    def _wait(self) -> bool:
        """Return when there is something to run; false: the worker was closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._owed or self._waiting or self._errands or self._is_closed)
                errands, self._errands = self._errands, []
                some, is_closed = bool(self._waiting), self._is_closed
            if not some or is_closed:
                self._pay()
            for errand, answer in errands:
                try:
                    answer.set_result(errand())
                except Exception as error:
                    answer.set_exception(error)
            if some or is_closed:
                return not is_closed

    def _next_batch(self) -> list[_Pending[Call, Result]]:
        with self._changed:
            waiting = sorted(self._waiting, key=lambda each: (each.rank, each.size))
            n = self._max_batch
            if n_first := sum(each.rank <= FIRST for each in waiting):
                n = min(n, max(n_first, self._policy.most_with_first(self._n_streams())))
            batch, self._waiting = waiting[:n], waiting[n:]
        return batch

    def _settle(self, batch: list[_Pending[Call, Result]], results: Sequence[Result] | Exception) -> None:
        if isinstance(results, Exception):
            for each in batch:
                each.answer.set_exception(results)
        else:
            self._answer(list(zip(batch, results, strict=True)))

    def _answer(self, said: Sequence[tuple[_Pending[Call, Result], Result]]) -> None:
        """At once those who are in a hurry. The others when the next batch is launched, if that is the very next thing: whoever is told has
        something to do, and the GPU would wait for Python meanwhile."""
        for each, result in said:
            if each.is_hurried:
                each.answer.set_result(result)
            else:
                self._owed.append((each.answer, result))

    def _pay(self) -> None:
        owed, self._owed = self._owed, []
        for answer, result in owed:
            answer.set_result(result)


class CausalWorker(Worker[Row, Generation]):
    """A GPT's worker: rows wait again after each piece, until they are whole; a chain's with the next window's prefix."""

    def __init__(
        self,
        start: Start[Row, Generation],
        release: Callable[..., None],
        max_batch: int,
        turns: Turns,
        policy: Policy[Row],
        step_s: Callable[[int], float],
        prefill_s: Callable[[int], float] = lambda n_rows: 0.0,
        start_alone: StartAlone | None = None,
        rate_hz: float = math.inf,
        halt: Callable[[], None] | None = None,
        has_begun: Callable[[int], bool] = lambda stream: True,
    ):
        """start, release, start_alone, halt: the engine's, which may not have the last two. step_s, prefill_s: what a decode step, or
        prefills, of so many rows take. rate_hz: tokens a second of speech. has_begun: whether the stage behind has heard of a stream."""
        super().__init__(start, max_batch, turns, policy)
        self._release, self._start_alone, self._halt = release, start_alone, halt
        self._step_s, self._prefill_s = functools.cache(step_s), functools.cache(prefill_s)
        self._rate_hz, self._has_begun = rate_hz, has_begun
        # When a stream's latest sentence did, or so much later as its listener had in hand then.
        self._began_s: dict[int, float] = {}
        self._later: set[int] = set()  # streams whose latest sentence is not their first
        # A stream's ids when its latest piece was over: a call that goes on from there needs no prefill.
        self._held: dict[int, int] = {}
        self._n_piece = 0  # tokens of the piece under way
        self._under_way: list[_Pending[Row, Generation]] = []
        self._n_nameless = 0

    def submit(self, calls: Sequence[Row]) -> list[Future[Generation]]:
        """As Worker.submit. A stream's later sentence is hurried, not its first, and not even that if its listener has enough of the
        sentences before in hand. One whose listener has something in hand is a later one, if this is the stream's first or not."""
        rows = [self._named(row) for row in calls]
        now_s = time.monotonic()
        with self._changed:
            ranks = []
            for row in rows:
                is_known = row.stream in self._began_s
                is_later = row.position == 0 and (is_known or row.lead_s > 0)
                if is_later:
                    self._later.add(row.stream)
                    self._began_s[row.stream] = now_s + row.lead_s
                ranks.append(self._rank(row))
                if not (is_known or is_later):  # this process may be younger than the sentence
                    self._began_s[row.stream] = now_s - self._due_s(row)
        return self._submit(rows, ranks)

    def _rank(self, row: Row) -> int:
        rank = self._policy.rank(row)
        if row.n_tokens <= LISTENED_TO and not self._has_begun(row.stream):
            rank = min(rank, HURRIED)  # without a preset the first window waits for four calls
        if row.stream not in self._began_s:
            return rank
        if row.stream in self._later:
            return REST if self._slack_s(row, time.monotonic()) > AT_LEISURE_S else max(rank, HURRIED)
        is_crowded = self._policy.is_second_first and len(self._began_s) >= CROWDED
        if rank == HURRIED and is_crowded and row.position:
            return FIRST
        return max(rank, HURRIED)

    def knows(self, stream: int) -> bool:
        """Whether calls of the stream have come, and it is not over."""
        return stream in self._began_s

    def n_known(self) -> int:
        """Streams."""
        return len(self._began_s)

    def drop(self, *streams: int) -> None:
        """Their listeners have left: rows that wait are answered at once with what there is of them. A piece under way with one of them is
        halted; the others go on without it."""
        with self._changed:
            left = [each for each in self._waiting if each.call.stream in streams]
            self._waiting = [each for each in self._waiting if each not in left]
            for each in self._under_way:
                each.is_left = each.is_left or each.call.stream in streams
            turn = self._turn if self._is_any_left(self._under_way) else None
            answers = [(each, self._said(each, False)) for each in left]
            self._forget(streams)
        if turn:
            turn.halt()
        for each, generation in answers:
            each.answer.set_result(generation)

    @staticmethod
    def _is_any_left(batch: Sequence[_Pending[Row, Generation]]) -> bool:
        return any(each.is_left for each in batch)

    def _is_to_end(self, batch: Sequence[_Pending[Row, Generation]]) -> bool:
        return super()._is_to_end(batch) or self._is_any_left(batch)

    def _company(self) -> int:
        """No more than three quarters of the streams that are known: the others may be anywhere."""
        return min(self._policy.company, max(1, len(self._held) * 3 // 4))

    def _said(self, pending: _Pending[Row, Generation], ended: bool) -> Generation:
        return Generation.joined(pending.drawn, ended)

    def _forget(self, streams: Iterable[int]) -> None:
        for stream in streams:
            self._held.pop(stream, None)
            self._began_s.pop(stream, None)
            self._later.discard(stream)

    def _next_batch(self) -> list[_Pending[Row, Generation]]:
        with self._changed:
            self._hurry_old()
            self._under_way = self._together(self._waiting)
            chosen = set(self._under_way)
            self._waiting = [each for each in self._waiting if each not in chosen]
        return self._under_way

    def _together(self, waiting: Sequence[_Pending[Row, Generation]]) -> list[_Pending[Row, Generation]]:
        """By rank, then those who will soonest be short of speech. With somebody's first, or somebody hurried, few of the others. If
        anybody may be short, no more than take TIGHT_BATCH_S for half a window: who begins one takes more than who goes on."""
        now_s = time.monotonic()
        slack_s = {each: self._slack_s(each.call, now_s) for each in waiting}
        is_tight = min(slack_s.values(), default=TIGHT_S) < TIGHT_S
        batch: list[_Pending[Row, Generation]] = []
        n_new = 0
        for each in sorted(waiting, key=lambda each: (each.rank, slack_s[each])):
            n_more = n_new + self._is_new(each.call)
            step_s, prefills_s = self._step_s(len(batch) + 1), self._prefills_s(n_more)
            if batch and batch[0].rank <= FIRST and self._begins_at_leisure(each, slack_s[each]):
                continue
            if batch and not self._goes_along(each, slack_s[each], batch, PIECES[0] * step_s + prefills_s):
                break
            takes_s = PIECES[1] * step_s + prefills_s
            fits = not is_tight or len(batch) < FEW or each.is_hurried or takes_s <= TIGHT_BATCH_S
            if fits and len(batch) < self._max_batch:
                batch.append(each)
                n_new = n_more
        return batch

    def _begins_at_leisure(self, each: _Pending[Row, Generation], slack_s: float) -> bool:
        """A sentence, for a listener who has enough of those before: it would hold up whoever has no audio yet."""
        is_later = each.call.stream in self._later
        return is_later and each.rank == REST and self._policy.is_beginning(each.call) and slack_s > AT_LEISURE_S

    def _goes_along(
        self,
        each: _Pending[Row, Generation],
        slack_s: float,
        batch: Sequence[_Pending[Row, Generation]],
        window_s: float,
    ) -> bool:
        """Whether there is room for somebody who may be in less of a hurry than those of a batch, a window of which would take so long."""
        if batch[0].rank <= FIRST < each.rank:
            stays_behind = slack_s > COMFORTABLE_S or self._policy.is_first_for_hurried
            if each.rank == REST and stays_behind and len(self._began_s) < BUSY:
                return False
            return len(batch) < self._policy.most_with_first(len(self._began_s))
        if batch[0].is_hurried and not each.is_hurried:
            return len(batch) < FEW or window_s <= HURRIED_BATCH_S
        return True

    def _slack_s(self, row: Row, now_s: float) -> float:
        """Seconds of its sentence that are made, less those for which it has been in the making: near what its listener has in hand."""
        return self._due_s(row) - (now_s - self._began_s.get(row.stream, now_s))

    def _due_s(self, row: Row) -> float:
        """Seconds of its sentence before what waits for its tokens: if nobody said what, before the tokens."""
        return row.position / self._rate_hz if row.due_s is None else row.due_s

    def _named(self, row: Row) -> Row:
        """A row without a stream needs its cache from piece to piece too: under a name below 0, until it is whole."""
        if row.stream:
            return row
        with self._changed:
            self._n_nameless += 1
            return replace(row, stream=-self._n_nameless)

    def _start_batch(self, batch: Sequence[_Pending[Row, Generation]], turn: Turn) -> Finish[Generation]:
        self._n_piece = self._piece_tokens(
            [each.call.n_whole for each in batch], [each.call.n_whole for each in batch if each.is_hurried]
        )
        if any(self._is_new(each.call) for each in batch):
            turn.launching(min(each.rank for each in batch))  # prefills go first, long before start returns
        if self._start_alone and len(batch) == 1 and self._policy.is_long(batch[0].call):
            return self._start_long(self._start_alone, batch[0], turn)
        return self._start([each.call.piece(self._n_piece) for each in batch])

    def _start_long(
        self, start_alone: StartAlone, pending: _Pending[Row, Generation], turn: Turn
    ) -> Finish[Generation]:
        """Piece after piece for as long as nobody else wants the GPU, or this worker: so the GPU never waits for us."""
        prefill_s = self._prefill_s(1) if pending.call.chain else 0.0  # of the next window
        piece_s = self._n_piece * self._step_s(1) + prefill_s

        def goes_on() -> bool:
            with self._changed:
                is_wanted = pending.is_left or self._waiting or self._errands or self._is_closed
            return not is_wanted and turn.extended(piece_s)

        return start_alone(pending.call, self._n_piece, goes_on)

    def _launch(self, batch: Sequence[_Pending[Row, Generation]]) -> Launch:
        prefills_s = self._prefills_s(sum(self._is_new(each.call) for each in batch))
        takes_s = prefills_s + self._n_piece * self._step_s(len(batch))
        return replace(super()._launch(batch), takes_s=takes_s, halt=self._halt, least_s=prefills_s)

    def _is_new(self, row: Row) -> bool:
        """Whether it needs a prefill."""
        return self._held.get(row.stream) != len(row.ids)

    def _prefills_s(self, n_rows: int) -> float:
        return self._prefill_s(n_rows) if n_rows else 0.0

    def _piece_tokens(self, n_wanted: list[int], n_hurried: list[int]) -> int:
        """The most of PIECES that takes no longer than PIECE_S.

        All that a hurried row wants, up to HURRIED_PIECE_S: between two pieces of it others would have their turn.
        """
        step_s = self._step_s(len(n_wanted))
        n = next((n for n in PIECES if n * step_s <= PIECE_S), PIECES[-1])
        return max(min(n, max(n_wanted)), min(max(n_hurried, default=0), int(HURRIED_PIECE_S / step_s)))

    def _go_on(self, pending: _Pending[Row, Generation], said: Generation) -> None:
        """What is left of a call after a piece of it. A new window is as urgent as a call for it."""
        row = pending.call
        ids = row.ids_with(said.tokens) if said.ids is None else said.ids
        pending.call = rest = row.after(said.tokens, ids)
        if rest.chain is not row.chain:
            pending.rank = self._policy.rank(rest)
        if not pending.is_left:
            self._held[row.stream] = len(ids) if rest.ids is ids else 0  # else its window slid

    def _settle(self, batch: list[_Pending[Row, Generation]], results: Sequence[Generation] | Exception) -> None:
        if isinstance(results, Exception):
            with self._changed:
                self._under_way = []
                for each in batch:
                    self._held.pop(each.call.stream, None)
                self._forget(each.call.stream for each in batch if each.call.stream < 0)
            return super()._settle(batch, results)
        unfinished, whole = [], []
        now = time.monotonic()
        with self._changed:
            self._under_way = []
            for each, generation in zip(batch, results, strict=True):
                each.since_s = now
                each.drawn.append(generation.tokens)
                self._go_on(each, generation)
                if each.call.n_tokens and not generation.ended and not each.is_left:
                    unfinished.append(each)
                else:
                    whole.append((each, self._said(each, generation.ended)))
            self._waiting = unfinished + self._waiting
        if nameless := [each.call.stream for each, _ in whole if each.call.stream < 0]:
            with self._changed:
                self._forget(nameless)
            self._release(*nameless)
        return self._answer(whole)


class FineWorker(Worker[Window | Windows, Ints]):
    """The fine stage's: a call of several windows waits again after each, until all are filled."""

    def _start_batch(self, batch: Sequence[_Pending[Window | Windows, Ints]], turn: Turn) -> Finish[Ints]:
        return self._start([each.call.first if isinstance(each.call, Windows) else each.call for each in batch])

    def _settle(self, batch: list[_Pending[Window | Windows, Ints]], results: Sequence[Ints] | Exception) -> None:
        if isinstance(results, Exception):
            return super()._settle(batch, results)
        unfinished, whole = [], []
        for each, filled in zip(batch, results, strict=True):
            if isinstance(each.call, Windows):
                each.call = each.call.after(filled)
                if len(each.call.spans):
                    each.since_s = time.monotonic()
                    unfinished.append(each)
                    continue
                filled = each.call.codes
            whole.append((each, filled))
        with self._changed:
            self._waiting = unfinished + self._waiting
        return self._answer(whole)


@dataclass(frozen=True)
class Costs:
    """Seconds that rows of one length take: measured for some numbers of rows, between which they grow in proportion."""

    steps_s: dict[int, float]
    prefills_s: dict[int, float]

    def step_s(self, n_rows: int) -> float:
        return float(np.interp(n_rows, list(self.steps_s), list(self.steps_s.values())))

    def prefill_s(self, n_rows: int) -> float:
        return float(np.interp(n_rows, list(self.prefills_s), list(self.prefills_s.values())))


def measure(
    generate: Callable[[list[Row]], list[Generation]],
    release: Callable[..., None],
    prefix: Ints,
    row_counts: Sequence[int],
    n_tries: int = N_TRIES,
) -> Costs:
    """Costs of rows behind prefixes [S, C]; a step's is by what more steps take longer. The least of some tries, for while a server
    starts its CPUs have much to do.

    row_counts: that there are kernels for. With one row more the next kernel begins, whose time each further row adds to.
    """
    costs = Costs({}, {})
    sampling = Sampling(temperature=0, min_eos_p=1.0)

    def took_s(ids: Ints, streams: range, n_tokens: int) -> float:
        began = time.perf_counter()
        generate([Row(ids, n_tokens, 0, sampling, stream) for stream in streams])
        return time.perf_counter() - began

    for n_rows in sorted({*row_counts, *(n + 1 for n in row_counts if n < max(row_counts))}):
        streams, tries = range(-n_rows, 0), []
        for i in range(n_tries):
            # Other ids than last time: a slot that is free still holds what it held.
            ids = prefix + (len(costs.steps_s) + i) % 2
            tries.append([took_s(ids, streams, n) for n in (1, *STEPS_TIMED)])  # the first prefills
            release(*streams)
        first_s, few_s, many_s = map(min, zip(*tries, strict=True))
        step_s = max(many_s - few_s, 1e-5) / (STEPS_TIMED[1] - STEPS_TIMED[0])
        costs.steps_s[n_rows], costs.prefills_s[n_rows] = step_s, max(first_s - step_s, 0.0)
    return costs
