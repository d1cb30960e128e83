"""compute-sanitizer's racecheck on the decode kernels, on the GPU that is there.

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
sys.path[:0] = [str(HERE.parent)]

from barkstream.engines.kernels import UNDER_RACECHECK, build, c_int, c_void_p  # noqa: E402

SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
N_READERS, STAGE_WORDS = 4, 256  # of ring.cu


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


def of_tests(size: str, way: str, *counts: int) -> list[str]:
    """Logits of test_cuda.py's rows, for so many rows."""
    tests = [f"{HERE / 'test_cuda.py'}::test_logits_equal_the_twins[{size}-{way}-{n}]" for n in counts]
    return ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "timeout=0", *tests]


CASES = {
    "ring, one lane, handed on": Case(ring(True), False, None, "ring"),
    "ring, one lane": Case(ring(False), False, None, "ring"),
    "ring, handed on": Case(ring(True), True, True, "ring"),
    "ring": Case(ring(False), True, True, "ring"),
    "ring, reads first": Case(ring(False, 1), True, False, "ring", ends_well=False),
    "ring, lets go first": Case(ring(False, 2), True, False, "ring", ends_well=False),
    "ring, handed on, reads first": Case(ring(True, 1), True, False, "ring", ends_well=False),
    "ring, handed on, lets go first": Case(ring(True, 2), True, False, "ring", ends_well=False),
    "decode.cu, one lane": Case(of_tests("nano-coarse", "fused", 2), False, None),
    "decode.cu": Case(of_tests("nano-coarse", "fused", 2), True, True),
    "wide.cu": Case(of_tests("nano-coarse", "wide", 8), True, True),
    "decode.cu, 8 bits": Case(of_tests("nano-coarse", "fused-8", 2), True, True),
    "wide.cu, 8 bits": Case(of_tests("nano-coarse", "wide-8", 8), True, True),
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


def check(name: str, case: Case, options: argparse.Namespace) -> bool:
    """Whether it is as it should be."""
    environment = {**os.environ, **({UNDER_RACECHECK: "1"} if case.all_arrive else {})}
    command = [options.sanitizer, "--tool", "racecheck", "--kernel-name", f"kns={case.kernel}"]
    command += ["--num-cuda-barriers", "128", "--print-limit", "20", sys.executable, *case.command]
    found = subprocess.run(
        ["timeout", "-k", "3", str(options.timeout), *command], env=environment, capture_output=True, text=True
    )
    output = found.stdout + found.stderr
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
    parser.add_argument("--timeout", type=float, default=300, help="s, a case")
    parser.add_argument("--ring", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ring:
        return run_ring(*options.ring)
    if unknown := set(options.names) - set(CASES):
        raise SystemExit(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    found = [check(name, CASES[name], options) for name in options.names or CASES]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
