"""compute-sanitizer's racecheck on the decode kernels and the codec's LSTM, on the GPU that is there.

    python3 tests/racecheck.py [NAME ...]

racecheck does not know that one lane which arrives at an mbarrier behind a __syncwarp stands for its whole warp, and reports what the
other lanes read before. So it runs twice on a ring that does nothing but what the kernels' rings do: as it is, and with all lanes
arriving; and on rings with a mistake, which it has to find. Then on the kernels, with all lanes arriving and everything else as it is.
A line for each; exit status 1 if something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "perf")]

from decode_bench import fill_cache, random_weights  # noqa: E402

from barkstream.engines import Head  # noqa: E402
from barkstream.engines.cuda import CudaEngine  # noqa: E402
from barkstream.engines.kernels import UNDER_RACECHECK, build, c_int, c_void_p  # noqa: E402
from barkstream.engines.kernels.fused import RowArguments  # noqa: E402
from barkstream.engines.kernels.lstm import N_LAYERS, WIDTH, Lstm  # noqa: E402
from barkstream.sampling import COARSE  # noqa: E402
from barkstream.tokens import GPTSize  # noqa: E402

SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
N_READERS, STAGE_WORDS = 4, 256  # of ring.cu
# nano-bark's coarse
SIZE = GPTSize(n_layers=8, n_heads=4, width=256, block_size=1024, n_input_ids=2880, n_output_ids=2816)
HEAD = Head(COARSE, first_id=768, n_codebooks=2, size=1024, end=None)


@dataclass(frozen=True)
class Case:
    """What racecheck is run on."""

    command: list[str]  # Python's
    all_arrive: bool  # all lanes
    is_clean: bool | None  # as it should be; None: this is to be found out
    kernel: str = "decode"
    ends_well: bool = True  # its own exit status is 0


def ring(handed_on: bool, mistake: int = 0) -> list[str]:
    return [str(Path(__file__).resolve()), "--ring", str(int(handed_on)), str(mistake)]


def decode(way: str, bits: int, n_rows: int) -> list[str]:
    return [str(Path(__file__).resolve()), "--decode", way, str(bits), str(n_rows)]


def recurrent(n_rows: int) -> list[str]:
    return [str(Path(__file__).resolve()), "--lstm", str(n_rows)]


CASES = {
    "ring, one lane, handed on": Case(ring(True), False, None, "ring"),
    "ring, one lane": Case(ring(False), False, None, "ring"),
    "ring, handed on": Case(ring(True), True, True, "ring"),
    "ring": Case(ring(False), True, True, "ring"),
    "ring, reads first": Case(ring(False, 1), True, False, "ring", ends_well=False),
    "ring, lets go first": Case(ring(False, 2), True, False, "ring", ends_well=False),
    "ring, handed on, reads first": Case(ring(True, 1), True, False, "ring", ends_well=False),
    "ring, handed on, lets go first": Case(ring(True, 2), True, False, "ring", ends_well=False),
    "decode.cu, one lane": Case(decode("fused", 16, 2), False, None),
    **{
        f"decode.cu, {bits} bits, {n} rows": Case(decode("fused", bits, n), True, True)
        for bits in (16, 8)
        for n in (1, 4)
    },
    **{
        f"wide.cu, {bits} bits, {n} rows": Case(decode("wide", bits, n), True, True)
        for bits in (16, 8)
        for n in (8, 24)
    },
    **{f"lstm.cu, {n} rows": Case(recurrent(n), False, True, "lstm") for n in (1, 4)},
}


def run_ring(handed_on: int, mistake: int) -> int:
    """Exit status 1 if the sums are wrong."""
    import torch

    n = 64
    words = torch.arange(n * STAGE_WORDS, dtype=torch.int32, device="cuda") % 1000
    sums = torch.zeros(N_READERS * 32, dtype=torch.int32, device="cuda")
    module = build(str(HERE / "kernels/ring.cu"), "sm_90a", HANDED_ON=handed_on, MISTAKE=mistake)
    arguments = [c_void_p(words.data_ptr()), c_int(n), c_void_p(sums.data_ptr())]
    module.kernel("ring").launch((1, 1, 1), N_READERS * 32 + 32, arguments, torch.cuda.current_stream().cuda_stream)
    wanted = words.view(n, STAGE_WORDS // 32, 32).sum((0, 1))
    right = all(torch.equal(sums[32 * i : 32 * i + 32], wanted * (i + 1)) for i in range(N_READERS))
    print("sums are right" if right else "sums are wrong")
    return 0 if right else 1


def run_decode(way: str, bits: int, n_rows: int) -> int:
    """Three steps of nano-bark's sizes behind positions that no prefill has made, for its products are cuBLAS's: rows of all lengths,
    of which one is idle, with and without top-k and top-p. Exit status 1 if they say less than they should."""
    import torch

    engine = CudaEngine(random_weights(SIZE, 2 * HEAD.size), SIZE, HEAD, n_slots=n_rows, max_batch=n_rows, bits=bits)
    fill_cache(engine.cache)
    decoder = engine._fused if way == "fused" else engine._wide
    said = []
    for more in (dict(top_p=1.0), dict(top_p=0.9, top_k=50)):
        rows = [
            RowArguments(
                seed=i, slot=i, length=SIZE.block_size * (i + 1) // (n_rows + 1), ids=(5, 6), temperature=0.7, min_eos_p=1.0,
                n_tokens=0 if i == 2 else 3, **more,
            )
            for i in range(n_rows)
        ]  # fmt: skip
        _, result = decoder.decode(rows)
        torch.cuda.synchronize()
        said += [int(n) == row.n_tokens for n, row in zip(result[:n_rows, 0].tolist(), rows, strict=True)]
    print("said", len(said), "rows" if all(said) else "rows, some of them too short")
    return 0 if all(said) else 1


def run_lstm(n_rows: int) -> int:
    """Five steps. Exit status 1 if they are not PyTorch's."""
    import torch

    twin = torch.nn.LSTM(WIDTH, WIDTH, N_LAYERS).cuda()
    x, h, c = (torch.randn(n, n_rows, WIDTH, device="cuda") for n in (5, N_LAYERS, N_LAYERS))
    with torch.no_grad():
        expected, _ = twin(x, (h, c))
        y, _, _ = Lstm(dict(twin.named_parameters()))(x, h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous())
    off = (y - expected).abs().max().item()
    print("largest difference", off)
    return 0 if off < 1e-3 else 1


