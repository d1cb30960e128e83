"""Streaming changes when audio arrives, not what is said. In this process, on the embedded checkpoint; no server."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_stages import FakeStages

from barkstream.coarse import generate_coarse
from barkstream.engines import Row
from barkstream.engines.open import prefix_lengths
from barkstream.fine import generate_fine
from barkstream.local import LocalStages
from barkstream.options import BadRequest, SpeechOptions
from barkstream.pipeline import NothingSaid, Pipeline, Slots, Speech
from barkstream.sampling import Sampling

TEXT = "Good morning, how are you today?"


def generate(pipeline, voice=None, schedule=None, text=TEXT, **options):
    """Audio [n] and the speech that it came from."""
    speech = Speech()
    cut = pipeline if schedule is None else replace(pipeline, schedule=replace(pipeline.schedule, **schedule))
    chunks = list(cut.stream(text, SpeechOptions.parse({"seed": 5, **options}), voice, stream=9, speech=speech))
    return np.concatenate(chunks), speech.history_prompt()


@pytest.mark.parametrize("voice", [None, "heart_0"])
def test_streamed_semantic_and_coarse_tokens_equal_the_offline_ones(pipeline, voices, voice):
    _, streamed = generate(pipeline, voices.get(voice))
    _, offline = generate(pipeline, voices.get(voice), streaming=False)
    np.testing.assert_array_equal(streamed.semantic, offline.semantic)
    np.testing.assert_array_equal(streamed.coarse, offline.coarse)
    assert streamed.fine.shape == offline.fine.shape


@pytest.mark.parametrize(
    "cut", [dict(coarse_call=14), dict(semantic_call=5, semantic_ahead=0), dict(semantic_ahead=50)]
)
def test_any_cut_into_calls_gives_the_same_tokens(pipeline, voices, cut):
    audio, speech = generate(pipeline, voices["deep_0"], cut)
    expected_audio, expected = generate(pipeline, voices["deep_0"])
    np.testing.assert_array_equal(speech.semantic, expected.semantic)
    np.testing.assert_array_equal(speech.coarse, expected.coarse)
    np.testing.assert_array_equal(speech.fine, expected.fine)
    np.testing.assert_allclose(audio, expected_audio, atol=1e-5)


def test_one_chunk_with_everything_known_is_one_fine_window(pipeline, voices):
    """Chunks are an approximation of fine's window only through context and look-ahead: give it all, and cuts vanish."""
    stages, layout = pipeline.stages, pipeline.checkpoint.fine
    coarse = voices["heart_0"].coarse[:, :120]
    whole = replace(pipeline.schedule, chunk_frames=(120,), fine_lookahead=(0,))
    late = replace(pipeline.schedule, chunk_frames=(200,), fine_lookahead=(500,))
    a = np.concatenate(list(generate_fine(iter([coarse]), None, layout, 1, 0.5, whole, stages)), axis=1)
    b = np.concatenate(
        list(generate_fine(iter([coarse[:, :50], coarse[:, 50:]]), None, layout, 1, 0.5, late, stages)), axis=1
    )
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[:2], coarse)


class CountingFill:
    """A fine stage that fills with the number of frames that a frame's window has from it on, and remembers its windows."""

    def __init__(self):
        self.windows = []  # (frames known before, frames from there on)

    def fine(self, codes, fill_from, uniforms, temperature):
        n_ahead = codes.shape[1] - np.arange(codes.shape[1])
        self.windows.append((fill_from, codes.shape[1] - fill_from))
        filled = codes.copy()
        filled[2:, fill_from:] = n_ahead[fill_from:]
        return filled


