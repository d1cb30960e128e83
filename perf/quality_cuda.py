"""Does the cuda engine speak as well as the CPU's? Said on the GPU's machine, judged wherever Whisper and DNSMOS are.

    python3 perf/quality_cuda.py say clips           # needs an NVIDIA GPU; nano-bark in float32, exported on the way [--bits, --kv-bits]
    python3 perf/quality_cuda.py judge clips         # the CPU engine says the same; then as `make quality` judges

`say` also feeds the engine what was said, token by token (teacher forcing), and counts how often its likeliest token is the
float32 twin's; and the same for plain PyTorch under bf16 autocast, which is how Suno's own code runs on a GPU. Where they
differ, the margin is by how much the twin's best logit exceeds that of the engine's token.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from barkstream.engines import Head, Row
from barkstream.engines.open import CausalEngine
from barkstream.export.checkpoint import open_huggingface
from barkstream.export.write import export
from barkstream.local import open_pipeline
from barkstream.options import SpeechOptions
from barkstream.pipeline import Pipeline
from barkstream.sampling import Ints, Sampling
from barkstream.semantic import token_ids

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "nano-bark"
SENTENCES = ROOT / "perf" / "sentences.txt"
CONDITIONS = {"offline": dict(streaming=False), "streamed": dict(streaming=True)}
N_FORCED = 6  # sentences whose tokens are fed back
ROWS = 8  # decoded together then
GREEDY = Sampling(temperature=0)

Call = tuple[Ints, Ints, int]  # ids [S, C] of a prefix, the tokens said after it [n], the first one's position


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        export(open_huggingface(CHECKPOINT), Path(folder), report=lambda line: None)
        if options.verb == "say":
            return say(Path(folder), options.clips, options.seeds, options.bits, options.kv_bits)
        return judge(Path(folder), options.clips, options.results)


def sentences() -> list[str]:
    return [line for line in SENTENCES.read_text().splitlines() if line]


# --- on the GPU's machine ----------------------------------------------------------------------------------------------


def say(repository: Path, folder: Path, n_seeds: int, bits: int, kv_bits: int | None) -> int:
    """Writes a file a seed, and agreement.json, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, voices = open_pipeline(repository, engine="cuda", bits=bits, kv_bits=kv_bits)
    names = sorted(voices)
    calls = said_calls(pipeline, [voices[names[i % len(names)]] for i in range(N_FORCED)])
    agreements = {stage: agreement(pipeline, stage, calls[stage]) for stage in calls}
    print(json.dumps(agreements), flush=True)
    (folder / "agreement.json").write_text(json.dumps(agreements) + "\n")
    for seed in range(n_seeds):
        clips = {}
        for i, text in enumerate(sentences()):
            for condition, how in CONDITIONS.items():
                options = SpeechOptions(seed=1000 * seed + i, **how)
                audio = np.concatenate(list(pipeline.stream(text, options, voices[names[i % len(names)]])))
                clips[f"{condition}/{i}"] = audio.astype(np.float16)
        np.savez(folder / f"seed-{seed}.npz", **clips)
    return 0


def said_calls(pipeline: Pipeline, voices: list[Any]) -> dict[str, list[Call]]:
    """What the two causal stages were asked and answered while sentences were said."""
    stages: Any = pipeline.stages
    semantic, coarse = stages.semantic, stages.coarse
    calls: dict[str, list[Call]] = {"semantic": [], "coarse": []}

    def asked_semantic(prefix: Ints, *rest: Any) -> Any:
        tokens, ended = semantic(prefix, *rest)
        calls["semantic"].append((token_ids(prefix, pipeline.checkpoint.semantic), tokens, rest[1]))
        return tokens, ended

    def asked_coarse(prefix: Ints, *rest: Any) -> Any:
        tokens = coarse(prefix, *rest)
        calls["coarse"].append((prefix[:, None], tokens, rest[1]))
        return tokens

    stages.semantic, stages.coarse = asked_semantic, asked_coarse
    for i, voice in enumerate(voices):
        list(pipeline.stream(sentences()[i], SpeechOptions(seed=i), voice))
    del stages.semantic, stages.coarse  # the class's own again
    return calls


def agreement(pipeline: Pipeline, stage: str, calls: list[Call]) -> dict[str, Any]:
    """How often the likeliest tokens are the float32 twin's: the engine's, and PyTorch's under bf16 autocast."""
    layouts = pipeline.checkpoint
    head = Head.semantic(layouts.semantic) if stage == "semantic" else Head.coarse(layouts.coarse)
    engine = getattr(pipeline.stages, f"{stage}_engine")
    twin = Twin(pipeline, stage, head)
    counts = {"engine": Agreement(), "pytorch bf16": Agreement()}
    for ids, tokens, position in calls:
        if not len(tokens):
            continue
        exact, rounded = twin.logits(ids, tokens, position), twin.logits(ids, tokens, position, bf16=True)
        counts["engine"].add(exact, forced_greedy(engine, head, ids, tokens, position))
        counts["pytorch bf16"].add(exact, rounded.argmax(1))
    return {name: count.summary() for name, count in counts.items()}


class Agreement:
    def __init__(self) -> None:
        self.n, self.margins = 0, []

    def add(self, exact: np.ndarray, tokens: np.ndarray) -> None:
        """exact: the twin's logits [n, V]; tokens [n]: somebody's likeliest."""
        self.n += len(tokens)
        margins = exact.max(1) - exact[np.arange(len(tokens)), tokens]
        self.margins += margins[margins > 0].tolist()

    def summary(self) -> dict[str, Any]:
        agreed = 1 - len(self.margins) / self.n
        return dict(n=self.n, agreed=agreed, n_differ=len(self.margins), largest_margin=max(self.margins, default=0.0))