def check(name: str, case: Case, options: argparse.Namespace) -> bool:
    """Whether it is as it should be."""
    environment = {**os.environ, **({UNDER_RACECHECK: "1"} if case.all_arrive else {})}
    command = [options.sanitizer, "--tool", "racecheck", "--kernel-name", f"kns={case.kernel}"]
    command += ["--num-cuda-barriers", "128", "--print-limit", "20", sys.executable, *case.command]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = found.stdout
    if log := options.logs:
        (log / f"{name.replace(', ', '-').replace(' ', '_')}.txt").write_text(output)
    summary = SUMMARY.search(output)
    hazards = int(summary[1]) if summary else None
    ended_well = found.returncode == 0 or not case.ends_well
    is_right = hazards is not None and ended_well and case.is_clean in (None, hazards == 0)
    print(
        json.dumps(dict(case=name, hazards=hazards, exit_status=found.returncode, as_it_should_be=is_right)), flush=True
    )
    if not is_right:
        print("\n".join(output.splitlines()[-12:]), flush=True)
    return is_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(map(repr, CASES))}; all, unless told")
    parser.add_argument("--logs", type=Path, help="a folder for racecheck's own words")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="where it is")
    parser.add_argument("--ring", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--decode", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--lstm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ring:
        return run_ring(*options.ring)
    if options.decode:
        way, bits, n_rows = options.decode
        return run_decode(way, int(bits), int(n_rows))
    if options.lstm:
        return run_lstm(options.lstm)
    if unknown := set(options.names) - set(CASES):
        raise SystemExit(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    found = [check(name, CASES[name], options) for name in options.names or CASES]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