def fill(pipeline, schedule, coarse, n_piece, stages=None):
    """Codes [8, t], the windows that were filled, and for each chunk how many pieces of coarse codes had been taken."""
    stages = stages or CountingFill()
    n_taken, taken, codes = 0, [], []

    def pieces():
        nonlocal n_taken
        for a in range(0, coarse.shape[1], n_piece):
            n_taken += 1
            yield coarse[:, a : a + n_piece]

    for chunk in generate_fine(pieces(), None, pipeline.checkpoint.fine, 1, 0.5, schedule, stages):
        codes.append(chunk)
        taken.append(n_taken)
    return np.concatenate(codes, axis=1), stages.windows, taken


def test_every_chunk_has_its_own_lookahead_and_waits_for_no_more(pipeline, voices):
    coarse = np.tile(voices["heart_0"].coarse, 3)[:, :300]
    schedule = replace(pipeline.schedule, chunk_frames=(24, 30, 60), fine_lookahead=(6, 36, 66, 12), fine_context=40)
    codes, windows, taken = fill(pipeline, schedule, coarse, n_piece=6)
    assert windows == [(0, 24 + 6), (24, 30 + 36), (40, 60 + 66), (40, 60 + 12), (40, 60 + 12), (40, 60 + 6), (40, 6)]
    assert [n * 6 for n in taken] == [30, 90, 180, 186, 246, 300, 300]
    np.testing.assert_array_equal(codes[:2], coarse)
    assert codes[2, :24].min() == 6 + 1 and codes[2, 24:54].min() == 36 + 1  # a look-ahead's frames were filled anew


def test_short_windows_get_more_context_then_unknown_frames(pipeline, voices):
    """Unknown frames behind are what the reference's windows end in."""
    coarse = np.tile(voices["heart_0"].coarse, 3)[:, :200]
    schedule = replace(
        pipeline.schedule, chunk_frames=(24, 60), fine_lookahead=(6, 36), fine_context=40, fine_window=140
    )
    seen = []

    class Filling(CountingFill):
        def fine(self, codes, fill_from, uniforms, temperature):
            seen.append((codes, uniforms.shape[1]))
            return super().fine(codes, fill_from, uniforms, temperature)

    codes, windows, _ = fill(pipeline, schedule, coarse, n_piece=10, stages=Filling())
    assert windows == [(0, 140), (24, 116), (44, 96), (44, 96)]
    assert codes.shape == (8, 200)
    for (window, n_draws), n_real in zip(seen, [30, 120, 140, 44 + 56], strict=True):
        assert n_draws == window.shape[1]
        assert (window[:, n_real:] == pipeline.checkpoint.fine.unknown).all()
        assert (window[:2, :n_real] != pipeline.checkpoint.fine.unknown).all()


@pytest.mark.parametrize("n_piece", [1, 30, 300])
def test_a_chunk_sees_the_same_however_much_has_come(pipeline, voices, n_piece):
    """A look-ahead that shrinks leaves more known than the next chunk may see: under load it must not see it either."""
    coarse = np.tile(voices["heart_0"].coarse, 3)[:, :300]
    schedule = replace(pipeline.schedule, chunk_frames=(24, 30), fine_lookahead=(6, 96, 0, 36))
    codes, windows, _ = fill(pipeline, schedule, coarse, n_piece)
    expected, expected_windows, _ = fill(pipeline, schedule, coarse, n_piece=7)
    assert windows == expected_windows
    np.testing.assert_array_equal(codes, expected)


def test_the_second_window_is_under_way_while_the_first_chunk_is_held(pipeline, voices):
    """Not before that chunk is made, and not only when somebody asks for the next one."""
    positions, is_second = [], threading.Event()

    class Watched(FakeStages):
        def coarse(self, prefix, n_tokens, position, *more):
            positions.append(position)
            if position == 60:
                is_second.set()
            return super().coarse(prefix, n_tokens, position, *more)

        def codec(self, codes, state):
            if positions == [0]:
                assert not is_second.wait(0.1)
            return super().codec(codes, state)

    schedule = replace(
        pipeline.schedule, ahead_at_once=False, coarse_ahead=1, chunk_frames=(29, 60), fine_lookahead=(1,)
    )
    cut = replace(pipeline, stages=Watched(pipeline.checkpoint), schedule=schedule)
    chunks = cut.stream(TEXT, SpeechOptions.parse({"seed": 5}), voices["heart_0"])
    next(chunks)
    assert is_second.wait(10)
    chunks.close()


