"""Load on a GPU whose decode steps are made to last as long as on another, slower one: for those who have no such GPU.

    python3 perf/slowed_gpu.py --like perf/results/2026-11-27-h100-large-e3d04fb-decode-16-16.json -- --streams 60 -- --rate 6.8

--like: decode_bench.py's result on the other GPU. What stands behind the first `--` is gpu_load.py's. The kernels do all that they
always do; before a step's tokens are told, one waits for as long as the other GPU took longer: so much by kernel, and by position
attended to. Prefills, fine and codec, bound by arithmetic, are as they are here. How near the steps come is in the first table. The
server and all else are the real ones. Then gpu_load.py's output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import decode_bench  # noqa: E402
import gpu_load  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from decode_bench import Case  # noqa: E402
from served_load import positive  # noqa: E402

from barkstream.engines import kernels  # noqa: E402
from barkstream.engines.kernels import fused, wide  # noqa: E402
from barkstream.engines.kernels.fused import Bits  # noqa: E402
from barkstream.sampling import COARSE, SEMANTIC  # noqa: E402
from barkstream.server import prepend  # noqa: E402

# Environment variables for slowed/sitecustomize.py: the folder of the kernels, and what it says when it takes them.
SLOWED, SLOWED_SAYS = "BARKSTREAM_SLOWED", "BARKSTREAM_SLOWED_SAYS"
SAID = "this GPU's decode steps are slowed"
FOLDER = HERE.parent / "build" / "slowed-kernels"
PROFILES = {(16, 16): "cuda", (16, 8): "cuda-kv8", (8, 8): "cuda-int8"}  # by bits of weights, and of keys and values
STAGES = {"semantic": SEMANTIC, "coarse": COARSE}
Kernel = tuple[str, int]  # stage, and rows
# What is compared: the kernels that the engine takes for so many rows, full.
COMPARED: dict[Kernel, Case] = {
    ("semantic", 1): Case(1, 500, "fused"),
    ("semantic", 4): Case(4, 500, "fused"),
    ("semantic", 8): Case(8, 500, "wide"),
    ("semantic", 16): Case(16, 500, "wide"),
    ("semantic", 32): Case(32, 700, "wide"),
    ("coarse", 1): Case(1, 900, "fused"),
    ("coarse", 4): Case(4, 900, "fused"),
    ("coarse", 8): Case(8, 900, "wide"),
    ("coarse", 16): Case(16, 900, "wide"),
    ("coarse", 32): Case(32, 900, "wide"),
}
ROW_COUNTS = sorted({*fused.ROW_COUNTS, *wide.ROW_COUNTS})
CYCLES_A_NS = 1.98  # an H100's and an H200's, about
MOST_BESIDE = 0.05  # of what a step is to take: a slowed kernel that misses it by more is none
# Where each kernel's waiting stands, and before what.
WAITS = {
    "wide.cu": ("// Draws a row's token, and says so to all.\n", "            publish_numbered(a.drawn + b * 16,"),
    "decode.cu": (
        "// Each row's token, found alike by every block.\n",
        "        u8* to = at(a, CANDIDATE_AT + (b * BLOCKS + blockIdx.x) * 2);",
    ),
}
WAIT = """
__device__ __forceinline__ void last_longer(const RowState* rows) {{
    long long until = clock64();
    int positions = 0;
#pragma unroll 1
    for (int i = 0; i < B; i++) positions += rows[i].running ? rows[i].length : 0;
    float cycles = {cycles} + {position_cycles} * positions;
    until += (long long)cycles;
    while (clock64() < until) {{}}
}}

