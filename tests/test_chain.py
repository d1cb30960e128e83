"""A chain is coarse windows in one call: it says what as many calls say, through every way to an engine."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from barkstream.coarse import generate_coarse, tokens_from_codes
from barkstream.engines import Chain, Generation, Row, by_windows
from barkstream.engines.turns import Launch, Turns
from barkstream.engines.workers import PIECE_S, POLICIES, CausalWorker, at_once
from barkstream.options import Schedule, SpeechOptions
from barkstream.pipeline import Speech
from barkstream.sampling import Sampling
from barkstream.tokens import CoarseLayout, GPTSize

SIZE = GPTSize(n_layers=1, n_heads=1, width=64, block_size=64, n_input_ids=1000, n_output_ids=1000)
LAYOUT = CoarseLayout(
    SIZE, n_codebooks=2, codebook_size=100, rate_hz=75, first_id=500, semantic_pad=499, infer=998,
    n_semantic_window=20, max_history=30, window=10, semantic_rate_hz=50,
)  # fmt: skip  # tokens a semantic token: 3


class Attentive:
    """A coarse stage's engine: a token depends on every id before it, on where it stands, on the seed and on its place in the
    generation. Remembers its rows."""

    def __init__(self):
        self.batches, self.released = [], []
        self.gate = threading.Semaphore(10**6)

    def generate(self, rows):
        self.gate.acquire()
        self.batches.append(rows)
        assert all(row.chain is None for row in rows), "an engine knows no chains"
        return [Generation(self._tokens(row), False) for row in rows]

    def _tokens(self, row):
        row.check(SIZE)
        ids = row.ids[:, 0].tolist()
        for position in range(row.position, row.position + row.n_tokens):
            seen = sum((i + 1) * id for i, id in enumerate(ids))
            code = (seen + 7 * position + row.sampling.seed) % LAYOUT.codebook_size
            ids.append(LAYOUT.first_id + LAYOUT.codebook_size * (position % 2) + code)
        return np.array(ids[len(row.ids) :], np.int32)

    def release(self, *streams):
        self.released += streams


class Known:
    """Semantic tokens, of which some are there and more come when they are asked for."""

    def __init__(self, tokens, n_there):
        self._all, self.n_waits = tokens, 0
        self._have(n_there)

    def ensure(self, n):
        if n > len(self.tokens) and not self.ended:
            self.n_waits += 1
            self._have(n)

    def has(self, n):
        return self.ended or n <= len(self.tokens)

    def _have(self, n):
        self.tokens, self.ended = self._all[:n], n > len(self._all)


class Windows:
    """Coarse calls as an engine's windows, by `run`; remembers how many windows each call had."""

    def __init__(self, run):
        self._run, self.n_windows = run, []

    def coarse(self, prefix, n_tokens, position, sampling, stream, heads, windows):
        row = Row(prefix[:, None], n_tokens, position, sampling, stream, Chain.of(heads, windows, LAYOUT))
        row.check(SIZE)
        self.n_windows.append(1 + len(heads))
        return self._run(row).tokens


@pytest.fixture
def start():
    """Starts workers; stops them at the end."""
    running = []

    def start(worker):
        running.append((worker, threading.Thread(target=worker.work)))
        running[-1][1].start()
        return worker

    yield start
    for worker, thread in running:
        worker.close()
        thread.join()


@pytest.fixture
def worker(start):
    """A worker over an attentive engine (`.engine`), in pieces of 8 tokens if nobody waits."""
    engine = Attentive()
    worker = CausalWorker(
        at_once(engine.generate), engine.release, 4, Turns(), POLICIES["coarse"], lambda n: PIECE_S / 8
    )
    worker.engine = engine
    return start(worker)


def some_semantic(n):
    return np.random.default_rng(n).integers(0, 499, n).astype(np.int32)


class Voice:
    """History of 3 s, as long as the windows' history and longer."""

    semantic = some_semantic(60)
    coarse = np.random.default_rng(1).integers(0, 100, (2, 90)).astype(np.int32)


def codes(stages, semantic, history, schedule, lookahead=None, n_there=10**6):
    known = Known(semantic, n_there)
    pieces = generate_coarse(known, history, LAYOUT, Sampling(seed=5), lookahead, schedule, stages, 3)
    return np.concatenate([np.zeros((2, 0), np.int32), *pieces], axis=1)