@pytest.mark.parametrize("is_crowd", [False, True])
def test_in_a_crowd_semantic_tokens_go_ahead_behind_the_first_window(pipeline, voices, is_crowd):
    """And the second window still waits for the first chunk. The samples are the same."""
    calls, decoded, is_ahead = [], [], threading.Event()

    class Watched(FakeStages):
        def semantic(self, prefix, n_tokens, position, *more):
            calls.append(("semantic", position > 0))
            if position:
                is_ahead.set()
            return super().semantic(prefix, n_tokens, position, *more)

        def coarse(self, *more):
            calls.append(("coarse", None))
            return super().coarse(*more)

        def codec(self, codes, state):
            if not decoded:
                assert is_ahead.wait(10 if is_crowd else 0.1) is is_crowd
                assert calls == [("semantic", False), ("coarse", None)] + [("semantic", True)] * is_crowd
            decoded.append(codes)
            return super().codec(codes, state)

    schedule = replace(
        pipeline.schedule, ahead_at_once=False, coarse_ahead=1, chunk_frames=(29, 60), fine_lookahead=(1,)
    )
    options = SpeechOptions.parse({"seed": 5})
    alone = replace(pipeline, stages=FakeStages(pipeline.checkpoint), schedule=schedule)
    cut = replace(pipeline, stages=Watched(pipeline.checkpoint), schedule=schedule.in_crowd() if is_crowd else schedule)
    chunks = list(cut.stream(TEXT, options, voices["heart_0"]))
    np.testing.assert_array_equal(
        np.concatenate(chunks), np.concatenate(list(alone.stream(TEXT, options, voices["heart_0"])))
    )


def test_chunks_grow_as_scheduled(pipeline, voices):
    text = "This sentence is long enough to be sent in several chunks, each one longer than the one before."
    samples_per_frame = pipeline.checkpoint.codec.samples_per_frame
    chunks = list(pipeline.stream(text, SpeechOptions.parse({"seed": 1}), voices["heart_0"]))
    sizes = [len(chunk) / samples_per_frame for chunk in chunks]
    assert sizes[:-1] == [pipeline.schedule.chunk(i) for i in range(len(sizes) - 1)]
    assert len(sizes) >= 3


def test_speak_is_the_stream_joined(pipeline, voices):
    options = SpeechOptions.parse({"seed": 2})
    streamed = np.concatenate(list(pipeline.stream(TEXT, options, voices["heart_1"])))
    np.testing.assert_array_equal(pipeline.speak(TEXT, options, voices["heart_1"]), streamed)


def test_a_first_sentence_without_a_preset_becomes_the_voice_of_the_rest(pipeline):
    text = "Good morning to you all. " + "The weather is fine today."
    _, whole = generate(pipeline, text=text)
    _, first = generate(pipeline, text="Good morning to you all.")
    np.testing.assert_array_equal(whole.semantic[: len(first.semantic)], first.semantic)
    seen = []
    spying = Spy(pipeline.stages, lambda prefix: seen.append(prefix))
    list(replace(pipeline, stages=spying).stream(text, SpeechOptions.parse({"seed": 5})))
    layout = pipeline.checkpoint.semantic
    histories = {tuple(prefix[layout.n_text : 2 * layout.n_text]) for prefix in seen}
    padded = np.full(layout.n_text, layout.history_pad)
    padded[: len(first.semantic)] = first.semantic[-layout.n_text :]
    assert tuple(padded) in histories
    assert len(histories) == 2


class Spy:
    """Stages that show the semantic prefixes they are asked with."""

    def __init__(self, stages, see):
        self._stages, self._see = stages, see

    def __getattr__(self, name):
        return getattr(self._stages, name)

    def semantic(self, prefix, *rest):
        self._see(prefix)
        return self._stages.semantic(prefix, *rest)