"""


@dataclass
class Delays:
    """Of a step. Nanoseconds; below zero is none."""

    position: float  # for each position attended to
    kernel: dict[Kernel, float]  # for each kernel besides, between which it grows in proportion with the rows

    def at(self, stage: str, n_rows: int) -> float:
        """Of a kernel for so many rows, positions aside."""
        measured = {rows: delay for (of_stage, rows), delay in self.kernel.items() if of_stage == stage}
        return float(np.interp(n_rows, list(measured), list(measured.values())))

    def corrected(self, missing_ms: Mapping[Kernel, float]) -> Delays:
        """So much longer."""
        return replace(self, kernel={which: self.kernel[which] + 1e6 * ms for which, ms in missing_ms.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True, help="decode_bench.py's result on the other GPU")
    parser.add_argument("--slower", type=positive, default=1.0, help="steps last so many times as long as there")
    own, rest = partition(sys.argv[1:])
    arguments = parser.parse_args(own)
    load, runs = gpu_load.runs_of(rest)
    if chosen := {word.partition("=")[0] for word in load} & {"--profile", "--model"}:
        parser.error(f"no {' or '.join(sorted(chosen))}: Bark large in the profile that --like was measured in")
    like = json.loads(arguments.like.read_text())
    slow_down(like, arguments.slower)
    times = f"{arguments.slower:g} times " if arguments.slower != 1 else ""
    gpu = f"{torch.cuda.get_device_name()} with {times}the steps of {like['gpu']}"
    sys.argv[1:] = ["--profile", PROFILES[like["bits"], like["kv_bits"]], *load]
    for run in runs:
        sys.argv += ["--", *run, "--gpu", gpu]
    return gpu_load.main(SAID)


def partition(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and behind it."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def slow_down(like: Mapping[str, Any], slower: float = 1.0) -> None:
    """Have the servers that this process starts take slowed kernels. Prints how near they come; raises SystemExit if that is not near."""
    wanted = {which: slower * found(like["lines"], which) for which in COMPARED}
    bits, bandwidth = Bits(like["bits"], like["kv_bits"]), decode_bench.copy_bandwidth_tb_s()
    n_layers, n_heads = decode_bench.SHAPES["large"]
    position_bytes = n_layers * 2 * 64 * n_heads * bits.kv / 8
    delay_ns = position_bytes * (1 / like["bandwidth_tb_s"] - 1 / bandwidth) / 1e3
    as_they_are = measure(bits, bandwidth)
    delays = Delays(delay_ns, {which: -delay_ns * case.n_rows * case.context for which, case in COMPARED.items()})
    delays = delays.corrected(difference(wanted, as_they_are))
    slowed = measured_with(delays, bits, bandwidth)
    slowed = measured_with(delays.corrected(difference(wanted, slowed)), bits, bandwidth)
    print(f"{'ms a step':12}{'rows':>5}{like['gpu']:>25}{torch.cuda.get_device_name():>25}{'slowed':>10}")
    for (stage, n_rows), ms in wanted.items():
        here, now = as_they_are[stage, n_rows], slowed[stage, n_rows]
        print(f"{stage:12}{n_rows:5}{ms:25.4f}{here:25.4f}{now:10.4f}", flush=True)
    if max(abs(slowed[which] / ms - 1) for which, ms in wanted.items()) > MOST_BESIDE:
        raise SystemExit("slowed steps do not last as long as they should: is this GPU the faster one?")
    prepend(os.environ, "PYTHONPATH", HERE / "slowed")
    os.environ |= {SLOWED: str(FOLDER), SLOWED_SAYS: SAID}


def found(lines: Sequence[Mapping[str, Any]], which: Kernel) -> float:
    """Milliseconds of decode_bench.py's line. Raises SystemExit if there is none."""
    stage, case = which[0], COMPARED[which]
    for line in lines:
        if (line["what"], line["rows"], line["tokens"]) == (f"decode {stage} {case.way}", case.n_rows, case.context):
            return float(line["ms"])
    raise SystemExit(f"--like has no line of {stage}, {case}: take decode_bench.py's result for --model large")


def difference(wanted: Mapping[Kernel, float], took: Mapping[Kernel, float]) -> dict[Kernel, float]:
    return {which: ms - took[which] for which, ms in wanted.items()}


def measured_with(delays: Delays, bits: Bits, bandwidth: float) -> dict[Kernel, float]:
    """`measure` of slowed kernels, which are in FOLDER then."""
    original = kernels.HERE
    write_kernels(original, FOLDER, delays)
    take_kernels(FOLDER)
    try:
        return measure(bits, bandwidth)
    finally:
        take_kernels(original)


def measure(bits: Bits, bandwidth: float) -> dict[Kernel, float]:
    """Milliseconds of a step."""
    steps: dict[Kernel, float] = {}
    for stage in STAGES:
        engine = decode_bench.open_engine("large", stage, bits)
        for which, case in COMPARED.items():
            if which[0] == stage:
                steps[which] = decode_bench.measure_decode(engine, stage, case, bandwidth)["ms"]
    return steps


def take_kernels(folder: Path) -> None:
    """From now on this process builds those of a folder."""
    kernels.HERE = folder
    kernels.build.cache_clear()
    kernels._image.cache_clear()


def write_kernels(original: Path, folder: Path, delays: Delays) -> None:
    """The kernels, those of the decode steps with their waiting. Raises RuntimeError if one is not as this module knows it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [*original.glob("*.cu"), *original.glob("*.cuh")]:
        source = path.read_text()
        if path.name in WAITS:
            source = with_wait(source, *WAITS[path.name], delays)
        (folder / path.name).write_text(source)


def with_wait(source: str, before: str, told: str, delays: Delays) -> str:
    """A decode kernel's source with `last_longer`, which stands before one line of it and is called before another."""
    for line in (before, told):
        if source.count(line) != 1:
            raise RuntimeError(f"a decode kernel has {source.count(line)} lines {line.strip()!r} in place of one")
    cycles = "".join(
        f"STAGE == {number} && B == {n} ? {delays.at(stage, n) * CYCLES_A_NS:.1f}f : "
        for stage, number in STAGES.items()
        for n in ROW_COUNTS
    )
    wait = WAIT.format(cycles=f"({cycles}0.f)", position_cycles=f"{delays.position * CYCLES_A_NS:.6f}f")
    source = source.replace(before, wait.lstrip("\n") + before)
    return source.replace(told, " " * (len(told) - len(told.lstrip())) + "last_longer(shared.rows);\n" + told)


if __name__ == "__main__":
    sys.exit(main())