ALL = Schedule(coarse_windows=(64,))


@pytest.mark.parametrize("history", [None, Voice()])
@pytest.mark.parametrize("n", [1, 3, 10, 41])  # semantic tokens: 2, 8, 30 and 122 coarse ones; windows have 10
@pytest.mark.parametrize("lookahead", [None, 0])
@pytest.mark.parametrize("lengths", [(0,), (0, 0, 20), (26, 10, 8)])
def test_a_chain_says_what_single_windows_say(worker, n, history, lookahead, lengths):
    by_itself = Windows(lambda row: Attentive().generate([row])[0])
    single = Schedule(sliding_window_len=lengths)
    expected = codes(by_itself, some_semantic(n), history, single, lookahead)
    assert set(by_itself.n_windows) == {1} and expected.size == n * 3 // 2 * 2
    for run in (
        lambda row: by_windows(Attentive().generate, [row])[0],
        lambda row: worker.submit([row])[0].result(timeout=10),
        lambda row: worker.submit([replace(row, stream=0)])[0].result(timeout=10),
    ):
        chained = Windows(run)
        whole = replace(ALL, sliding_window_len=lengths)
        np.testing.assert_array_equal(codes(chained, some_semantic(n), history, whole, lookahead), expected)
        assert chained.n_windows == [len(by_itself.n_windows)]


@pytest.mark.parametrize(
    ("cut", "n_most"),
    [
        (dict(coarse_call=10, coarse_windows=(1, 3)), 3),
        (dict(coarse_call=4, coarse_windows=(5,)), 2),
        (dict(coarse_call=6, coarse_windows=(4,)), 4),
        (dict(coarse_call=6), 1),
    ],
)
def test_any_cut_into_chains_says_the_same(worker, cut, n_most):
    stages = Windows(lambda row: worker.submit([row])[0].result(timeout=10))
    expected = codes(stages, some_semantic(41), Voice(), Schedule())
    stages.n_windows.clear()
    np.testing.assert_array_equal(codes(stages, some_semantic(41), Voice(), Schedule(**cut)), expected)
    assert max(stages.n_windows) == n_most


@pytest.mark.parametrize("cut", [dict(), dict(coarse_windows=(1, 3)), dict(coarse_call=6, coarse_windows=(1, 4, 7))])
def test_any_cut_of_longer_windows_says_the_same(worker, cut):
    """Calls may end, and begin, within a window."""
    stages, longer = Windows(lambda row: worker.submit([row])[0].result(timeout=10)), dict(sliding_window_len=(0, 28))
    expected = codes(stages, some_semantic(41), Voice(), Schedule(**longer))
    cut = Schedule(**{"coarse_call": 10, **longer, **cut})
    np.testing.assert_array_equal(codes(stages, some_semantic(41), Voice(), cut), expected)