def test_max_seconds_bounds_the_whole_text(pipeline, voices):
    audio, _ = generate(
        pipeline,
        voices["heart_0"],
        max_seconds=0.5,
        text="A sentence that is longer than that. And another one of them.",
    )
    assert 0.4 < len(audio) / pipeline.checkpoint.codec.sample_rate <= 0.5


def test_a_lower_lookahead_asks_for_fewer_semantic_tokens(pipeline, voices):
    wanted = []

    class Counting(Spy):
        def semantic(self, prefix, n_tokens, position, *rest):
            wanted.append(position + n_tokens)
            return self._stages.semantic(prefix, n_tokens, position, *rest)

    def first_calls(**options):
        wanted.clear()
        cut = replace(
            pipeline, stages=Counting(pipeline.stages, None), schedule=replace(pipeline.schedule, semantic_ahead=0)
        )
        stream = cut.stream(TEXT, SpeechOptions.parse({"seed": 5, **options}), voices["heart_0"])
        next(stream)
        stream.close()
        return wanted[0]

    assert first_calls(lookahead=0) < first_calls() == 47


def test_an_empty_generation_is_an_error_not_silence(pipeline):
    class Mute(Spy):
        def semantic(self, *call):
            return np.zeros(0, np.int32), True

    with pytest.raises(NothingSaid, match="another seed"):
        list(replace(pipeline, stages=Mute(pipeline.stages, None)).stream(TEXT, SpeechOptions.parse({})))


def test_leaving_a_stream_frees_its_slots(pipeline, voices):
    stages = pipeline.stages
    stream = pipeline.stream(TEXT, SpeechOptions.parse({"seed": 5}), voices["heart_0"], stream=77)
    next(stream)
    assert stages.semantic_engine.n_owned_slots == 1
    stream.close()
    assert stages.semantic_engine.n_owned_slots == stages.coarse_engine.n_owned_slots == 0


class Freeing(Spy):
    """Stages that remember when a stream's slots were freed; `free` is called each time."""

    def __init__(self, stages, free=lambda: None):
        super().__init__(stages, None)
        self.order, self.freed, self._free = [], threading.Event(), free

    def semantic(self, prefix, n_tokens, position, *rest):
        self.order += ["sentence"] * (position == 0)
        return self._stages.semantic(prefix, n_tokens, position, *rest)

    def release(self, stream):
        self._free()
        self._stages.release(stream)
        self.order.append("freed")
        self.freed.set()


@pytest.mark.parametrize("streaming", [True, False])
def test_slots_are_freed_while_the_last_chunk_is_decoded_and_not_before_the_last_sentence(pipeline, voices, streaming):
    stages = Freeing(pipeline.stages)

    def codec(codes, state):
        stages.order.append("codec")
        if stages.order.count("sentence") == 2 and not streaming:
            assert stages.freed.wait(timeout=10)
        return pipeline.stages.codec(codes, state)

    stages.codec = codec
    options = SpeechOptions.parse({"seed": 5, "streaming": streaming})
    text = "Good morning to you all. The weather is fine today."
    list(replace(pipeline, stages=stages).stream(text, options, voices["heart_0"], stream=9))
    assert stages.order.count("freed") == 1 and stages.order.count("sentence") == 2
    assert stages.order.index("freed") > len(stages.order) - 1 - stages.order[::-1].index("sentence")
    assert pipeline.stages.semantic_engine.n_owned_slots == pipeline.stages.coarse_engine.n_owned_slots == 0


def test_slots_that_could_not_be_freed_in_time_are_freed_at_the_end(pipeline, voices):
    failures = [RuntimeError("the stage is away")]

    def free():
        if failures:
            raise failures.pop()

    stages = Freeing(pipeline.stages, free)
    list(replace(pipeline, stages=stages).stream(TEXT, SpeechOptions.parse({"seed": 5}), voices["heart_0"], stream=9))
    assert not failures and stages.order.count("freed") == 1


