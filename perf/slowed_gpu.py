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
from dataclasses import dataclass
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
# What is compared: the kernels that the engine takes for so many rows, full.
COMPARED = {
    "semantic": [
        Case(1, 500, "fused"),
        Case(4, 500, "fused"),
        *(Case(n, 500, "wide") for n in (8, 16)),
        Case(32, 700, "wide"),
    ],
    "coarse": [Case(1, 900, "fused"), Case(4, 900, "fused"), *(Case(n, 900, "wide") for n in (8, 16, 32))],
}
ROW_COUNTS = sorted({*fused.ROW_COUNTS, *wide.ROW_COUNTS})
CYCLES_A_NS = 1.98  # an H100's and an H200's, about
N_CORRECTIONS = 1  # of the delays, by what the slowed kernels take
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
    """Of a step. Nanoseconds."""

    position: float  # for each position attended to
    kernel: dict[
        str, dict[int, float]
    ]  # by stage and number of rows, between which it grows in proportion; may be negative

    def add(self, missing_ms: Mapping[tuple[str, int], float]) -> None:
        """missing_ms: by stage and number of rows."""
        for (stage, n_rows), ms in missing_ms.items():
            self.kernel[stage][n_rows] += 1e6 * ms

    def at(self, stage: str, n_rows: int) -> float:
        """Of a kernel for so many rows, positions aside."""
        return float(np.interp(n_rows, list(self.kernel[stage]), list(self.kernel[stage].values())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True, help="decode_bench.py's result on the other GPU")
    parser.add_argument("--slower", type=positive, default=1.0, help="steps last so many times as long as there")
    own, rest = partition(sys.argv[1:])
    arguments = parser.parse_args(own)
    like = json.loads(arguments.like.read_text())
    profile = PROFILES[like["bits"], like["kv_bits"]]
    slow_down(like, arguments.slower)
    gpu = f"{torch.cuda.get_device_name()} with {f'{arguments.slower:g} times ' * (arguments.slower != 1)}the steps of {like['gpu']}"
    load, runs = gpu_load.runs_of(rest)
    sys.argv[1:] = ["--profile", profile, *load]
    for run in runs:
        sys.argv += ["--", *run, "--gpu", gpu]
    return gpu_load.main(SAID)


def partition(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and behind it."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def slow_down(like: Mapping[str, Any], slower: float = 1.0) -> None:
    """Have the servers that this process starts take slowed kernels. Prints how near they come."""
    wanted = {
        (stage, case.n_rows): slower * found(like["lines"], stage, case)
        for stage, cases in COMPARED.items()
        for case in cases
    }
    bits, bandwidth = Bits(like["bits"], like["kv_bits"]), decode_bench.copy_bandwidth_tb_s()
    bytes_a_position = 24 * 2 * 1024 * bits.kv / 8
    delays = Delays(
        position=bytes_a_position * (1 / like["bandwidth_tb_s"] - 1 / bandwidth) / 1e3,
        kernel={stage: {case.n_rows: 0.0 for case in cases} for stage, cases in COMPARED.items()},
    )
    as_they_are = measure(bits, bandwidth)
    delays.add(
        {
            (stage, case.n_rows): wanted[stage, case.n_rows]
            - as_they_are[stage, case.n_rows]
            - delays.position * case.n_rows * case.context / 1e6
            for stage, cases in COMPARED.items()
            for case in cases
        }
    )
    original = kernels.HERE
    slowed = as_they_are
    for i in range(N_CORRECTIONS + 1):
        if i:
            delays.add({which: ms - slowed[which] for which, ms in wanted.items()})
        write_kernels(original, FOLDER, delays)
        take_kernels(FOLDER)
        slowed = measure(bits, bandwidth)
    take_kernels(original)
    print(f"{'ms a step':12}{'rows':>5}{like['gpu']:>25}{torch.cuda.get_device_name():>25}{'slowed':>10}")
    for (stage, n_rows), ms in wanted.items():
        print(
            f"{stage:12}{n_rows:5}{ms:25.4f}{as_they_are[stage, n_rows]:25.4f}{slowed[stage, n_rows]:10.4f}", flush=True
        )
    prepend(os.environ, "PYTHONPATH", HERE / "slowed")
    os.environ |= {SLOWED: str(FOLDER), SLOWED_SAYS: SAID}


def found(lines: Sequence[Mapping[str, Any]], stage: str, case: Case) -> float:
    """Milliseconds of decode_bench.py's line. Raises SystemExit if there is none."""
    for line in lines:
        if (line["what"], line["rows"], line["tokens"]) == (f"decode {stage} {case.way}", case.n_rows, case.context):
            return float(line["ms"])
    raise SystemExit(f"--like has no line of {stage}, {case}: take decode_bench.py's result for --model large")


def measure(bits: Bits, bandwidth: float) -> dict[tuple[str, int], float]:
    """Milliseconds of a step, by stage and number of rows."""
    steps = {}
    for stage, cases in COMPARED.items():
        engine = decode_bench.open_engine("large", stage, bits)
        for case in cases:
            steps[stage, case.n_rows] = decode_bench.measure_decode(engine, stage, case, bandwidth)["ms"]
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
        f"STAGE == {STAGES[stage]} && B == {n_rows} ? {delays.at(stage, n_rows) * CYCLES_A_NS:.1f}f : "
        for stage in STAGES
        for n_rows in ROW_COUNTS
    )
    wait = WAIT.format(cycles=f"({cycles}0.f)", position_cycles=f"{delays.position * CYCLES_A_NS:.6f}f")
    source = source.replace(before, wait.lstrip("\n") + before)
    return source.replace(told, " " * (len(told) - len(told.lstrip())) + "last_longer(shared.rows);\n" + told)


if __name__ == "__main__":
    sys.exit(main())