@pytest.mark.parametrize(
    ("lengths", "spans"),
    [
        ((0,), [(start, 10, 30) for start in range(0, 120, 10)]),
        ((0, 0, 20), [(0, 10, 30), (10, 10, 30), *((start, 20, 20) for start in range(20, 120, 20))]),
        ((26, 8), [(0, 26, 14), *((start, 8, 30) for start in range(26, 120, 8))]),
    ],
)
@pytest.mark.parametrize("n_past", [0, 60])
def test_a_longer_window_has_as_much_less_history(lengths, spans, n_past):
    """Prefixes by Suno's rule: history of so many coarse tokens, and of the semantic ones that cover the same time. LAYOUT has three
    coarse tokens for a semantic one."""
    prefixes, all_semantic = {}, some_semantic(n_past + 40)

    class Recording(Windows):
        def coarse(self, prefix, n_tokens, position, sampling, stream, heads, windows):
            prefixes[position] = prefix
            return super().coarse(prefix, n_tokens, position, sampling, stream, heads, windows)

    history = SimpleNamespace(semantic=all_semantic[:n_past], coarse=Voice.coarse) if n_past else None
    stages = Recording(lambda row: Attentive().generate([row])[0])
    said = codes(stages, all_semantic[n_past:], history, Schedule(coarse_call=200, sliding_window_len=lengths))
    n_kept = (
        max(n_history for _, _, n_history in spans) // 3 if n_past else 0
    )  # the preset is trimmed to the longest history
    past = tokens_from_codes(Voice.coarse[:, -3 * n_kept // 2 : -1], LAYOUT) if n_past else np.zeros(0, int)
    semantic = all_semantic[n_past - n_kept :]
    coarse = np.concatenate([past, tokens_from_codes(said, LAYOUT)])
    assert sorted(prefixes) == [start for start, _, _ in spans]
    for start, length, n_history in spans:
        first = max(0, n_kept + round(start / 3) - n_history // 3)
        seen = semantic[first : first + 20]
        known = coarse[: len(past) + start]
        expected = [
            *seen,
            *[LAYOUT.semantic_pad] * (20 - len(seen)),
            LAYOUT.infer,
            *known[max(0, len(known) - n_history) :],
        ]
        assert prefixes[start].tolist() == expected, start
        assert len(expected) + length - 1 <= LAYOUT.max_positions


def test_a_chain_waits_for_no_semantic_tokens_and_reads_none_too_early():
    stages = Windows(lambda row: by_windows(Attentive().generate, [row])[0])
    expected = codes(stages, some_semantic(41), None, Schedule())
    stages.n_windows.clear()
    np.testing.assert_array_equal(codes(stages, some_semantic(41), None, ALL, n_there=30), expected)
    # A window reads 20 tokens, the first four (which reach back to the first token) the same 20. The rest: one by one.
    assert stages.n_windows[0] > 4 and max(stages.n_windows[1:-1], default=1) == 1 and sum(stages.n_windows) == 13


def test_windows_are_chained_only_when_they_may_be():
    stages, may = Windows(lambda row: by_windows(Attentive().generate, [row])[0]), []
    known = Known(some_semantic(41), 10**6)
    pieces = generate_coarse(known, None, LAYOUT, Sampling(), None, ALL, stages, 3, may_chain=lambda: bool(may))
    next(pieces), next(pieces)
    may.append("somebody has heard the first audio")
    list(pieces)
    assert stages.n_windows == [1, 1, 11]


def test_what_there_is_time_for_is_told_once_and_before_the_first_call():
    told, said = [], Windows(lambda row: by_windows(Attentive().generate, [row])[0])

    def meanwhile():
        told.append(len(said.n_windows))

    known = Known(some_semantic(41), 10**6)
    list(generate_coarse(known, None, LAYOUT, Sampling(), None, ALL, said, 3, meanwhile=meanwhile))
    assert told == [0] and said.n_windows


def chain_of(n_windows, stream=1, position=0, n_history=30, n_last=10):
    ids = np.concatenate([some_semantic(20), [LAYOUT.infer], 500 + np.arange(n_history) % 200]).astype(np.int32)[
        :, None
    ]
    heads = np.array([[*some_semantic(20 + i), LAYOUT.infer][-21:] for i in range(1, n_windows)], np.int32)
    windows = np.array([[10, 30]] * (n_windows - 2) + [[n_last, 30]] * (n_windows > 1), np.int32)
    chain = Chain.of(heads.reshape(-1, 21), windows.reshape(-1, 2), LAYOUT)
    return Row(ids, 10 * (n_windows - 1) + n_last, position, Sampling(seed=2), stream, chain)


def test_rows_of_different_lengths_go_together_window_by_window():
    engine, rows = Attentive(), [chain_of(3, n_last=4), replace(chain_of(1), n_tokens=0), chain_of(2, stream=2)]
    together = by_windows(engine.generate, rows)
    alone = [by_windows(Attentive().generate, [row])[0].tokens.tolist() for row in rows]
    assert [generation.tokens.tolist() for generation in together] == alone
    assert [len(tokens) for tokens in alone] == [24, 0, 20]
    assert [len(batch) for batch in engine.batches] == [3, 2, 1]


def pieces_of(worker, row):
    """(position, n_tokens) of each piece."""
    worker.engine.batches.clear()
    worker.submit([row])[0].result(timeout=10)
    return [(row.position, row.n_tokens) for (row,) in worker.engine.batches]


@pytest.fixture
def eights(monkeypatch):
    """Pieces of 8 tokens: windows here have 10."""
    monkeypatch.setattr("barkstream.engines.workers.PIECES", (60, 30, 15, 8))


def test_a_chains_pieces_never_cross_a_windows_end(worker, eights):
    # A window's last four tokens, a whole one, and a last one of six.
    begun = replace(chain_of(3, position=996, n_last=6), n_tokens=4 + 10 + 6)
    assert pieces_of(worker, begun) == [(996, 4), (1000, 8), (1008, 2), (1010, 6)]


def test_a_chains_next_window_is_as_hurried_as_a_call_for_it(worker, eights):
    """Not cut in pieces if somebody waits for it, and nobody does behind position 60."""
    assert pieces_of(worker, chain_of(4, position=40)) == [(40, 10), (50, 10), (60, 10), (70, 8), (78, 2)]


def test_a_chains_next_window_is_known_to_need_a_prefill_unless_it_goes_on(start, eights):
    """Pieces of 8 tokens take .08 s; a prefill is said to take 1 s."""
    said = []

    class Listening(Turns):
        def _launched(self, turn, launch):
            said.append(launch.takes_s)
            super()._launched(turn, replace(launch, takes_s=0.0))

    engine = Attentive()
    policy = replace(POLICIES["coarse"], is_first=lambda row: False, is_hurried=lambda row: False)
    worker = start(
        CausalWorker(at_once(engine.generate), engine.release, 4, Listening(), policy, lambda n: 0.01, lambda n: 1.0)
    )
    slid = chain_of(2)
    worker.submit([slid])[0].result(timeout=10)
    assert said == pytest.approx([1.08, 0.02, 1.08, 0.02])
    said.clear()
    going_on = replace(chain_of(2, stream=2, n_history=4), chain=replace(slid.chain, heads=slid.ids[:21].T))
    worker.submit([going_on])[0].result(timeout=10)
    assert said == pytest.approx([1.08, 0.02, 0.08, 0.02])


class Alone(Attentive):
    """One that knows how to go on by itself; remembers how many pieces each start had, and what it asked."""

    def __init__(self):
        super().__init__()
        self.n_pieces, self.may = [], []

    def start_alone(self, row, n_piece, goes_on):
        def finish():
            left, said = row, []
            while not said or (left.n_tokens and self._ask(goes_on)):
                said += self.generate([left.piece(n_piece)])
                left = left.after(said[-1].tokens)
            self.n_pieces.append(len(said))
            return [Generation.joined([each.tokens for each in said], False)]

        return finish

    def _ask(self, goes_on):
        self.may.append(goes_on())
        return self.may[-1]


@pytest.fixture
def alone(start):
    """A worker over such an engine (`.engine`), for which stream 1's calls are long, and turns (`.turns`)."""
    engine, turns = Alone(), Turns()
    policy = replace(POLICIES["coarse"], is_hurried=lambda row: False, is_long=lambda row: row.stream == 1)
    step_s = PIECE_S / LAYOUT.window
    worker = CausalWorker(
        at_once(engine.generate),
        engine.release,
        4,
        turns,
        policy,
        lambda n: step_s,
        start_alone=engine.start_alone,
    )
    worker.engine, worker.turns = engine, turns
    return start(worker)


def test_an_only_long_call_goes_on_by_itself(alone):
    whole = by_windows(Attentive().generate, [chain_of(5)])[0].tokens
    assert np.array_equal(alone.submit([chain_of(5)])[0].result(timeout=10).tokens, whole)
    assert alone.engine.n_pieces == [5]
    assert [row.n_tokens for (row,) in alone.engine.batches] == [10] * 5


def test_a_call_that_somebody_listens_to_goes_piece_by_piece(alone):
    alone.submit([chain_of(5, stream=2)])[0].result(timeout=10)
    assert not alone.engine.n_pieces and len(alone.engine.batches) == 5


def test_two_long_calls_share_their_pieces(alone):
    whole = by_windows(Attentive().generate, [chain_of(5)])[0].tokens
    alone.engine.gate = threading.Semaphore(0)
    both = alone.submit([chain_of(5), chain_of(5)])
    alone.engine.gate.release(100)
    assert all(np.array_equal(each.result(timeout=10).tokens, whole) for each in both)
    assert max(len(batch) for batch in alone.engine.batches) == 2


def begun(alone):
    """A long call whose first piece is over, and which has asked whether it may go on; the next one waits for the gate."""
    alone.engine.gate = threading.Semaphore(0)
    answer = alone.submit([chain_of(5)])[0]
    alone.engine.gate.release()
    while not alone.engine.may:
        time.sleep(0.001)
    return answer


def test_a_long_call_gives_way_to_who_waits_for_a_turn(alone):
    engine, answer = alone.engine, begun(alone)

    def other():
        with alone.turns.turn(lambda: 0) as turn:
            turn.launched(Launch(0.0))

    waiting = threading.Thread(target=other)
    waiting.start()
    while not alone.turns._waiting:
        time.sleep(0.001)
    engine.gate.release(100)
    whole = by_windows(Attentive().generate, [chain_of(5)])[0].tokens
    assert np.array_equal(answer.result(timeout=10).tokens, whole)
    waiting.join(timeout=10)
    assert not waiting.is_alive() and engine.n_pieces[0] < 5 and sum(engine.n_pieces) == 5 and False in engine.may


@pytest.mark.parametrize("wish", ["a call", "an errand"])
def test_a_long_call_gives_way_to_what_its_own_stage_is_asked_for(alone, wish):
    engine, long = alone.engine, begun(alone)
    short = alone.submit([chain_of(1, stream=2)])[0] if wish == "a call" else alone.between(lambda: 7)
    engine.gate.release()  # the piece that was begun before; the rest waits for the gate
    if wish == "an errand":
        assert short.result(timeout=10) == 7
    engine.gate.release(100)
    assert len(short.result(timeout=10).tokens) == 10 if wish == "a call" else True
    assert len(long.result(timeout=10).tokens) == 50
    assert engine.n_pieces[0] == 2 and (wish == "an errand" or len(engine.batches[2]) == 2)


def test_a_long_call_that_is_left_ends_with_the_piece_under_way(alone):
    engine, answer = alone.engine, begun(alone)
    alone.drop(1)
    engine.gate.release(100)
    said = answer.result(timeout=5).tokens
    assert len(said) == 20 and engine.n_pieces == [2]
    assert not alone._held


def test_a_chain_that_is_left_ends_after_its_piece(worker):
    worker.engine.gate = threading.Semaphore(0)
    whole = by_windows(Attentive().generate, [chain_of(5)])[0].tokens
    under_way, waiting = worker.submit([chain_of(5), chain_of(5, stream=2)])
    for _ in range(2):
        worker.engine.gate.release()
    while len(worker.engine.batches) < 2:
        pass
    worker.drop(1, 2)
    worker.engine.gate.release(100)
    for answer in (under_way, waiting):
        said = answer.result(timeout=5).tokens
        assert 10 < len(said) < 40
        np.testing.assert_array_equal(said, whole[: len(said)])
    assert not worker._held
    assert worker.submit([chain_of(5)])[0].result(timeout=5).tokens.tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(n_tokens=20), r"the row's own window one; got \[\[10, 30\], \[10, 30\]\] and 0"),
        (dict(ids=np.zeros((20, 1), np.int32)), "at least 21 ids, got 20"),
        (dict(ids=np.zeros((30, 2), np.int32)), "at least 21 ids"),
        (dict(ids=np.zeros((60, 1), np.int32)), "1 to 64 positions, got 69"),
    ],
)
def test_a_chain_that_does_not_fit_is_refused(wrong, said):
    chain_of(3).check(SIZE)
    with pytest.raises(ValueError, match=said):
        replace(chain_of(3), **wrong).check(SIZE)