def test_slots_that_are_taken_again_are_freed_again(pipeline):
    """By a guard's next try, whose listener may leave before its own slots are freed early."""
    stages = Freeing(pipeline.stages)
    slots = Slots(stages, 9)
    with ThreadPoolExecutor(1) as worker:
        slots.free_soon(worker)
        assert slots.take() == 9
    slots.free()
    assert stages.order == ["freed", "freed"]


def test_another_try_takes_slots_anew_and_they_are_freed_too(pipeline, voices):
    """The first one's codec gives silence, found when its slots were freed."""
    stages = Freeing(pipeline.stages)

    def codec(codes, state):
        audio, state = pipeline.stages.codec(codes, state)
        return audio * (stages.order.count("sentence") > 1), state

    stages.codec = codec
    options = SpeechOptions.parse({"seed": 5, "guard": True, "streaming": False})
    list(replace(pipeline, stages=stages).stream("Good morning.", options, voices["heart_0"], stream=9))
    assert stages.order == ["sentence", "freed"] * stages.order.count("sentence") and len(stages.order) > 2
    assert pipeline.stages.semantic_engine.n_owned_slots == pipeline.stages.coarse_engine.n_owned_slots == 0


def test_a_failing_stage_reaches_the_caller_and_frees_the_slots(pipeline, voices):
    class Broken(Spy):
        def coarse(self, *call):
            raise RuntimeError("coarse is broken")

    broken = replace(pipeline, stages=Broken(pipeline.stages, lambda prefix: None))
    with pytest.raises(RuntimeError, match="coarse is broken"):
        list(broken.stream(TEXT, SpeechOptions.parse({}), voices["heart_0"], stream=5))
    assert pipeline.stages.semantic_engine.n_owned_slots == 0


def test_blank_text_is_refused_before_any_work(pipeline):
    with pytest.raises(BadRequest, match="blank"):
        next(pipeline.stream("  ", SpeechOptions.parse({})))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(chunk_frames=(3,)), "first chunk must have at least 7 frames"),
        (dict(coarse_call=7), "coarse_call must be a multiple of 2"),
        (dict(sliding_window_len=(0, 61)), "sliding_window_len must be multiples of 2 below 690, .* got 61"),
        (dict(sliding_window_len=(690,)), "room for history before a window; got 690"),
        (
            dict(chunk_frames=(24, 300), fine_context=512, fine_lookahead=(6, 96, 213)),
            r"fine stage's window of 1024 frames; chunk 2 takes 512 \+ 300 \+ 213 = 1025",
        ),
        (dict(fine_window=1025), "fine_window must be at most the fine stage's 1024 frames, got 1025"),
    ],
)
def test_a_schedule_that_the_stages_cannot_follow_is_refused(pipeline, wrong, said):
    with pytest.raises(ValueError, match=said):
        Pipeline(pipeline.checkpoint, pipeline.tokenizer, pipeline.stages, replace(pipeline.schedule, **wrong))


def test_a_window_as_wide_as_the_model_is_allowed(pipeline):
    replace(pipeline.schedule, chunk_frames=(24, 300), fine_context=512, fine_lookahead=(6, 212)).check(
        pipeline.checkpoint
    )


# --- the engine's batches --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched(repository):
    return LocalStages(repository, n_slots=4, max_batch=4)


def rows_of(checkpoint, streams=(0, 0, 0, 0, 0)):
    """Coarse rows of different lengths, positions, temperatures and wishes."""
    layout, rng = checkpoint.coarse, np.random.default_rng(3)
    lengths, wishes, temperatures = (300, 257, 471, 260, 333), (6, 9, 1, 12, 4), (0.7, 0.0, 1.0, 0.7, 0.5)
    return [
        Row(
            rng.integers(0, layout.first_id, (n, 1)).astype(np.int32),
            wish,
            2 * i,
            Sampling(seed=i, temperature=t),
            stream,
        )
        for i, (n, wish, t, stream) in enumerate(zip(lengths, wishes, temperatures, streams, strict=True))
    ]


