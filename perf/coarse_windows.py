"""Does speech suffer from longer coarse windows? Said offline with each, judged by Whisper and DNSMOS (`make .venv/quality` first).

    .venv/bin/python perf/coarse_windows.py --windows 0 "0, 0, 120, 180, 180, 310" --seeds 4
    .venv/bin/python perf/coarse_windows.py --together 2

--windows: values of sliding_window_len, the first of which the others are compared with. --together: sentences in one, so that more
windows are long ones. nano-bark with 8-bit weights. Table, comparisons with the noise of reseeding, last line JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from listening import Clip, Listener
from machine import machine
from quality import METRICS, ROOT, SENTENCES, compare, comparison_lines, group, metric, open_exported, progress, seed_of

from barkstream.options import Schedule, SpeechOptions
from barkstream.pipeline import Pipeline
from barkstream.voices import HistoryPrompt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", nargs="+", default=["0", "0, 0, 120, 180, 180, 310"])
    parser.add_argument("--sentences", type=int, default=30)
    parser.add_argument("--together", type=int, default=1, help="sentences in one text")
    parser.add_argument("--seeds", type=int, default=4, help="2 at least")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "nano-bark")
    options = parser.parse_args()
    texts = [line for line in SENTENCES.read_text().splitlines() if line][: options.sentences]
    texts = list(joined(texts, options.together))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    with tempfile.TemporaryDirectory() as folder:
        pipeline, voices = open_exported(options.checkpoint, Path(folder), int8=True)
        clips = [clip for given in options.windows for clip in progress(say(pipeline, voices, given, texts, seeds))]
    listener = Listener()
    by = group([listener.score(clip) for clip in progress(clips)], lambda score: score.condition)
    rows = {name: {key: round(metric(scores, key), 4) for key in (*METRICS, "seconds")} for name, scores in by.items()}
    for name, row in rows.items():
        print(f"{name:30} {len(by[name])} clips", *(f"{key} {value:.4f}" for key, value in row.items()))
    reference, *others = options.windows
    verdicts = {name: compare(by[reference], by[name], options.seeds) for name in others}
    for name, verdict in verdicts.items():
        print(*comparison_lines(f"{name} - {reference}", verdict), sep="\n")
    where = machine("numpy", "onnxruntime", "faster-whisper", "speechmos")
    settings = {"texts": len(texts), "together": options.together, "seeds": list(seeds), "voices": sorted(voices)}
    print(json.dumps({"rows": rows, "verdicts": verdicts, "settings": settings, "machine": where}))
    return 0 if all(each["passed"] for verdict in verdicts.values() for each in verdict.values()) else 1


def joined(lines: list[str], n: int) -> Iterator[str]:
    """Each n sentences as one; none of what is left."""
    for first, *others in zip(*[iter(lines)] * n, strict=False):
        yield ", ".join([first, *(f"{line[0].lower()}{line[1:]}" for line in others)]).replace(".,", ",")


def voice_of(sentence: int, voices: Collection[str]) -> str:
    """They take turns."""
    return sorted(voices)[sentence % len(voices)]


def say(
    pipeline: Pipeline, voices: dict[str, HistoryPrompt], windows: str, texts: list[str], seeds: range
) -> Iterator[Clip]:
    lengths = Schedule.parse({"sliding_window_len": windows}).sliding_window_len
    pipeline = replace(pipeline, schedule=replace(pipeline.schedule, sliding_window_len=lengths))
    for seed in seeds:
        for i, text in enumerate(texts):
            voice = voices[voice_of(i, voices)]
            chunks = list(pipeline.stream(text, SpeechOptions(seed=seed_of(seed, i), streaming=False), voice))
            yield Clip(windows, seed, i, text, np.concatenate(chunks), [])


if __name__ == "__main__":
    sys.exit(main())
