"""How much faster than Hugging Face's BarkModel on the same CPU? `python perf/compare_cpu.py [--url HOST:PORT]`

Both say the same text for the same number of semantic tokens, hence of coarse codes and of samples, in turns that
change order. Hugging Face: float32, all cores. Ours: in this process and, with --url, through a server.
Models: `nano` is the embedded checkpoint; `small` has Bark-small's sizes (12 x 12 x 768, Bark's vocabularies, codec
with 32 filters) and random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from machine import machine
from random_checkpoint import config, generation_config
from transformers import BarkConfig, BarkModel
from transformers.utils import logging

from barkstream.clients import Client
from barkstream.export.checkpoint import open_huggingface
from barkstream.export.write import export
from barkstream.local import open_pipeline
from barkstream.options import SpeechOptions
from barkstream.pipeline import Pipeline
from barkstream.voices import HistoryPrompt

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "checkpoints" / "nano-bark"
BUILD = ROOT / "build" / "compare"
TARGETS = {"nano": 5.0, "small": 3.0}
TEXT = "We walked along the river until the sun went down behind the hills, and then we slowly drove home again."
STAGES = ("semantic", "coarse", "fine", "codec")


@dataclass
class Timings:
    """Seconds of each run of one contender, in all and by stage."""

    total_s: list[float] = field(default_factory=list)
    stage_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    n_samples: int = 0

    def summary(self) -> dict[str, Any]:
        low, median, high = np.quantile(self.total_s, [0, 0.5, 1])
        stages = {f"{stage}_s": round(float(np.median(times)), 3) for stage, times in self.stage_s.items()}
        return dict(
            n=len(self.total_s),
            median_s=round(median, 3),
            min_s=round(low, 3),
            max_s=round(high, 3),
            audio_s=self.n_samples / 24_000,
            **stages,
        )


class StageClock:
    """Adds up the time spent in functions, by stage. Ours overlap, so their sum may exceed the whole."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, stage: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += perf_counter() - began

        setattr(owner, name, timed)


@dataclass
class Contender:
    name: str
    say: Callable[[int], int]  # seed -> samples said
    clock: StageClock = field(default_factory=StageClock)
    timings: Timings = field(default_factory=Timings)

    def run(self, seed: int, record: bool) -> None:
        self.clock.seconds.clear()
        began = perf_counter()
        n_samples = self.say(seed)
        elapsed = perf_counter() - began
        if record:
            self.timings.total_s.append(elapsed)
            self.timings.n_samples = n_samples
            for stage, seconds in self.clock.seconds.items():
                self.timings.stage_s[stage].append(seconds)


def hugging_face(checkpoint: Path, pipeline: Pipeline, voice: HistoryPrompt | None, n_semantic: int) -> Contender:
    """BarkModel with the end token held off until n_semantic tokens are there."""
    layout = pipeline.checkpoint.semantic
    model = BarkModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.from_numpy(pipeline.tokenizer.encode(TEXT).astype(np.int64))[None]
    mask = (ids != layout.text_pad).long()
    prompts = {"semantic": "semantic_prompt", "coarse": "coarse_prompt", "fine": "fine_prompt"}
    history = voice and {
        name: torch.from_numpy(getattr(voice, part).astype(np.int64)) for part, name in prompts.items()
    }
    limits = {"semantic_max_new_tokens": n_semantic, "semantic_min_new_tokens": n_semantic}

    def say(seed: int) -> int:
        torch.manual_seed(seed)
        return model.generate(
            input_ids=ids - layout.text_offset, attention_mask=mask, history_prompt=history, **limits
        ).shape[1]

    contender = Contender("Hugging Face, float32", say)
    for stage, owner in (
        ("semantic", model.semantic),
        ("coarse", model.coarse_acoustics),
        ("fine", model.fine_acoustics),
    ):
        contender.clock.watch(owner, "generate", stage)
    contender.clock.watch(model, "codec_decode", "codec")
    return contender


def ours(name: str, pipeline: Pipeline, voice: HistoryPrompt | None, n_semantic: int, streaming: bool) -> Contender:
    def say(seed: int) -> int:
        options = SpeechOptions(
            seed=seed, streaming=streaming, min_eos_p=1.0, max_seconds=seconds_of(n_semantic, pipeline)
        )
        return sum(map(len, pipeline.stream(TEXT, options, voice)))

    contender = Contender(name, say)
    for stage in STAGES:
        contender.clock.watch(pipeline.stages, stage, stage)
    return contender


def through_server(url: str, pipeline: Pipeline, voice: str, n_semantic: int) -> Contender:
    client = Client(url)
    options = {"voice": voice, "min_eos_p": 1.0, "max_seconds": seconds_of(n_semantic, pipeline)}
    return Contender("ours, streamed by the server", lambda seed: len(client.speak(TEXT, seed=seed, **options)))


def seconds_of(n_semantic: int, pipeline: Pipeline) -> float:
    """A max_seconds that lets through exactly n_semantic tokens."""
    return (n_semantic + 0.5) / pipeline.checkpoint.semantic.rate_hz


