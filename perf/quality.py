"""Is our speech as good as the reference's, and is streamed speech as good as offline speech? `make quality`.

30 sentences that are not in nano-bark's training text, voices alternating, said by
  (a) Hugging Face's BarkModel, its own settings (temperatures .7/.7/.5, its default top_k 50, no min_eos_p), float32;
  (b) ours offline: the reference's schedule, one chunk; (c) ours streamed: the default chunks. Same seeds, so (b)
      and (c) have the same semantic and coarse tokens and differ only in codebooks 2 to 7;
  (d) ours offline with Hugging Face's settings, so that (a) and (d) differ only by their random numbers;
  (e) ours offline with 8-bit weights (`barkstream export --int8`).
Each clip is written down by Whisper tiny.en (word and character errors) and rated by DNSMOS. Fails if streamed is worse
than offline by more than reseeding explains, or if chunk boundaries show in the audio.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from boundaries import boundary_report
from listening import Audio, Clip, Listener, Score
from machine import machine

from barkstream.export.checkpoint import open_huggingface
from barkstream.export.write import export
from barkstream.local import open_pipeline
from barkstream.options import SpeechOptions
from barkstream.pipeline import Pipeline
from barkstream.voices import HistoryPrompt

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ROOT / "perf" / "sentences.txt"
RESULTS = ROOT / "perf" / "results" / "quality.json"
CACHE = ROOT / "build" / "quality"  # Hugging Face's audio: minutes to make
METRICS = {"wer": "lower", "cer": "lower", "ovrl": "higher", "sig": "higher", "bak": "higher", "p808": "higher"}
JUDGED = ("wer", "cer", "ovrl")

OFFLINE, STREAMED = "ours, offline, float32", "ours, streamed, float32"
INT8 = "ours, offline, 8-bit weights"
HUGGING_FACE, LIKE_THEM = "Hugging Face", "ours, float32, their settings"


# --- who speaks ------------------------------------------------------------------------------------------------------


@dataclass
class Speakers:
    """Says sentence i in a voice of its own: voices take turns."""

    sentences: list[str]
    pipeline: Pipeline
    voices: dict[str, HistoryPrompt]
    checkpoint: Path

    def voice(self, sentence: int) -> str:
        return sorted(self.voices)[sentence % len(self.voices)]

    def ours(self, condition: str, seed: int, pipeline: Pipeline | None = None, **options: Any) -> Iterable[Clip]:
        pipeline = pipeline or self.pipeline
        for i, text in enumerate(self.sentences):
            given = SpeechOptions(seed=seed_of(seed, i), **options)
            chunks = list(pipeline.stream(text, given, self.voices[self.voice(i)]))
            boundaries = np.cumsum([len(chunk) for chunk in chunks])[:-1].tolist()
            yield Clip(condition, seed, i, text, np.concatenate(chunks), boundaries)

    def hugging_face(self, seed: int) -> Iterable[Clip]:
        """BarkModel's audio, from the cache where it was made before."""
        say, folder = None, CACHE / fingerprint(self.checkpoint / "model.safetensors")
        for i, text in enumerate(self.sentences):
            path = folder / f"{re.sub(r'[^a-z]+', '-', text.lower())}{self.voice(i)}-{seed_of(seed, i)}.npy"
            if not path.exists():
                say = say or load_hugging_face(self.checkpoint)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, say(text, self.voice(i), seed_of(seed, i)))
            yield Clip(HUGGING_FACE, seed, i, text, np.load(path), [])


def seed_of(seed: int, sentence: int) -> int:
    return 1000 * seed + sentence


def fingerprint(weights: Path) -> str:
    """Names a checkpoint by its weights, so that another one of the same name gets a cache of its own."""
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def load_hugging_face(checkpoint: Path) -> Callable[[str, str, int], Audio]:
    """say(text, voice, seed) -> samples"""
    import torch
    from transformers import BarkModel, BarkProcessor

    model = BarkModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = BarkProcessor.from_pretrained(checkpoint)

    def say(text: str, voice: str, seed: int) -> Audio:
        torch.manual_seed(seed)
        return model.generate(**processor(text, voice_preset=voice))[0].numpy().astype(np.float32)

    return say


# --- what it means ---------------------------------------------------------------------------------------------------


