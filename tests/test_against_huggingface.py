"""Our stages on nano-bark against transformers' BarkModel with the same checkpoint.

Tokens at temperature 0 are the same, samples are equal to 1e-4.

Hugging Face draws with top_k 50 and has no min_eos_p unless asked; both are without effect at temperature 0.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from oracles import assert_like
from transformers import BarkModel, BarkProcessor
from transformers.models.bark.generation_configuration_bark import (
    BarkCoarseGenerationConfig,
    BarkFineGenerationConfig,
    BarkSemanticGenerationConfig,
)

from barkstream.coarse import generate_coarse
from barkstream.export.checkpoint import open_huggingface
from barkstream.export.write import export
from barkstream.fine import fill_offline
from barkstream.local import LocalStages, open_pipeline
from barkstream.options import Schedule, SpeechOptions
from barkstream.pipeline import Pipeline
from barkstream.sampling import Ints, Sampling
from barkstream.semantic import SemanticTokens, semantic_prompt
from barkstream.voices import HistoryPrompt

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "nano-bark"
SENTENCES = Path(__file__).resolve().parents[1] / "perf" / "sentences.txt"
GREEDY = Sampling(temperature=0)
VOICES = [None, "heart_0", "deep_1"]


@pytest.fixture(scope="module")
def reference() -> SimpleNamespace:
    """The BarkModel (float32), its processor and its stages' generation configs."""
    model = BarkModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    config = model.generation_config
    configs = {
        "semantic_generation_config": BarkSemanticGenerationConfig(**config.semantic_config),
        "coarse_generation_config": BarkCoarseGenerationConfig(**config.coarse_acoustics_config),
        "fine_generation_config": BarkFineGenerationConfig(**config.fine_acoustics_config),
    }
    return SimpleNamespace(model=model, processor=BarkProcessor.from_pretrained(CHECKPOINT), configs=configs)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, dict[str, HistoryPrompt]]:
    repository = tmp_path_factory.mktemp("nano-bark")
    export(open_huggingface(CHECKPOINT), repository)
    return open_pipeline(repository)


@pytest.fixture(scope="module")
def stages(exported: tuple[Pipeline, dict[str, HistoryPrompt]]) -> LocalStages:
    return exported[0].stages


def inputs(reference: SimpleNamespace, text: str, voice: str | None) -> dict:
    return dict(reference.processor(text, voice_preset=voice))


TEXTS = [
    "Hello, my dog is cute.",
    "  white \t space\nand a new line ",
    "UPPER case, Ünïcödé, naïve café; 12,345.67 & 50% — “quoted” …",
    "你好 世界 😀 [laughs] ♪ la la ♪",
    "word " * 100,
    "a" * 300,
]


@pytest.mark.parametrize("text", [*TEXTS, *SENTENCES.read_text().splitlines()])
def test_text_ids_are_the_processors(reference: SimpleNamespace, exported: tuple, text: str) -> None:
    layout = exported[0].checkpoint.semantic
    theirs = reference.processor(text)
    ids = torch.where(theirs["attention_mask"].bool(), theirs["input_ids"] + layout.text_offset, layout.text_pad)
    assert exported[0].tokenizer.encode(text).tolist() == ids[0, : layout.n_text].tolist()  # BarkModel cuts them there


@pytest.mark.parametrize("voice", VOICES)
def test_semantic_tokens_are_hugging_faces(reference: SimpleNamespace, exported: tuple, voice: str | None) -> None:
    pipeline, voices = exported
    text, layout = "Hello, my dog is cute.", pipeline.checkpoint.semantic
    theirs = reference.model.semantic.generate(
        **inputs(reference, text, voice),
        semantic_generation_config=reference.configs["semantic_generation_config"],
        do_sample=False,
    )[0].tolist()
    theirs = theirs[: theirs.index(layout.end)] if layout.end in theirs else theirs
    prompt = semantic_prompt(pipeline.tokenizer.encode(text), voices.get(voice), layout)
    with ThreadPoolExecutor(1) as background:
        ours = SemanticTokens(prompt, layout, GREEDY, np.inf, Schedule(), pipeline.stages, 0, background)
        ours.ensure(layout.max_new_tokens)
    assert len(theirs) > 40
    assert_like(ours.tokens, np.array(theirs))