def test_windows_that_follow_are_checked_like_the_first():
    row = chain_of(3)
    with pytest.raises(ValueError, match="ids of heads must be 0 to 999, got -1"):
        replace(row, chain=replace(row.chain, heads=row.chain.heads * 0 - 1)).check(SIZE)
    for windows in ([[0, 30], [20, 30]], [[10, 0], [10, 30]]):
        with pytest.raises(ValueError, match="at least one token each and one before it"):
            replace(row, chain=replace(row.chain, windows=np.array(windows, np.int32))).check(SIZE)
    endless = replace(row.chain, windows=np.array([[10, 2**31 - 1], [10, 30]], np.int32))
    with pytest.raises(ValueError, match="window that follows must take at most 64 positions, got 2147483677"):
        replace(row, chain=endless).check(SIZE)
    longer = replace(row.chain, windows=np.array([[10, 30], [16, 30]], np.int32))
    with pytest.raises(ValueError, match="window that follows must take at most 64 positions, got 66"):
        replace(row, n_tokens=36, chain=longer).check(SIZE)
    with pytest.raises(ValueError, match=r"heads must be \[k, 21\], got \[2, 20\]"):
        Chain.of(row.chain.heads[:, 1:], row.chain.windows, LAYOUT)
    with pytest.raises(ValueError, match=r"windows must be \[2, 2\], tokens and history of each head's, got \[1, 2\]"):
        Chain.of(row.chain.heads, row.chain.windows[1:], LAYOUT)