def metric(scores: list[Score], name: str) -> float:
    """A metric over clips: error rates over all their words or characters, else the mean."""
    if name == "wer":
        return sum(s.word_errors for s in scores) / sum(s.n_words for s in scores)
    if name == "cer":
        return sum(s.character_errors for s in scores) / sum(s.n_characters for s in scores)
    return float(np.mean([getattr(s, name) for s in scores]))


def reseeding_sd(scores: list[Score], name: str) -> float:
    """Standard deviation of a one-seed metric when only the seed changes, from each sentence's spread over seeds."""
    by_sentence = group(scores, lambda s: s.sentence)
    value = {"wer": lambda s: s.word_errors, "cer": lambda s: s.character_errors}.get(name, lambda s: getattr(s, name))
    total = {"wer": lambda s: s.n_words, "cer": lambda s: s.n_characters}.get(name, lambda s: 1)
    variances = [np.var([value(s) for s in clips], ddof=1) for clips in by_sentence.values()]
    return float(np.sqrt(np.sum(variances)) / sum(total(clips[0]) for clips in by_sentence.values()))


def group(scores: list[Score], key: Callable[[Score], Any]) -> dict[Any, list[Score]]:
    groups: dict[Any, list[Score]] = {}
    for score in scores:
        groups.setdefault(key(score), []).append(score)
    return groups


def paired_difference(a: list[Score], b: list[Score], name: str, n_draws: int = 2000) -> dict[str, float]:
    """metric(b) - metric(a) with a 95% interval from redrawing the sentences."""
    by_a, by_b = group(a, lambda s: s.sentence), group(b, lambda s: s.sentence)
    rng, sentences = np.random.default_rng(0), sorted(by_a)

    def difference(chosen: Iterable[int]) -> float:
        chosen = list(chosen)
        return metric([s for i in chosen for s in by_b[i]], name) - metric([s for i in chosen for s in by_a[i]], name)

    draws = [difference(rng.choice(sentences, len(sentences))) for _ in range(n_draws)]
    return {
        "difference": difference(sentences),
        "low": float(np.quantile(draws, 0.025)),
        "high": float(np.quantile(draws, 0.975)),
    }


def compare(a: list[Score], b: list[Score], n_seeds: int) -> dict[str, dict[str, Any]]:
    """Is b worse than a by more than two standard deviations of reseeding both?"""
    verdicts = {}
    for name in JUDGED:
        found = paired_difference(a, b, name)
        noise = float(2 * np.hypot(reseeding_sd(a, name), reseeding_sd(b, name)) / np.sqrt(n_seeds))
        worse_by = found["difference"] if METRICS[name] == "lower" else -found["difference"]
        verdicts[name] = {**found, "noise": noise, "passed": bool(worse_by <= noise)}
    return verdicts