def race(contenders: list[Contender], n_repeats: int) -> None:
    """One warm-up each, then n_repeats rounds; the order turns round after every one."""
    for contender in contenders:
        contender.run(0, record=False)
    for repeat in range(n_repeats):
        for contender in contenders[:: 1 if repeat % 2 == 0 else -1]:
            contender.run(repeat, record=True)
            print(f"  {contender.name}: {contender.timings.total_s[-1]:.2f} s", file=sys.stderr, flush=True)
    lengths = {contender.name: contender.timings.n_samples for contender in contenders}
    assert len(set(lengths.values())) == 1, f"not the same length, choose other seeds: {lengths}"


# --- models ----------------------------------------------------------------------------------------------------------


def exported(checkpoint: Path, int8: bool = False) -> Path:
    """The checkpoint's model repository, written anew under build/."""
    repository = BUILD / (checkpoint.name + ("-int8" if int8 else "-float32"))
    export(open_huggingface(checkpoint), repository, int8, report=lambda line: None)
    return repository


def random_small() -> Path:
    """A Hugging Face checkpoint of suno/bark-small's sizes with random weights and nano-bark's tokenizer."""
    folder = BUILD / "bark-small-random"
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    parts = config("small")
    model = BarkModel(BarkConfig(**{**parts, "codec_config": {"model_type": "encodec"}}))  # EnCodec 24 kHz
    unfinished = folder.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    shutil.copy(NANO / "tokenizer.json", unfinished)
    (unfinished / "generation_config.json").write_text(json.dumps(generation_config(), indent=1))
    return unfinished.replace(folder)


# --- the run ---------------------------------------------------------------------------------------------------------


def compare_nano(seconds: float, n_repeats: int, url: str | None) -> list[Contender]:
    repository = exported(NANO)
    pipeline, voices = open_pipeline(repository)
    int8, _ = open_pipeline(exported(NANO, int8=True))
    voice = sorted(voices)[0]
    n_semantic = ceil(seconds * pipeline.checkpoint.semantic.rate_hz)
    contenders = [
        hugging_face(NANO, pipeline, voices[voice], n_semantic),
        ours("ours, offline", open_pipeline(repository)[0], voices[voice], n_semantic, streaming=False),
        ours("ours, streamed", pipeline, voices[voice], n_semantic, streaming=True),
        ours("ours, 8-bit weights, streamed", int8, voices[voice], n_semantic, streaming=True),
    ]
    if url:
        contenders.append(through_server(url, pipeline, voice, n_semantic))
    race(contenders, n_repeats)
    return contenders


def compare_small(seconds: float, n_repeats: int) -> list[Contender]:
    checkpoint = random_small()
    pipeline, _ = open_pipeline(exported(checkpoint))
    n_semantic = ceil(seconds * pipeline.checkpoint.semantic.rate_hz)
    contenders = [
        hugging_face(checkpoint, pipeline, None, n_semantic),
        ours("ours, float32, streamed", pipeline, None, n_semantic, streaming=True),
        ours(
            "ours, 8-bit weights, streamed",
            open_pipeline(exported(checkpoint, int8=True))[0],
            None,
            n_semantic,
            streaming=True,
        ),
    ]
    race(contenders, n_repeats)
    return contenders


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    result: dict[str, Any] = {}
    if "nano" in options.models:
        result["nano"] = report("nano", compare_nano(options.seconds, options.repeats, options.url))
    if "small" in options.models:
        result["small"] = report("small", compare_small(options.small_seconds, options.repeats))
    result["machine"] = machine("onnxruntime", "torch", "transformers")
    print(json.dumps(result))
    return 0


def report(model: str, contenders: list[Contender]) -> dict[str, Any]:
    """Prints the table of one model; the same as data."""
    rows = {contender.name: contender.timings.summary() for contender in contenders}
    reference = next(iter(rows.values()))["median_s"]
    print(f"\n{model}: {contenders[0].timings.n_samples / 24_000:.2f} s of audio; target {TARGETS[model]:g}x")
    print(
        "| who | median s (min-max) | times faster | RTF | semantic s | coarse s | fine s | codec s |\n|" + " --- |" * 8
    )
    for name, row in rows.items():
        row["times_faster"] = round(reference / row["median_s"], 2)
        row["rtf"] = round(row["median_s"] / row["audio_s"], 3)
        stages = " | ".join(f"{row[f'{stage}_s']:.2f}" if f"{stage}_s" in row else "" for stage in STAGES)
        total = f"{row['median_s']:.2f} ({row['min_s']:.2f}-{row['max_s']:.2f})"
        print(f"| {name} | {total} | {row['times_faster']:.1f} | {row['rtf']:.2f} | {stages} |")
    return {"target_times_faster": TARGETS[model], "contenders": rows}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--url", help="a running server that serves nano-bark, such as 127.0.0.1:8001")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of speech, nano-bark")
    parser.add_argument("--small-seconds", type=float, default=1.5, help="of speech, Bark-small's sizes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