# --- speech ----------------------------------------------------------------------------------------------------------


def offline(pipeline, voice, **schedule):
    """Audio [n], its tokens, and the calls that each stage had: (tokens wanted, windows)."""
    stages, speech = Counting(pipeline.stages), Speech()
    cut = replace(pipeline, stages=stages, schedule=replace(pipeline.schedule, **schedule))
    options = SpeechOptions.parse({"seed": 5, "streaming": False})
    audio = np.concatenate(
        list(cut.stream("Good morning to you all. The weather is fine today.", options, voice, 9, speech))
    )
    return audio, speech.history_prompt(), stages


class Counting:
    def __init__(self, stages):
        self._stages, self.n_semantic, self.n_coarse = stages, [], []

    def __getattr__(self, name):
        return getattr(self._stages, name)

    def semantic(self, prefix, n_tokens, *rest):
        self.n_semantic.append(n_tokens)
        return self._stages.semantic(prefix, n_tokens, *rest)

    def coarse(self, prefix, n_tokens, *rest):
        self.n_coarse.append(n_tokens)
        return self._stages.coarse(prefix, n_tokens, *rest)


@pytest.mark.parametrize("voice", [None, "heart_0"])
def test_offline_speech_is_two_long_calls_a_sentence_and_the_same_speech(pipeline, voices, voice):
    audio, said, stages = offline(pipeline, voices.get(voice), offline_coarse_windows=64, offline_semantic_call=768)
    expected_audio, expected, before = offline(pipeline, voices.get(voice))
    for name in ("semantic", "coarse", "fine"):
        np.testing.assert_array_equal(getattr(said, name), getattr(expected, name))
    np.testing.assert_allclose(audio, expected_audio, atol=1e-5)
    assert stages.n_semantic == [768, 768] and len(stages.n_coarse) == 2
    assert max(before.n_semantic) <= 64 and max(before.n_coarse) == 60 and len(before.n_coarse) > 4


