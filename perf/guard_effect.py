"""How often does the guard act, and what does it do to the word error rate? `python perf/guard_effect.py`.

The sentences of sentences.txt, two to a text, voices taking turns, each text with several seeds, streamed; without and with
the guard; as the checkpoint is, and with injected faults, since nano-bark makes none by itself. A fault belongs to a
seed, so that another try has another chance: of four kinds (see FaultyStages), one in --rate tries. Whisper tiny.en
writes each text down. An action without an injected fault is a false alarm.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from listening import Clip, Listener
from machine import machine
from quality import RESULTS, SENTENCES, metric, progress, seed_of

from barkstream.guard import FAULTS, LOOP, NOISE, RUNAWAY, SILENCE
from barkstream.local import LocalStages, open_pipeline
from barkstream.options import SpeechOptions
from barkstream.pipeline import Pipeline
from barkstream.sampling import Floats, Ints, Sampling
from barkstream.server import MODEL_REPOSITORY
from barkstream.voices import HistoryPrompt

ONSET = 40  # semantic tokens that a sentence goes well, .8 s


class FaultyStages:
    """Stages of which one try in n goes wrong. Which one, and how, is the seed's.

    runaway: where the speech should end, a voice's own old speech goes on for ever; loop: from ONSET on, the last 25 tokens
    for ever; silence: from ONSET on, silence for ever; noise: all audio of the try is white noise.
    """

    def __init__(self, stages: LocalStages, voice: HistoryPrompt, one_in: int):
        self._stages, self._one_in = stages, one_in
        self._other_words, self._silence = voice.semantic, int(np.bincount(voice.semantic).argmax())
        self._is_noise, self.injected = False, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stages, name)

    def fault_of(self, seed: int) -> str | None:
        rng = np.random.default_rng(seed)
        return str(rng.choice(FAULTS)) if rng.integers(self._one_in) == 0 else None

    def semantic(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int, due_s: float | None = None
    ) -> tuple[Ints, bool]:
        fault = self.fault_of(sampling.seed)
        if position == 0:
            self._is_noise = fault == NOISE
            self.injected[str(fault)] += 1
            self._ended_at = ONSET if fault in (LOOP, SILENCE) else None
        if self._ended_at is None:
            new, ended = self._stages.semantic(prefix, n_tokens, position, sampling, stream, due_s)
            if fault != RUNAWAY or not ended:
                return new, ended
            self._ended_at = position + len(new)
            return np.concatenate([new, self._after_the_end(RUNAWAY, prefix, n_tokens - len(new), 0)]), False
        if position < self._ended_at:
            n_left = self._ended_at - position
            return self._stages.semantic(prefix, min(n_tokens, n_left), position, sampling, stream, due_s)
        return self._after_the_end(str(fault), prefix, n_tokens, position - self._ended_at), False

    def codec(self, codes: Ints, state: Floats) -> tuple[Floats, Floats]:
        audio, state = self._stages.codec(codes, state)
        return (
            0.05 * np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32) if self._is_noise else audio
        ), state

    def _after_the_end(self, fault: str, prefix: Ints, n: int, position: int) -> Ints:
        if fault == SILENCE:
            return np.full(n, self._silence, np.int32)
        if fault == LOOP:
            return np.resize(prefix[-25:], n).astype(np.int32)
        return np.take(self._other_words, np.arange(position, position + n), mode="wrap").astype(np.int32)


def say_all(
    condition: str, pipeline: Pipeline, voices: dict[str, HistoryPrompt], texts: list[str], n_seeds: int, guard: bool
) -> Iterator[Clip]:
    names = sorted(voices)
    for seed in range(n_seeds):
        for i, text in enumerate(texts):
            options = SpeechOptions(seed=seed_of(seed, i), guard=guard)
            chunks = list(pipeline.stream(text, options, voices[names[i % len(names)]]))
            yield Clip(condition, seed, i, text, np.concatenate(chunks), [])


def main() -> int:
    options = arguments()
    sentences = [line for line in SENTENCES.read_text().splitlines() if line][: options.sentences]
    texts = [" ".join(sentences[i : i + 2]) for i in range(0, len(sentences), 2)]
    pipeline, voices = open_pipeline(options.repository)
    listener, rows = Listener(), []
    for faults in (False, True):
        for guard in (False, True):
            stages = FaultyStages(pipeline.stages, voices[sorted(voices)[0]], options.one_in)  # type: ignore[arg-type]
            did: Counter[str] = Counter()
            watched = replace(
                pipeline,
                stages=stages if faults else pipeline.stages,
                on_guard=lambda action, fault, did=did: did.update([f"{action} for {fault}"]),
            )
            name = f"{'faults injected' if faults else 'as it is'}, {'guard' if guard else 'no guard'}"
            clips = list(progress(say_all(name, watched, voices, texts, options.seeds, guard)))
            scores = [listener.score(clip) for clip in clips]
            rows.append(
                {
                    "condition": name,
                    "n_clips": len(clips),
                    "n_sentences": 2 * len(clips),
                    "wer": round(metric(scores, "wer"), 4),
                    "cer": round(metric(scores, "cer"), 4),
                    "seconds": round(metric(scores, "seconds"), 2),
                    "tries": dict(stages.injected) if faults else {"None": 2 * len(clips)},
                    "did": dict(did),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    result = {"rows": rows, "one_in": options.one_in, "seeds": options.seeds}
    result["machine"] = machine("numpy", "onnxruntime", "faster-whisper")
    print(table(rows))
    options.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| condition | texts | WER | CER | seconds a text | tries with a fault | the guard |",
        "| --- |" + " --- |" * 6,
    ]
    for row in rows:
        faults = ", ".join(f"{row['tries'].get(fault, 0)} {fault}" for fault in FAULTS)
        did = ", ".join(f"{what}: {n}" for what, n in sorted(row["did"].items())) or "-"
        rates = f"{row['wer']:.1%} | {row['cer']:.1%} | {row['seconds']}"
        lines.append(f"| {row['condition']} | {row['n_clips']} | {rates} | {faults} | {did} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repository", type=Path, default=MODEL_REPOSITORY, help="an exported model repository")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=30)
    parser.add_argument("--one-in", type=int, default=4, help="tries, of which one goes wrong")
    parser.add_argument("--results", type=Path, default=RESULTS.with_name("guard.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
