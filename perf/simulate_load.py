"""Listeners on a GPU in virtual time: what a change in scheduling does, in seconds and without tritonserver.

    python perf/simulate_load.py --clients 32 --duration 30
    python perf/simulate_load.py --costs h100 --rate 4 --duration 40 --set pace_lead_s=inf tight_batch_s=.06
    python perf/simulate_load.py --costs h100-kv8 --arrivals load-01-open-6.8rps-seed1.csv --set slower=1.12 max_streams=64

Streams, Triton's instances, the shared process with its turns and batches, and playback, as docs/architecture.md describes them, on a
clock that jumps from event to event. Kernels, and the way through Triton, take what they were measured to take. It knows less than
perf/pretended_gpu.py, which runs the real server, and takes a hundredth of the time; how far it can be believed is in docs/load-results.md.
Clips of 10 s with a preset, of one sentence unless told (`--set sentences=280,220`, in semantic tokens). Last line JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import math
import random
import selectors
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from gpu_costs import COSTS, KEYS, Costs, prefix_share  # noqa: E402
from load_report import percentiles  # noqa: E402

from barkstream.admission import Backlog  # noqa: E402
from barkstream.engines.turns import AT_ONCE, FOLLOW_S, GRACE_S, HEAD_START_S, LONE  # noqa: E402
from barkstream.engines.turns import HURRIED as MOST_HURRIED  # noqa: E402
from barkstream.engines.workers import (  # noqa: E402
    AT_LEISURE_S,
    BUSY,
    COMFORTABLE_S,
    CROWDED,
    DUE_S,
    FEW,
    FIRST,
    HURRIED,
    HURRIED_BATCH_S,
    HURRIED_PIECE_S,
    LAST,
    PIECE_S,
    PIECES,
    POLICIES,
    REST,
    SOON,
    TIGHT_BATCH_S,
    TIGHT_S,
)
from barkstream.options import LATER_AFTER_S, Schedule  # noqa: E402
from barkstream.pacing import NEEDY_S, Hold  # noqa: E402

SEMANTIC_HZ, FRAME_HZ = 50, 75  # tokens, and frames, a second of speech
N_SEMANTIC = 500  # a clip's, of one sentence
PAUSE_S = 0.25  # between two sentences
RETRY_S = 1.0  # after which a client who was refused asks again
WINDOW = 60  # coarse tokens that a call has at least
SEMANTIC_KEYS = 500  # behind which semantic steps were measured
HEAD, SPAN = 257, 690  # positions of a coarse window's semantic tokens, and of its history and its own tokens together
STAGES = "codec", "fine", "semantic", "coarse"


@dataclass(frozen=True)
class Policy:
    """What is tried out. Seconds."""

    pace_lead_s: float = 1.0
    needy_s: float = NEEDY_S
    tight_s: float = TIGHT_S
    tight_batch_s: float = TIGHT_BATCH_S
    hurried_batch_s: float = HURRIED_BATCH_S
    piece_s: float = PIECE_S
    company: int = POLICIES["coarse"].company  # of the causal stages
    semantic_patience_s: float = POLICIES["semantic"].patience_s
    coarse_patience_s: float = POLICIES["coarse"].patience_s
    semantic_old_s: float = POLICIES["semantic"].old_s
    # Work that runs is halted for listeners without audio: 1 when they call, 2 when what they call for is launched, 0 never.
    halts: int = 2
    halt_lead_s: float = 0.0005  # so long before it is launched, as prefills make it
    halted_s: float = 0.0003  # until it stands
    comfortable_s: float = COMFORTABLE_S
    at_leisure_s: float = AT_LEISURE_S  # later sentences of those who have more in hand
    first_batch: int = POLICIES["coarse"].first_batch
    busy: int = BUSY  # streams live
    busy_first_batch: int = POLICIES["coarse"].busy_first_batch
    first_batch_share: float = POLICIES["coarse"].first_batch_share
    crowded: int = CROWDED  # streams live; with as many second windows rank as first ones
    semantic_first_batch: int = POLICIES["semantic"].first_batch
    fine_first_batch: int = POLICIES["fine"].first_batch
    max_streams: int = 1000
    max_backlog_s: float = math.inf  # of `Backlog`
    slower: float = 1.0  # kernels take so many times as long
    crowd: int = 24  # of `Hold`
    hold_until_s: float = 0.235
    semantic_instances: int = 32
    coarse_instances: int = 32
    fine_instances: int = 24
    codec_instances: int = 16
    # Through Triton, one way; and of it, what calls and answers of all streams take one after the other, in `bark`. Both found by
    # trying, so that the whole says what H100s said (docs/load-results.md): the latter is .0004 with one process of `bark` in place
    # of four.
    way_s: float = 0.002
    hop_s: float = 0.0001
    # Python's share of a batch, by trying, so that the whole says what an H200 with an H100's steps did (docs/load-results.md).
    prepare_s: float = 0.0006  # until it is on its way
    settle_s: float = 0.0002  # one that is over: until its calls are answered, or wait for the rest
    row_s: float = 0.00004  # more for each row, of both
    gap_s: float = 0.0002  # between two that were launched one behind the other
    chunks: tuple[int, ...] = field(default=(29, 28, 60, 60, 60, 90))  # frames
    lookahead: tuple[int, ...] = field(default=(1, 3, 3, 33, 63, 33))
    coarse_windows: tuple[int, ...] = field(default=(1, 1, 2, 3, 3, 2, 3))  # WINDOW tokens of a call, at most
    sliding_window_len: tuple[int, ...] = field(default=(WINDOW,))  # coarse tokens behind one prefix
    sentences: tuple[int, ...] = field(default=(N_SEMANTIC,))  # semantic tokens of a clip's
    later_chunks: tuple[int, ...] = field(default=(117, 90))  # of a sentence that has later_after_s of audio before it
    later_lookahead: tuple[int, ...] = field(default=(3, 33))
    later_sliding_window_len: tuple[int, ...] = ()  # none: the same
    later_after_s: float = LATER_AFTER_S
    tells_lead: int = 1  # 0: stages do not know what listeners have in hand when such a sentence begins
    tells_due: int = 1  # 0: nor, of semantic calls, which window waits for them
    shortest_first: int = 1  # 0: of equally hurried fine calls the oldest go first
    codec_due_s: float = DUE_S  # -inf: the codec is not told what listeners have in hand
    halts_for_second: int = 1  # 0: the codec's call for a second chunk ends nobody's first batch, in a crowd either

    def most_with_first(self, stage: str, n_known: int) -> int:
        """Rows of a batch with a first call, while the stage knows so many streams."""
        if stage == "semantic":
            return self.semantic_first_batch
        return (
            max(self.busy_first_batch, int(n_known * self.first_batch_share))
            if n_known >= self.busy
            else self.first_batch
        )

    def instances(self, stage: str) -> int:
        return getattr(self, f"{stage}_instances")

    def old_s(self, stage: str) -> float:
        return self.semantic_old_s if stage == "semantic" else POLICIES[stage].old_s

    def patience_s(self, stage: str) -> float:
        return getattr(self, f"{stage}_patience_s", POLICIES[stage].patience_s)

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(
            chunk_frames=self.chunks,
            fine_lookahead=self.lookahead,
            coarse_windows=self.coarse_windows,
            later_chunk_frames=self.later_chunks,
            later_fine_lookahead=self.later_lookahead,
        )

    @property
    def clip_s(self) -> float:
        return sum(self.sentences) / SEMANTIC_HZ + (len(self.sentences) - 1) * PAUSE_S

    @cached_property
    def windows(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """First coarse token and length of each window of a first sentence, and of one cut as a later one, as far as the longest one has
        them."""
        lengths = self.sliding_window_len
        return self._windows(lengths), self._windows(self.later_sliding_window_len or lengths)

    def _windows(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        found, start = list[tuple[int, int]](), 0
        while start < 3 * max(self.sentences):
            found.append((start, lengths[min(len(found), len(lengths) - 1)]))
            start += found[-1][1]
        return found

    def begins_window(self, position: int, is_cut_later: bool = False) -> bool:
        return any(start == position for start, _ in self.windows[is_cut_later])

    def window_end(self, position: int, is_cut_later: bool = False) -> int:
        """Of the coarse window in which a token lies."""
        return next(start + n for start, n in self.windows[is_cut_later] if position < start + n)

    def reads(self, position: int, is_cut_later: bool = False) -> int:
        """Semantic tokens that the coarse window there waits for, where the sentence has so many."""
        start, length = [window for window in self.windows[is_cut_later] if window[0] <= position][-1]
        return start // 3 + HEAD - 2 - int((SPAN - length) / 3.006)

    def due_s(self, n_semantic: int, is_cut_later: bool = False) -> float:
        """Audio before the first window that waits for more than n semantic tokens."""
        start = next(start for start, _ in self.windows[is_cut_later] if self.reads(start, is_cut_later) > n_semantic)
        return start / (2 * FRAME_HZ)

    @cached_property
    def _said_behind(self) -> list[tuple[int, int]]:
        """Length of each window of a clip, and the coarse tokens that are drawn behind it."""
        return [
            (n, min(n, 3 * said - start))
            for said, before_s in self.with_before_s()
            for start, n in self.windows[before_s >= self.later_after_s]
            if start < 3 * said
        ]

    def with_before_s(self) -> Iterator[tuple[int, float]]:
        """Each sentence's semantic tokens, and the audio before it, s."""
        before_s = 0.0
        for said in self.sentences:
            yield said, before_s
            before_s += said / SEMANTIC_HZ + PAUSE_S

    def spared_keys(self) -> float:
        """Of the positions that a coarse step reads in the reference's windows, the part that these do not."""
        positions = [HEAD + SPAN - n / 2 for n, _ in self._said_behind]
        read = float(np.average(positions, weights=[n for _, n in self._said_behind]))
        return 1 - read / KEYS

    def prefix(self) -> float:
        """Positions of a coarse prefill, to the reference's."""
        return float(np.mean([prefix_share(HEAD - 1 + SPAN - n) for n, _ in self._said_behind]))


