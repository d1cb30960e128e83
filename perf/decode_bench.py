"""Decode step and prefill of the causal GPTs on the `cuda` engine, in Bark's true sizes with random weights, beside the memory floor.

    python3 perf/decode_bench.py [--model large] [--bits 8] [--kv-bits 8] [--output perf/results/DATE-decode.json]

A step's floor is the bytes it must read (block weights, head, keys and values) over the bandwidth of a device-to-device copy
measured in the same run. Times are medians of CUDA events around calls of many steps. Table first, last line JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from barkstream.engines import Head
from barkstream.engines.cuda import CudaEngine
from barkstream.engines.kernels.fused import Bits, KVCache, RowArguments
from barkstream.sampling import COARSE, SEMANTIC
from barkstream.tokens import GPTSize

SHAPES = {"large": (24, 16), "small": (12, 12), "nano": (8, 5)}  # layers, heads of 64
N_STEPS, N_REPEATS = 60, 7


@dataclass(frozen=True)
class Case:
    n_rows: int
    context: int  # positions attended to, in the middle of the call
    way: str  # fused, wide or batched


CASES = {
    "semantic": [Case(n, 500, "fused") for n in (1, 4, 8)]
    + [Case(n, 500, "wide") for n in (1, 8, 16, 32)]
    + [Case(32, 700, "wide"), Case(64, 500, "wide"), Case(8, 500, "batched"), Case(32, 700, "batched")],
    "coarse": [Case(n, 900, "fused") for n in (1, 4)] + [Case(n, 900, "wide") for n in (8, 16, 32)],
}
PREFILLS = {"semantic": [(1, 256), (8, 256)], "coarse": [(1, 886), (8, 886)]}  # rows, tokens


def stage_model(model: str, stage: str) -> tuple[GPTSize, Head]:
    """Bark's published vocabularies at a model's width and depth."""
    n_layers, n_heads = SHAPES[model]
    n_ids, n_logits = (129_600, 10_001) if stage == "semantic" else (12_096, 2_048)
    size = GPTSize(n_layers, n_heads, 64 * n_heads, 1024, n_ids, n_logits)
    head = Head(SEMANTIC, 0, 1, 10_001, 10_000) if stage == "semantic" else Head(COARSE, 10_000, 2, 1_024, None)
    return size, head


def random_weights(size: GPTSize, n_logits: int) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda") * shape[-1] ** -0.5

    w = size.width
    weights = {
        "input_embeds_layer.weight": normal(size.n_input_ids, w),
        "position_embeds_layer.weight": normal(size.block_size, w),
    }
    for i in range(size.n_layers):
        shapes = {
            "attn.att_proj": (3 * w, w),
            "attn.out_proj": (w, w),
            "mlp.in_proj": (4 * w, w),
            "mlp.out_proj": (w, 4 * w),
        }
        weights |= {f"layers.{i}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        weights |= {f"layers.{i}.layernorm_{j}.weight": torch.ones(w, device="cuda") for j in (1, 2)}
    return {**weights, "layernorm_final.weight": torch.ones(w, device="cuda"), "lm_head.weight": normal(n_logits, w)}


def fill_cache(cache: KVCache) -> None:
    """With numbers such as prefills would leave."""
    if cache.scales is None:
        cache.values.normal_()
    else:
        cache.values.random_(1, 256)
        cache.scales.fill_(1 / 64)


def median_ms(work: Callable[[], object], n_repeats: int = N_REPEATS) -> tuple[float, float]:
    """Median time of the work on the GPU, and the spread (largest minus smallest); warmed up before."""
    work()
    work()
    times = []
    for _ in range(n_repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times), max(times) - min(times)


def copy_bandwidth_tb_s() -> float:
    """Bytes read and written by a device-to-device copy of 4 GiB, a second."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source))[0] / 1e9


def step_bytes(size: GPTSize, head: Head, case: Case, bits: Bits) -> int:
    """What one step must read: the blocks' weights, the head (one codebook's if all rows stand at the same one), keys and values.

    Without the scales of 8-bit numbers.
    """
    weights = 12 * size.width**2 * size.n_layers + head.size * size.width
    keys_and_values = case.n_rows * case.context * size.n_layers * 2 * size.width
    return (weights * bits.weights + keys_and_values * bits.kv) // 8


def decode_rows(case: Case) -> list[RowArguments]:
    start = case.context - N_STEPS // 2
    return [
        RowArguments(
            seed=i,
            slot=i,
            length=start,
            position=0,
            ids=(5, 6),
            n_tokens=N_STEPS,
            temperature=0.7,
            top_p=1,
            min_eos_p=1,
        )
        for i in range(case.n_rows)
    ]