# --- the run ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    sentences = [line for line in SENTENCES.read_text().splitlines() if line][: options.sentences]
    with tempfile.TemporaryDirectory() as folder:
        pipeline, voices = open_exported(options.checkpoint, Path(folder, "float32"), int8=False)
        int8, _ = open_exported(options.checkpoint, Path(folder, "int8"), int8=True)
        speakers = Speakers(sentences, pipeline, voices, options.checkpoint)
        clips = list(progress(say_all(speakers, int8, options.seeds, options.reference_seeds)))
    listener = Listener()
    scores = [listener.score(clip) for clip in progress(clips)]
    result = judge(clips, scores, options.seeds)
    result["settings"] = {
        "sentences": len(sentences),
        "seeds": options.seeds,
        "voices": sorted(voices),
        "checkpoint": options.checkpoint.name,
    }
    result["machine"] = machine("numpy", "onnxruntime", "torch", "transformers", "faster-whisper", "speechmos")
    print(table(result))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps({**result, "clips": [asdict(score) for score in scores]}, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["passed"] else 1


def say_all(speakers: Speakers, int8: Pipeline, n_seeds: int, n_reference_seeds: int) -> Iterable[Clip]:
    for seed in range(n_seeds):
        yield from speakers.ours(OFFLINE, seed, streaming=False)
        yield from speakers.ours(STREAMED, seed)
        yield from speakers.ours(INT8, seed, int8, streaming=False)
    for seed in range(n_reference_seeds):
        yield from speakers.ours(LIKE_THEM, seed, streaming=False, top_k=50, min_eos_p=1.0)
        yield from speakers.hugging_face(seed)


def open_exported(checkpoint: Path, folder: Path, int8: bool) -> tuple[Pipeline, dict[str, HistoryPrompt]]:
    """The checkpoint exported into `folder`, in float32 or with 8-bit weights, and its voices."""
    export(open_huggingface(checkpoint), folder, int8, report=lambda line: None)
    return open_pipeline(folder)


def judge(clips: list[Clip], scores: list[Score], n_seeds: int) -> dict[str, Any]:
    by = group(scores, lambda s: s.condition)
    rows = {
        name: {
            "n": len(found),
            **{key: metric(found, key) for key in METRICS},
            **{f"{key}_reseeding_sd": reseeding_sd(found, key) for key in METRICS},
            "seconds": metric(found, "seconds"),
        }
        for name, found in by.items()
    }
    streamed, offline = ([clip for clip in clips if clip.condition == name] for name in (STREAMED, OFFLINE))
    result: dict[str, Any] = {
        "conditions": rows,
        "streamed_against_offline": compare(by[OFFLINE], by[STREAMED], n_seeds),
        "int8_against_float32": compare(by[OFFLINE], by[INT8], n_seeds),
    }
    if HUGGING_FACE in by:
        n_reference_seeds = len(group(by[HUGGING_FACE], lambda s: s.seed))
        result["ours_against_hugging_face"] = compare(by[HUGGING_FACE], by[LIKE_THEM], n_reference_seeds)
    result["boundaries"] = boundary_report(streamed, offline)
    result["passed"] = result["boundaries"]["passed"] and all(
        v["passed"] for v in result["streamed_against_offline"].values()
    )
    return result


def table(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            "| who | clips | WER | CER | DNSMOS overall | signal | background | P.808 | seconds |",
            "| --- |" + " --- |" * 8,
            *(condition_line(name, row) for name, row in result["conditions"].items()),
            "",
            *comparison_lines("streamed - offline", result["streamed_against_offline"]),
            *comparison_lines("8-bit weights - float32", result["int8_against_float32"]),
            *comparison_lines("ours, their settings - Hugging Face", result.get("ours_against_hugging_face", {})),
            *(boundary_line(name, result["boundaries"][name]) for name in ("jump", "flux")),
        ]
    )


def condition_line(name: str, row: dict[str, Any]) -> str:
    """A row of the table; ± is the standard deviation of a one-seed figure when it is reseeded."""
    rates = (f"{row[key]:.1%} ± {row[f'{key}_reseeding_sd']:.1%}" for key in ("wer", "cer"))
    overall = f"{row['ovrl']:.2f} ± {row['ovrl_reseeding_sd']:.2f}"
    rest = (f"{row[key]:.2f}" for key in ("sig", "bak", "p808", "seconds"))
    return f"| {' | '.join([name, str(row['n']), *rates, overall, *rest])} |"


def comparison_lines(title: str, comparison: dict[str, Any]) -> list[str]:
    lines = []
    for name, v in comparison.items():
        verdict = "within" if v["passed"] else "WORSE THAN"
        interval = f"{v['difference']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}]"
        lines.append(f"{title}: {name} {interval}, {verdict} the noise of reseeding, {v['noise']:.4f}")
    return lines


def boundary_line(name: str, b: dict[str, Any]) -> str:
    there = f"{b['streamed_at_boundaries']:.4f} at {b['n']} chunk boundaries"
    elsewhere = f"{b['offline_at_the_same_places']:.4f} offline at the same places"
    inside = f"{b['streamed_inside_chunks']:.4f} inside chunks"
    return f"{name}: {there}, {elsewhere}, {inside}; raised by the boundary: p = {b['p']:.3f}"


def progress(items: Iterable[Any]) -> Iterable[Any]:
    """The same items; a line now and then on standard error."""
    began = perf_counter()
    for n, item in enumerate(items, 1):
        if n % 10 == 0:
            print(f"{n} clips, {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        yield item


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=ROOT / "checkpoints" / "nano-bark",
        help="a Hugging Face directory",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of offline and streamed; 2 at least")
    parser.add_argument(
        "--reference-seeds",
        type=int,
        default=2,
        help="of Hugging Face's and our speech at its settings; 0 leaves both out",
    )
    parser.add_argument("--sentences", type=int, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