@pytest.mark.parametrize("voice", VOICES)
def test_coarse_codes_are_hugging_faces(reference: SimpleNamespace, exported: tuple, voice: str | None) -> None:
    pipeline, voices = exported
    semantic = voices["heart_1"].semantic[-70:]  # 210 coarse tokens: four windows, the last one short
    ours = our_coarse(pipeline, semantic, voices.get(voice))
    theirs = hugging_face_coarse(reference, semantic, voice)
    assert_like(ours.T.ravel(), theirs.T.ravel())


def our_coarse(pipeline: Pipeline, semantic: Ints, history: HistoryPrompt | None) -> Ints:
    known = SimpleNamespace(tokens=semantic, ended=True, ensure=lambda n: None)
    pieces = generate_coarse(known, history, pipeline.checkpoint.coarse, GREEDY, None, Schedule(), pipeline.stages, 0)
    return np.concatenate(list(pieces), axis=1)


def hugging_face_coarse(reference: SimpleNamespace, semantic: Ints, voice: str | None) -> np.ndarray:
    """Codes [2, t]"""
    configs = reference.configs
    tokens = reference.model.coarse_acoustics.generate(
        torch.from_numpy(semantic.astype(np.int64))[None],
        history_prompt=inputs(reference, "x", voice).get("history_prompt"),
        semantic_generation_config=configs["semantic_generation_config"],
        coarse_generation_config=configs["coarse_generation_config"],
        codebook_size=reference.model.generation_config.codebook_size,
        do_sample=False,
    )[0]
    codes = tokens.reshape(-1, 2).T - configs["semantic_generation_config"].semantic_vocab_size
    return torch.remainder(codes, reference.model.generation_config.codebook_size).numpy()


@pytest.mark.parametrize(("voice", "n_frames"), [(None, 200), ("heart_0", 200), (None, 1100), ("deep_1", 1300)])
def test_fine_codes_are_hugging_faces(
    reference: SimpleNamespace, exported: tuple, voice: str | None, n_frames: int
) -> None:
    pipeline, voices = exported
    layout = pipeline.checkpoint.fine
    coarse = np.tile(voices["heart_1"].coarse, 8)[:, :n_frames]
    theirs = hugging_face_fine(reference, pipeline, coarse, voice)
    ours = fill_offline(coarse, voices.get(voice), layout, 0, 0.0, pipeline.stages)
    assert_like(ours, theirs, most_different=ours.size // 1000)


def hugging_face_fine(reference: SimpleNamespace, pipeline: Pipeline, coarse: Ints, voice: str | None) -> np.ndarray:
    """Codes [8, t], drawn by argmax: that is what temperature 1 means in transformers."""
    layout = pipeline.checkpoint.coarse
    ids = coarse + layout.first_id + layout.codebook_size * np.arange(2)[:, None]
    codes = reference.model.fine_acoustics.generate(
        torch.from_numpy(ids.T.reshape(1, -1).astype(np.int64)),
        history_prompt=inputs(reference, "x", voice).get("history_prompt"),
        codebook_size=layout.codebook_size,
        temperature=1.0,
        **reference.configs,
    )
    return codes[0].numpy()


@pytest.mark.parametrize("n_frames", [1, 2, 7, 400])
def test_samples_are_hugging_faces(reference: SimpleNamespace, stages: LocalStages, n_frames: int) -> None:
    codes = np.random.default_rng(n_frames).integers(0, 1024, (8, n_frames)).astype(np.int32)
    with torch.no_grad():
        theirs = reference.model.codec_decode(torch.from_numpy(codes)[None].long())[0].numpy()
    ours, _ = stages.codec(codes, stages.codec_state())
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4


def test_text_to_samples_is_hugging_faces(reference: SimpleNamespace, exported: tuple) -> None:
    """The whole pipeline at temperature 0, in one call on both sides."""
    pipeline, voices = exported
    text = "Good morning."
    theirs = reference.model.generate(**inputs(reference, text, "heart_0"), do_sample=False, fine_temperature=None)[
        0
    ].numpy()
    options = SpeechOptions(temperature=0, fine_temperature=0, min_eos_p=1, streaming=False)
    ours = pipeline.speak(text, options, voices["heart_0"])
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3