def test_a_guard_looks_in_between_semantic_calls(pipeline, voices):
    cut = replace(
        pipeline, stages=Counting(pipeline.stages), schedule=replace(pipeline.schedule, offline_semantic_call=768)
    )
    options = SpeechOptions.parse({"seed": 5, "streaming": False, "guard": True})
    list(cut.stream("Good morning.", options, voices["heart_0"]))
    assert max(cut.stages.n_semantic) <= 64


def test_a_streams_windows_are_chained_after_its_first_audio(pipeline, voices):
    text = "This sentence is long enough to be sent in several chunks, each one longer than the one before."
    stages = Counting(pipeline.stages)
    schedule = replace(pipeline.schedule, coarse_windows=(3,), coarse_ahead=0, semantic_ahead=250)
    speech, expected = Speech(), Speech()
    options = SpeechOptions.parse({"seed": 1})
    chunks = replace(pipeline, stages=stages, schedule=schedule).stream(text, options, voices["heart_0"], speech=speech)
    next(chunks)
    assert max(stages.n_coarse) == 60
    list(chunks)
    assert max(stages.n_coarse) == 180
    list(pipeline.stream(text, options, voices["heart_0"], speech=expected))
    np.testing.assert_array_equal(speech.history_prompt().coarse, expected.history_prompt().coarse)


def test_a_released_streams_half_frame_is_no_error():
    """A chain that was left ends after its piece, in the middle of a frame, perhaps."""

    class Leaving:
        def coarse(self, prefix, n_tokens, position, sampling, stream, heads, windows):
            return LAYOUT.first_id + LAYOUT.codebook_size * (np.arange(7, dtype=np.int32) % 2)

    pieces = generate_coarse(Known(some_semantic(41), 99), None, LAYOUT, Sampling(), None, ALL, Leaving(), 3)
    assert next(pieces).shape == (2, 3)