def forced_greedy(engine: CausalEngine, head: Head, ids: Ints, tokens: Ints, position: int) -> np.ndarray:
    """The engine's likeliest logit [n] after each prefix of what was said. All rows have slots of their own."""
    said = forced_ids(ids, tokens)
    rows = [Row(said[: len(ids) + i], 1, position + i, GREEDY, stream=1 + i % ROWS) for i in range(len(tokens))]
    found = [engine.generate(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
    for stream in range(1, ROWS + 1):
        engine.release(stream)
    generations = [generation for batch in found for generation in batch]
    starts = [head.first_id + (position + i) % head.n_codebooks * head.size for i in range(len(tokens))]
    return np.array(
        [head.end if g.ended else int(g.tokens[0]) - start for g, start in zip(generations, starts, strict=True)]
    )


def forced_ids(ids: Ints, tokens: Ints) -> Ints:
    drawn = np.repeat(ids[-1:], len(tokens), axis=0)
    drawn[:, 0] = tokens
    return np.concatenate([ids, drawn])


class Twin:
    """The stage in plain PyTorch on the GPU."""

    def __init__(self, pipeline: Pipeline, stage: str, head: Head):
        import torch

        from barkstream import gpt

        torch.backends.cuda.matmul.allow_tf32 = False
        self._torch, self._head = torch, head
        layouts = pipeline.checkpoint
        self._network = gpt.build(stage, layouts, open_huggingface(CHECKPOINT).weights(stage)).cuda()
        n_all = head.n_codebooks * head.size
        columns = np.arange(head.first_id, head.first_id + n_all)
        if head.end is not None:
            columns[head.end] = layouts.semantic.end
        self._columns = columns

    def logits(self, ids: Ints, tokens: Ints, position: int, bf16: bool = False) -> np.ndarray:
        """Eligible logits [n, V] before each token that was said."""
        torch = self._torch
        said = torch.from_numpy(forced_ids(ids, tokens)[:-1][None]).cuda()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            found = self._network(said)[0][0, len(ids) - 1 :].float().cpu().numpy()[:, self._columns]
        return np.stack([self._head.eligible(row, position + i)[0] for i, row in enumerate(found)])


# --- where the listeners are -------------------------------------------------------------------------------------------


def judge(repository: Path, folder: Path, results: Path) -> int:
    from listening import Listener
    from machine import machine
    from quality import METRICS, compare, condition_line, group, metric, progress, reseeding_sd

    agreements = json.loads((folder / "agreement.json").read_text())
    clips = [clip for seed, path in enumerate(sorted(folder.glob("seed-*.npz"))) for clip in clips_of(path, seed)]
    pipeline, voices = open_pipeline(repository)
    n_seeds = 1 + max(clip.seed for clip in clips)
    clips += said_on_cpu(pipeline, voices, n_seeds)
    listener = Listener()
    by = group([listener.score(clip) for clip in progress(clips)], lambda score: score.condition)
    rows = {
        name: {
            "n": len(found),
            **{key: metric(found, key) for key in METRICS},
            **{f"{key}_reseeding_sd": reseeding_sd(found, key) for key in METRICS},
            "seconds": metric(found, "seconds"),
        }
        for name, found in by.items()
    }
    compared = {name: compare(by[f"cpu, {name}"], by[f"cuda, {name}"], n_seeds) for name in CONDITIONS}
    print("| who | clips | WER | CER | DNSMOS overall | signal | background | P.808 | seconds |\n|" + " --- |" * 9)
    print("\n".join(condition_line(name, row) for name, row in rows.items()))
    passed = all(verdict["passed"] for one in compared.values() for verdict in one.values())
    result = dict(conditions=rows, cuda_against_cpu=compared, agreement=agreements, passed=passed, machine=machine())
    results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if passed else 1


def clips_of(path: Path, seed: int) -> Iterator[Any]:
    from listening import Clip

    with np.load(path) as stored:
        for name in stored.files:
            condition, i = name.split("/")
            yield Clip(f"cuda, {condition}", seed, int(i), sentences()[int(i)], stored[name].astype(np.float32), [])


def said_on_cpu(pipeline: Pipeline, voices: dict[str, Any], n_seeds: int) -> Iterable[Any]:
    from listening import Clip

    names = sorted(voices)
    for seed in range(n_seeds):
        for i, text in enumerate(sentences()):
            for condition, how in CONDITIONS.items():
                options = SpeechOptions(seed=1000 * seed + i, **how)
                audio = np.concatenate(list(pipeline.stream(text, options, voices[names[i % len(names)]])))
                yield Clip(f"cpu, {condition}", seed, i, text, audio, [])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["say", "judge"])
    parser.add_argument("clips", type=Path, help="a folder")
    parser.add_argument("--seeds", type=int, default=2, help="say: of each sentence; 2 at least")
    parser.add_argument("--bits", type=int, choices=(16, 8), default=16, help="say: of weights")
    parser.add_argument("--kv-bits", type=int, choices=(16, 8), help="say: of keys and values; as many, unless told")
    parser.add_argument("--results", type=Path, default=ROOT / "perf" / "results" / "quality-cuda.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