MAX_BATCH = {"codec": 8, "fine": 8, "semantic": 32, "coarse": 32}


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nobody waits: the clock jumps to the next event."""

    def __init__(self) -> None:
        self.now_s, loop = 0.0, self

        class Jumps(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list[Any]:
                assert timeout is not None, "everybody waits for something that never comes"
                loop.now_s += max(0.0, timeout)
                return []

        super().__init__(Jumps())
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.now_s


@dataclass(eq=False)
class Call:
    """Of a stage, until it is answered."""

    stage: str
    stream: Stream
    n_tokens: int = 0
    position: int = 0
    rank: int = REST
    is_new: bool = False  # needs a prefill
    is_later: bool = False  # of a sentence that is not the first
    is_cut_later: bool = False  # and has enough before it to be cut as such
    n_behind: int = 0  # coarse tokens that the call brings behind these
    size: int = 0  # of a hurried fine call: frames that it asks for
    since_s: float = 0.0
    came_s: float = 0.0  # the same of its first piece
    answer: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def slack_s(self) -> float:
        due_s = self.position / (2 * FRAME_HZ)
        if self.stage == "semantic":
            due_s = self.stream.due_s(self.position, self.is_cut_later)
        return due_s - (asyncio.get_running_loop().time() - self.stream.began_s[self.stage])


@dataclass(eq=False)
class Run:
    """A batch on the GPU. Seconds."""

    stage: str
    batch: list[Call]
    begins_s: float
    first_s: float  # what comes before its steps, or all of it
    step_s: float
    n_steps: int
    is_halted_at_once: bool = False  # somebody came while it was being prepared
    end: asyncio.TimerHandle | None = None

    @property
    def rank(self) -> int:
        return min(call.rank for call in self.batch)

    @property
    def ends_s(self) -> float:
        """Where it can be halted: when that may be."""
        return self.begins_s + self.first_s if self.n_steps else self.over_s

    @property
    def over_s(self) -> float:
        return self.begins_s + self.first_s + self.n_steps * self.step_s


class Gpu:
    """Takes turns, and puts batches together, as engines/turns.py and engines/workers.py do."""

    def __init__(self, policy: Policy, costs: Costs):
        self._policy, self._costs, self._loop = policy, costs, asyncio.get_running_loop()
        self._spared_ms, self._prefix = costs.row_keys * policy.spared_keys(), policy.prefix()
        self._waiting: dict[str, list[Call]] = {stage: [] for stage in STAGES}
        self._changed = asyncio.Event()
        self._kept_until_s = self._over_s = 0.0  # the latter: when the GPU's last work was over
        self._running: list[Run] = []
        self._preparing: Run | None = None
        self._settling: set[str] = set()
        self.idle_s = 0.0  # while the calls that came next were there already
        self.known: dict[str, set[Stream]] = {"semantic": set(), "coarse": set()}
        self.batches = {stage: [0, 0, 0.0] for stage in STAGES}  # how many, their rows, ms
        self._task = self._loop.create_task(self._work())

    def forget(self, stream: Stream) -> None:
        """Its last coarse call was answered: its slots are free."""
        for known in self.known.values():
            known.discard(stream)

    def submit(self, call: Call) -> None:
        call.since_s = self._loop.time()
        call.came_s = call.came_s or call.since_s
        self._waiting[call.stage].append(call)
        if self._policy.halts and call.rank < REST:
            self._hurry(call)
        self._changed.set()

    def _hurry(self, call: Call) -> None:
        """What is of the call's own stage has to be over before the call has its turn; other work is waited for no longer than it takes to
        prepare what comes behind it."""
        at_once = self._policy.halts == 1
        if (run := self._preparing) and self._is_to_end(run, call) and (at_once or run.stage == call.stage):
            run.is_halted_at_once = True
        for run in self._running:
            if self._is_to_end(run, call) and (at_once or run.stage == call.stage):
                self._halt(run)
        self._make_room()

    def _is_to_end(self, run: Run, call: Call) -> bool:
        goes_along = call.rank <= FIRST and run.stage == call.stage
        return call.rank < run.rank or goes_along

    def _make_room(self) -> None:
        """Behind two that run nothing can be prepared."""
        if self._policy.halts == 2 and len(self._running) > 1 and self._waiting_rank < self._running[0].rank:
            self._halt(self._running[0])

    def _halt(self, halted: Run) -> None:
        """It makes no step after the one that it is at, but one at least; what was launched behind it comes sooner."""
        now_s, free_s = self._loop.time(), 0.0
        for run in self._running:
            if run.begins_s > now_s:
                run.begins_s = max(now_s, free_s)
            if run is halted and run.n_steps:
                into_s = now_s + self._policy.halted_s - run.begins_s - run.first_s
                run.n_steps = min(run.n_steps, max(1, math.ceil(into_s / run.step_s)))
            free_s = run.over_s + self._policy.gap_s
            self._end_at(run)

    @property
    def _waiting_rank(self) -> int:
        """The lowest of those who wait for a turn."""
        return min((call.rank for stage in self._stages_that_wait() for call in self._waiting[stage]), default=REST)

    @property
    def _free_s(self) -> float:
        return max((run.over_s for run in self._running), default=self._over_s)

    async def _work(self) -> None:
        while True:
            self._changed.clear()
            wait_s = self._wait_s()
            if wait_s is None:
                await self._changed.wait()
            elif wait_s > 1e-6:
                await self._sleep(wait_s)
            else:
                await self._take_turn(self._next_stage())

    async def _sleep(self, wait_s: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), wait_s)

    def _next_stage(self) -> str:
        return min(self._stages_that_wait(), key=lambda stage: (self._urgency(stage), self._most_urgent_since(stage)))

    def _most_urgent_since(self, stage: str) -> float:
        return min((call.rank, call.came_s) for call in self._waiting[stage])[1]

    def _stages_that_wait(self) -> list[str]:
        """A stage whose batch runs waits for its end first."""
        under_way = {run.stage for run in self._running} | self._settling
        return [stage for stage in STAGES if self._waiting[stage] and stage not in under_way]

    def _wait_s(self) -> float | None:
        """Until the next turn may begin; None: nobody wants one, or may have it before something changes."""
        if not self._stages_that_wait() or len(self._running) > 1:
            return None
        urgency, now_s = self._urgency(self._next_stage()), self._loop.time()
        own = min((self._urgency(run.stage) for run in self._running if self._waiting[run.stage]), default=LONE)
        if own <= AT_ONCE < urgency or own <= MOST_HURRIED < urgency:
            return None
        free_s = self._free_s
        if self._policy.halts == 2 and self._running and self._waiting_rank < self._running[0].rank:
            free_s = min(free_s, max(now_s, self._running[0].ends_s) + self._policy.halted_s)
        early_s = free_s - HEAD_START_S - now_s
        if urgency >= LONE:
            early_s = max(early_s, self._free_s + GRACE_S - now_s)
        if urgency > MOST_HURRIED:
            early_s = max(early_s, self._kept_until_s - now_s)
        return max(0.0, early_s)

    def _hurry_old(self, stage: str) -> None:
        for call in self._waiting[stage]:
            if call.rank == REST and self._loop.time() - call.since_s >= self._policy.old_s(stage):
                call.rank = HURRIED

    def _urgency(self, stage: str) -> int:
        self._hurry_old(stage)
        calls, policy = self._waiting[stage], POLICIES[stage]
        if (rank := min(call.rank for call in calls)) < REST:
            return AT_ONCE if rank <= FIRST else policy.hurried
        company = policy.company
        if stage in self.known:
            company = min(self._policy.company, max(1, len(self.known[stage]) * 3 // 4))
        is_soon = stage == "coarse" and any(call.position <= SOON for call in calls)
        longest_s = self._loop.time() - min(call.since_s for call in calls)
        if not is_soon and len(calls) < company and longest_s < self._policy.patience_s(stage):
            return LONE
        return policy.urgency

    async def _take_turn(self, stage: str) -> None:
        policy, run = self._policy, self._next_run(stage)
        self._preparing = run
        prepare_s = policy.prepare_s + len(run.batch) * policy.row_s
        lead_s = min(policy.halt_lead_s, prepare_s)
        await asyncio.sleep(prepare_s - lead_s)
        self._halt_for(run)
        await asyncio.sleep(lead_s)
        self._preparing = None
        self._launch(run)

    def _next_run(self, stage: str) -> Run:
        batch = self._batch(stage)
        self._waiting[stage] = [call for call in self._waiting[stage] if call not in batch]
        n_tokens, step = 0, 0.0
        if stage == "fine":
            first = self._costs.fine[len(batch) - 1]
        elif stage == "codec":
            first = self._costs.codec[len(batch) - 1]
        else:
            step = self._step_ms(stage, len(batch))
            n_tokens = self._piece(batch, step / 1e3)
            step -= self._unread_ms(stage, [call.n_tokens for call in batch], n_tokens)
            first = self._prefill_ms(stage, sum(call.is_new for call in batch))
        return Run(stage, batch, 0.0, first / 1e3, step / 1e3, n_tokens)

    def _step_ms(self, stage: str, n_rows: int) -> float:
        return self._costs.step(stage, n_rows) - (n_rows * self._spared_ms if stage == "coarse" else 0.0)

    def _unread_ms(self, stage: str, n_wanted: Sequence[int], n_steps: int) -> float:
        """What a step spares on average because rows that have all they want read no keys any more."""
        n_idle = sum(max(0, n_steps - n) for n in n_wanted) / n_steps
        read = 1 - self._policy.spared_keys() if stage == "coarse" else SEMANTIC_KEYS / KEYS
        return n_idle * read * self._costs.row_keys

    def _prefill_ms(self, stage: str, n_rows: int) -> float:
        return self._costs.prefill(stage, n_rows) * (self._prefix if stage == "coarse" else 1.0)

    def _halt_for(self, coming: Run) -> None:
        if self._policy.halts == 2:
            for run in self._running:
                if coming.rank < run.rank:
                    self._halt(run)

    def _launch(self, run: Run) -> None:
        now_s = self._loop.time()
        free_s = self._free_s + self._policy.gap_s
        run.begins_s = max(now_s, free_s)
        self.idle_s += max(0.0, run.begins_s - max(self._free_s, min(call.came_s for call in run.batch)))
        self._running.append(run)
        self._end_at(run)
        if run.is_halted_at_once:
            self._halt(run)
        self._make_room()

    def _end_at(self, run: Run) -> None:
        if run.end:
            run.end.cancel()
        run.end = self._loop.call_at(run.over_s, self._end, run)

    def _batch(self, stage: str) -> list[Call]:
        self._hurry_old(stage)
        calls = self._waiting[stage]
        if stage in ("codec", "fine"):
            chosen = sorted(calls, key=lambda call: (call.rank, call.size, call.since_s))[: MAX_BATCH[stage]]
            n_first = sum(call.rank <= FIRST for call in chosen)
            return chosen[: max(n_first, self._policy.fine_first_batch)] if stage == "fine" and n_first else chosen
        is_tight = min(call.slack_s for call in calls) < self._policy.tight_s
        batch: list[Call] = []
        is_busy = len(self.known[stage]) >= self._policy.busy
        for call in sorted(calls, key=lambda call: (call.rank, call.slack_s)):
            n_new = sum(each.is_new for each in [*batch, call])
            step_ms, prefills_ms = self._step_ms(stage, min(len(batch) + 1, 32)), self._prefill_ms(stage, n_new)
            begins_at_leisure = POLICIES[stage].is_beginning(call) and call.is_later and call.rank == REST
            if batch and batch[0].rank <= FIRST and begins_at_leisure and call.slack_s > self._policy.at_leisure_s:
                continue
            if batch and batch[0].rank <= FIRST < call.rank:
                stays_behind = call.slack_s > self._policy.comfortable_s or POLICIES[stage].is_first_for_hurried
                if call.rank == REST and stays_behind and not is_busy:
                    break
                if len(batch) >= self._policy.most_with_first(stage, len(self.known[stage])):
                    break
            is_late = PIECES[0] * step_ms + prefills_ms > self._policy.hurried_batch_s * 1e3
            if len(batch) >= FEW and batch[0].rank == HURRIED < call.rank and is_late:
                break
            takes_ms = PIECES[1] * step_ms + prefills_ms
            fits = not is_tight or len(batch) < FEW or call.rank < REST or takes_ms <= self._policy.tight_batch_s * 1e3
            if fits and len(batch) < MAX_BATCH[stage]:
                batch.append(call)
        return batch

    def _piece(self, batch: list[Call], step_s: float) -> int:
        n = next((n for n in PIECES if n * step_s <= self._policy.piece_s), PIECES[-1])
        n_hurried = max((call.n_tokens for call in batch if call.rank < REST), default=0)
        return max(min(n, max(call.n_tokens for call in batch)), min(n_hurried, int(HURRIED_PIECE_S / step_s)))

    def _end(self, run: Run) -> None:
        self._running.remove(run)
        self._over_s = run.over_s
        for i, more in enumerate((1, len(run.batch), 1e3 * (run.over_s - run.begins_s))):
            self.batches[run.stage][i] += more
        waits = self._waiting[run.stage] and self._urgency(run.stage) <= MOST_HURRIED
        if waits or (run.stage != "codec" and run.rank < REST):
            self._kept_until_s = self._loop.time() + FOLLOW_S
        self._settling.add(run.stage)
        settle_s = self._policy.settle_s + len(run.batch) * self._policy.row_s
        self._loop.call_later(settle_s, self._settle, run)
        self._changed.set()

    def _settle(self, run: Run) -> None:
        self._settling.remove(run.stage)
        for call in run.batch:
            made = min(run.n_steps, call.n_tokens)
            call.n_tokens, call.position, call.is_new = call.n_tokens - made, call.position + made, False
            if not call.n_tokens and call.n_behind:
                end = self._policy.window_end(call.position, call.is_cut_later)
                call.n_tokens = min(WINDOW, end - call.position, call.n_behind)
                call.n_behind -= call.n_tokens
                call.is_new = self._policy.begins_window(call.position, call.is_cut_later)
                call.rank = HURRIED if call.position <= WINDOW else REST
            if call.n_tokens:
                self.submit(call)
            else:
                call.answer.set_result(None)
        self._changed.set()


class Server:
    """The instances of Triton's stages, each of which takes a call at a time; and the players, for pacing."""

    def __init__(self, policy: Policy, costs: Costs):
        self.policy, self.gpu = policy, Gpu(policy, costs)
        self.streams: set[Stream] = set()
        self._queues: dict[str, list[tuple[Call, asyncio.Future[None]]]] = {stage: [] for stage in STAGES}
        self._free = {stage: policy.instances(stage) for stage in STAGES}
        self._busy_until_s = 0.0  # with those on their way

    def in_hand_s(self) -> float:
        return sum(min(max(stream.lead_s, 0.0), self.policy.pace_lead_s) for stream in self.streams)

    async def _hop(self) -> None:
        """One way through Triton."""
        now_s = asyncio.get_running_loop().time()
        self._busy_until_s = max(self._busy_until_s, now_s) + self.policy.hop_s
        await asyncio.sleep(self._busy_until_s - now_s + max(0.0, self.policy.way_s - self.policy.hop_s))

    async def infer(self, call: Call) -> None:
        await self._hop()
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues[call.stage].append((call, answered))
        self._hand_on(call.stage)
        await answered
        await self._hop()

    def _hand_on(self, stage: str) -> None:
        while self._free[stage] and self._queues[stage]:
            self._free[stage] -= 1
            spawn(self._serve(stage, *self._queues[stage].pop(0)))

    async def _serve(self, stage: str, call: Call, answered: asyncio.Future[None]) -> None:
        self.gpu.submit(call)
        await call.answer
        if not answered.done():
            answered.set_result(None)
        self._free[stage] += 1
        self._hand_on(stage)