def test_rows_say_the_same_alone_and_in_a_batch(batched):
    rows = rows_of(batched.checkpoint)
    together = batched.coarse_engine.generate(rows)
    for row, generation in zip(rows, together, strict=True):
        np.testing.assert_array_equal(generation.tokens, batched.coarse_engine.generate([row])[0].tokens)
        assert len(generation.tokens) == row.n_tokens


def test_a_kept_cache_and_a_lost_one_give_the_same_tokens(batched):
    engine = batched.coarse_engine
    for row in rows_of(batched.checkpoint, streams=(1, 2, 3, 4, 5)):  # five streams, four slots: one is always lost
        engine.generate([row])
    for row in rows_of(batched.checkpoint):
        first = engine.generate([row])[0].tokens
        longer = np.concatenate([row.ids, first[:, None]])
        rest = Row(longer, 5, row.position + len(first), row.sampling, stream=0)
        known = engine.generate([replace(row, stream=8)])[0].tokens
        np.testing.assert_array_equal(known, first)
        np.testing.assert_array_equal(
            engine.generate([replace(rest, stream=8)])[0].tokens, engine.generate([rest])[0].tokens
        )
    assert engine.n_owned_slots <= 4


def test_a_cache_is_never_trusted_for_another_prefix(batched):
    engine, row = batched.coarse_engine, rows_of(batched.checkpoint)[0]
    other = replace(row, ids=row.ids[::-1].copy(), stream=8)
    engine.generate([replace(row, stream=8)])
    np.testing.assert_array_equal(
        engine.generate([other])[0].tokens, engine.generate([replace(other, stream=0)])[0].tokens
    )


def test_the_unused_tail_of_a_cache_is_never_read(batched):
    engine, rows = batched.coarse_engine, rows_of(batched.checkpoint)[:4]
    clean = [generation.tokens for generation in engine.generate(rows)]
    for slot in engine._slots._free:
        slot.ids = slot.ids[:0]
        slot.cache.keys_values[:] = 1e4
    engine._shared[:] = 1e4
    for before, after in zip(clean, engine.generate(rows), strict=True):
        np.testing.assert_array_equal(before, after.tokens)


@pytest.mark.parametrize(
    ("ids", "n_tokens"), [(np.full((10, 1), 10**6, np.int32), 1), (np.zeros((1000, 1), np.int32), 60)]
)
def test_a_row_that_does_not_fit_is_refused(batched, ids, n_tokens):
    with pytest.raises(ValueError, match="must"):
        batched.coarse_engine.generate([Row(ids, n_tokens, 0, Sampling())])


@pytest.mark.parametrize("voice", [None, "heart_0"])
def test_every_windows_prefix_is_one_that_engines_warm_up(pipeline, voices, voice):
    """Else its graph would be captured while listeners wait."""
    step = pytest.importorskip("barkstream.engines.kernels.batched").PREFILL_STEP
    lengths, layout = [], pipeline.checkpoint.coarse

    class Counting:
        def coarse(self, prefix, n_tokens, position, sampling, stream, heads, windows):
            lengths.append(len(prefix) - 1)
            return np.zeros(n_tokens, np.int32)

    known = SimpleNamespace(tokens=np.zeros(600, np.int32), ensure=lambda n: None, has=lambda n: True)
    history = voices[voice] if voice else None
    list(generate_coarse(known, history, layout, Sampling(), None, pipeline.schedule, Counting(), 0))
    used, warm = ({-(-n // step) for n in each} for each in (lengths, prefix_lengths("coarse", pipeline.checkpoint)))
    assert len(lengths) > 20 and used <= warm and (voice or used == warm)