def open_engine(model: str, stage: str, bits: Bits) -> CudaEngine:
    """With random weights and as random a cache, and no end of speech: every call makes all its steps."""
    size, head = stage_model(model, stage)
    head = Head(head.stage, head.first_id, head.n_codebooks, head.size, None)
    weights = random_weights(size, head.n_codebooks * head.size)
    engine = CudaEngine(weights, size, head, n_slots=64, max_batch=64, bits=bits.weights, kv_bits=bits.kv)
    fill_cache(engine.cache)
    return engine


def measure(model: str, stage: str, bandwidth: float, bits: Bits) -> list[dict]:
    engine = open_engine(model, stage, bits)
    size = engine.size
    lines = [dict(what=f"memory {stage}", rows=64, tokens=size.block_size, gb=torch.cuda.memory_allocated() / 1e9)]
    lines += [
        measure_decode(engine, stage, case, bandwidth)
        for case in CASES[stage]
        if (engine._fused if case.way != "batched" else engine._batched)
    ]
    return lines + [measure_prefill(engine, stage, n_rows, n_tokens) for n_rows, n_tokens in PREFILLS[stage]]


def measure_decode(engine: CudaEngine, stage: str, case: Case, bandwidth: float) -> dict:
    decoder = {"fused": engine._fused, "wide": engine._wide, "batched": engine._batched}[case.way]
    rows = decode_rows(case)
    ms, spread = (t / N_STEPS for t in median_ms(lambda: decoder.decode(rows)))
    floor = step_bytes(engine.size, engine.head, case, engine.bits) / bandwidth / 1e9
    return dict(
        what=f"decode {stage} {case.way}",
        rows=case.n_rows,
        tokens=case.context,
        ms=ms,
        spread_ms=spread,
        floor_ms=floor,
        share=floor / ms,
    )


def measure_prefill(engine: CudaEngine, stage: str, n_rows: int, n_tokens: int) -> dict:
    ids = [np.random.randint(0, engine.size.n_input_ids, (n_tokens, 1)).astype(np.int32) for _ in range(n_rows)]
    ms, spread = median_ms(lambda: engine.prefill(ids, list(range(n_rows))))
    tflop_s = 24 * engine.size.width**2 * engine.size.n_layers * n_tokens * n_rows / ms / 1e9
    return dict(what=f"prefill {stage}", rows=n_rows, tokens=n_tokens, ms=ms, spread_ms=spread, tflop_s=tflop_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="large")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    parser.add_argument("--bits", type=int, choices=(16, 8), default=16, help="of weights")
    parser.add_argument("--kv-bits", type=int, choices=(16, 8), help="of keys and values; as many, unless told")
    options = parser.parse_args()
    bits = Bits(options.bits, options.kv_bits or options.bits)
    bandwidth = copy_bandwidth_tb_s()
    lines = [line for stage in ("semantic", "coarse") for line in measure(options.model, stage, bandwidth, bits)]
    print(f"{torch.cuda.get_device_name()}, {options.model}, {bits}, copy bandwidth {bandwidth:.2f} TB/s")
    print(f"{'':30}{'rows':>5}{'tokens':>8}{'ms':>9}{'spread':>9}{'floor':>9}{'share of floor':>16}{'TFLOP/s':>9}")
    for line in lines:
        if "gb" in line:
            print(f"{line['what']:30}{line['rows']:5}{line['tokens']:8}{line['gb']:9.2f} GB")
            continue
        tail = (
            f"{line['floor_ms']:9.4f}{line['share']:15.0%}" if "floor_ms" in line else f"{'':24}{line['tflop_s']:9.0f}"
        )
        print(f"{line['what']:30}{line['rows']:5}{line['tokens']:8}{line['ms']:9.4f}{line['spread_ms']:9.4f}{tail}")
    result = json.dumps(summary(options.model, bits, bandwidth, lines))
    if options.output:
        options.output.write_text(result + "\n")
    print(result)


def summary(model: str, bits: Bits, bandwidth: float, lines: list[dict]) -> dict:
    def found(what: str, rows: int, tokens: int, key: str = "ms") -> float | None:
        return next(
            (line[key] for line in lines if (line["what"], line["rows"], line["tokens"]) == (what, rows, tokens)), None
        )

    return dict(
        gpu=torch.cuda.get_device_name(),
        model=model,
        bits=bits.weights,
        kv_bits=bits.kv,
        commit=commit(),
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
        bandwidth_tb_s=bandwidth,
        decode_ms_b1=found("decode semantic fused", 1, 500),
        decode_ms_b32=found("decode semantic wide", 32, 700),
        decode_share_of_bandwidth_b1=found("decode semantic fused", 1, 500, "share"),
        decode_share_of_bandwidth_b32=found("decode semantic wide", 32, 700, "share"),
        prefill_ms_256=found("prefill semantic", 1, 256),
        prefill_ms_886=found("prefill coarse", 1, 886),
        lines=lines,
    )


def commit() -> str:
    """The checkout's commit, or "uncommitted"."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return git.stdout.strip() or "uncommitted"


if __name__ == "__main__":
    main()