TASKS: set[asyncio.Task[None]] = set()


def spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    TASKS.add(task)
    task.add_done_callback(TASKS.discard)
    return task


class Sentence:
    """Of a stream: what of it is made."""

    def __init__(self, n_total: int, is_later: bool, is_cut_later: bool, is_last: bool):
        """n_total: semantic tokens. is_later: it is not the first. is_cut_later: it has enough before it to be cut as such."""
        self.n_total, self.is_later, self.is_cut_later, self.is_last = n_total, is_later, is_cut_later, is_last
        self.n_semantic = 0
        self.ahead: asyncio.Task[None] | None = None


class Stream:
    """A request, as pipeline.py and pacing.py make it: sentence after sentence, of which semantic tokens and one coarse window are made
    ahead, from its first chunk on."""

    def __init__(self, server: Server):
        self._server, self._policy = server, server.policy
        self._hold = Hold(server.policy.crowd, server.policy.hold_until_s)
        self._loop = asyncio.get_running_loop()
        self._came_s, self._dry_s = self._loop.time(), math.inf
        # By stage: its latest sentence, or so much later as its listener had in hand, if that was told.
        self.began_s: dict[str, float] = {}
        self.ttfa_s, self.n_underruns, self.underrun_s, self.ended_s = math.nan, 0, 0.0, 0.0
        self.is_heard = False  # its first chunk is made

    @property
    def lead_s(self) -> float:
        return -math.inf if self._dry_s == math.inf else self._dry_s - self._loop.time()

    def due_s(self, n_semantic: int, is_cut_later: bool) -> float:
        return self._policy.due_s(n_semantic, is_cut_later) if self._policy.tells_due else n_semantic / SEMANTIC_HZ

    async def speak(self) -> None:
        self._server.streams.add(self)
        await asyncio.sleep(0.004)  # to the server, and the text
        for index, (n_total, before_s) in enumerate(self._policy.with_before_s()):
            if index:
                self._play(PAUSE_S)
            is_last = index == len(self._policy.sentences) - 1
            is_cut_later = before_s >= self._policy.later_after_s
            await self._say_sentence(Sentence(n_total, index > 0, is_cut_later, is_last))
        self.ended_s = self._loop.time()
        self._server.streams.discard(self)

    async def _say_sentence(self, sentence: Sentence) -> None:
        windows: asyncio.Queue[int] = asyncio.Queue()
        room = asyncio.Semaphore(1)
        spawn(self._make_windows(sentence, windows, room))
        n_known = n_done = index = 0
        schedule = self._policy.schedule.later() if sentence.is_cut_later else self._policy.schedule
        total = sentence.n_total * FRAME_HZ // SEMANTIC_HZ
        while n_done < total:
            n_chunk = schedule.chunk(index)
            n_seen = n_chunk + schedule.lookahead(index)
            while n_known < min(n_done + n_seen, total):
                n_known += await windows.get()
                if self.is_heard or n_known < n_done + n_seen:
                    room.release()
            n_seen, n_chunk = min(n_seen, total - n_done), min(n_chunk, total - n_done)
            await self._call(sentence, "fine", is_hurried=n_seen <= 96, is_short=n_seen <= 30, size=n_seen)
            is_short = not n_done and n_chunk <= 30
            await self._call(sentence, "codec", is_hurried=n_chunk <= 60, is_second=n_chunk <= 30, is_short=is_short)
            if not self.is_heard:
                self.is_heard = True
                room.release()
                await asyncio.sleep(self._hold.left_s(len(self._server.streams), self._loop.time() - self._came_s))
            self._play(n_chunk / FRAME_HZ)
            n_done, index = n_done + n_chunk, index + 1

    def _play(self, audio_s: float) -> None:
        now_s = self._loop.time()
        if self._dry_s == math.inf:
            self.ttfa_s, self._dry_s = now_s + 0.002 - self._came_s, now_s
        elif now_s > self._dry_s:
            self.n_underruns, self.underrun_s = self.n_underruns + 1, self.underrun_s + now_s - self._dry_s
        self._dry_s = max(self._dry_s, now_s) + audio_s

    async def _make_windows(self, sentence: Sentence, windows: asyncio.Queue[int], room: asyncio.Semaphore) -> None:
        position = index = 0
        while position < 3 * sentence.n_total:
            await room.acquire()
            while sentence.n_semantic < self._reads(sentence, position):
                if ahead := sentence.ahead:
                    sentence.ahead = None
                    await ahead
                else:
                    missing = self._reads(sentence, position) - sentence.n_semantic
                    await self._say(sentence, max(missing, 60 if sentence.n_semantic else 1))
            if self.is_heard:
                self._go_ahead(sentence)
            most = min(position + self._policy.schedule.windows(index) * WINDOW, 3 * sentence.n_total)
            end = first_end = min(self._policy.window_end(position, sentence.is_cut_later), most)
            while end < most and self._reads(sentence, end) <= sentence.n_semantic:
                end = min(self._policy.window_end(end, sentence.is_cut_later), most)
            is_new, n_tokens = (
                self._policy.begins_window(position, sentence.is_cut_later),
                min(WINDOW, first_end - position),
            )
            await self._call(
                sentence, "coarse", n_tokens, position, position <= WINDOW, is_new, end - position - n_tokens
            )
            if not index and self._hold.is_crowd(len(self._server.streams)):
                self._go_ahead(sentence)
            windows.put_nowait((end - position) // 2)
            position, index = end, index + 1
        if sentence.is_last:
            self._server.gpu.forget(self)

    def _reads(self, sentence: Sentence, position: int) -> int:
        return min(self._policy.reads(position, sentence.is_cut_later), sentence.n_total)

    def _go_ahead(self, sentence: Sentence) -> None:
        if sentence.ahead is None and sentence.n_semantic < sentence.n_total:
            sentence.ahead = spawn(self._say(sentence, 60))

    async def _say(self, sentence: Sentence, n_tokens: int) -> None:
        n, position = min(n_tokens, sentence.n_total - sentence.n_semantic), sentence.n_semantic
        if n:
            await self._call(sentence, "semantic", n, position, is_hurried=position <= WINDOW, is_new=position == 0)
            sentence.n_semantic += n

    async def _call(
        self,
        sentence: Sentence,
        stage: str,
        n_tokens: int = 0,
        position: int = 0,
        is_hurried: bool = False,
        is_new: bool = False,
        n_behind: int = 0,
        is_second: bool = False,
        is_short: bool = False,
        size: int = 0,
    ) -> None:
        while (excess_s := self.lead_s - self._policy.pace_lead_s) > 0 and self._is_anybody_needy():
            await asyncio.sleep(min(max(excess_s, 1e-6), 0.01))
        if stage in self._server.gpu.known:
            self._server.gpu.known[stage].add(self)
        # of fine and codec nobody knows whether a short beginning is a stream's or a later sentence's
        is_first = is_short or (not self.is_heard and not (stage == "semantic" and position))
        rank = POLICIES[stage].first if is_first else HURRIED if is_hurried else REST
        known = self._server.gpu.known
        is_crowded = len(known.get(stage, known["coarse"])) >= self._policy.crowded
        is_late = POLICIES[stage].is_second_first and is_crowded and not sentence.is_later
        if rank == HURRIED and (is_second or is_late):
            rank = LAST if is_second and is_crowded and self._policy.halts_for_second else FIRST
        if stage == "codec" and -math.inf < self.lead_s < self._policy.codec_due_s:
            rank = LAST
        call = Call(stage, self, n_tokens, position, rank, is_new, sentence.is_later, sentence.is_cut_later, n_behind)
        call.size = size if rank < REST and self._policy.shortest_first else 0
        if stage in self._server.gpu.known:
            if not position:
                told_s = max(self.lead_s, 0.0) if sentence.is_later and self._policy.tells_lead else 0.0
                self.began_s[stage] = self._loop.time() + told_s
            if sentence.is_later and call.slack_s > self._policy.at_leisure_s:
                call.rank = REST
        await self._server.infer(call)

    def _is_anybody_needy(self) -> bool:
        return any(other is not self and other.lead_s < self._policy.needy_s for other in self._server.streams)


async def listen(
    policy: Policy, costs: Costs, clients: int, due_s: Sequence[float], duration_s: float, ramp_s: float
) -> dict[str, Any]:
    loop, heard = asyncio.get_running_loop(), list[Stream]()
    server = Server(policy, costs.times(policy.slower))

    n_refused = 0

    async def one() -> bool:
        """Whether it was heard, and not refused."""
        nonlocal n_refused
        backlog = Backlog(policy.max_backlog_s, policy.pace_lead_s, server.in_hand_s)
        if len(server.streams) >= policy.max_streams or backlog.owed_s(len(server.streams)) > backlog.most_s:
            n_refused += 1
            return False
        stream = Stream(server)
        await stream.speak()
        heard.append(stream)
        return True

    async def client(start_s: float) -> None:
        await asyncio.sleep(start_s)
        while loop.time() < duration_s:
            if not await one():
                await asyncio.sleep(RETRY_S)

    async def stranger(start_s: float) -> None:
        await asyncio.sleep(start_s)
        await one()

    listeners = [client(ramp_s * i / clients) for i in range(clients)] or [stranger(start_s) for start_s in due_s]
    await asyncio.gather(*map(spawn, listeners))
    audio_s = len(heard) * policy.clip_s
    return {
        "requests": len(heard),
        **percentiles("ttfa_ms", [1e3 * stream.ttfa_s for stream in heard]),
        "refused": n_refused,
        "underruns": sum(stream.n_underruns for stream in heard),
        "underrun_s": round(sum(stream.underrun_s for stream in heard), 2),
        "audio_s_per_s": round(audio_s / max(stream.ended_s for stream in heard), 1),
        "idle_percent": round(100 * server.gpu.idle_s / max(stream.ended_s for stream in heard), 1),
        "stages": {
            stage: {"rows_a_batch": round(rows / max(n, 1), 1), "ms_a_second_of_audio": round(ms / audio_s, 2)}
            for stage, (n, rows, ms) in server.gpu.batches.items()
        },
    }


def arrivals(rate: float, duration_s: float, seed: int) -> list[float]:
    """Of strangers, s."""
    chance, due_s = random.Random(seed), list[float]()
    while (next_s := (due_s[-1] if due_s else 0.0) + chance.expovariate(rate)) < duration_s:
        due_s.append(next_s)
    return due_s


def recorded(path: Path) -> list[float]:
    """When the requests of load_test.py's CSV were due, s. Raises SystemExit for another file."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if "due_s" not in (rows.fieldnames or ()):
            raise SystemExit(f"{path} is no CSV of load_test.py: it has no column due_s")
        return [float(row["due_s"]) for row in rows]


def simulate(
    policy: Policy,
    costs: Costs,
    clients: int = 0,
    rate: float = 1.0,
    duration_s: float = 30.0,
    ramp_s: float = 4.0,
    seed: int = 0,
    due_s: Sequence[float] = (),
) -> dict[str, Any]:
    """A row of load_test.py's kind, and what the stages did. clients: in a closed loop; 0: strangers, who come when they are due, or at a
    rate a second."""
    loop = VirtualLoop()
    try:
        due_s = due_s or arrivals(rate, duration_s, seed)
        return loop.run_until_complete(listen(policy, costs, clients, due_s, duration_s, ramp_s))
    finally:
        for task in (left := asyncio.all_tasks(loop)):
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()


def policy_of(settings: list[str]) -> Policy:
    """Raises SystemExit for a setting that a Policy does not have."""
    policy = Policy()
    names = [each.name for each in fields(Policy)]
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in names:
            raise SystemExit(f"no setting {name!r}: there are {', '.join(names)}")
        now = getattr(policy, name)
        then = tuple(map(int, value.split(","))) if isinstance(now, tuple) else type(now)(value)
        policy = replace(policy, **{name: then})
    return policy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--clients", type=int, default=0, help="in a closed loop")
    load.add_argument("--rate", type=float, default=1.0, help="requests a second, open loop")
    load.add_argument("--arrivals", type=Path, metavar="CSV", help="open loop, as recorded by load_test.py")
    parser.add_argument("--duration", type=float, default=30.0, help="s; no request is sent later")
    parser.add_argument("--ramp", type=float, default=4.0, help="s; clients come in turn over so long")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--costs", choices=COSTS, default="h100-int8")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of Policy")
    options = parser.parse_args()
    found = simulate(
        policy_of(options.set),
        COSTS[options.costs],
        options.clients,
        options.rate,
        options.duration,
        options.ramp,
        options.seed,
        recorded(options.arrivals) if options.arrivals else (),
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
