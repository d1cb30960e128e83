"""compute-sanitizer's racecheck, memcheck and synccheck on every kernel, on the GPU that is there.

    python3 tests/sanitize.py [--tool racecheck] [NAME ...]

Matrix products are not these kernels': racecheck cannot run cuBLASLt's, so PyTorch computes them here by multiplying and adding up.

racecheck does not know that one lane which arrives at an mbarrier behind a __syncwarp stands for its whole warp, and reports what the
other lanes read before. So it runs twice on a ring that does nothing but what the kernels' rings do: as it is, and with all lanes
arriving; and on rings with a mistake, which it has to find. Then on the kernels, with all lanes arriving and everything else as it is.
For memcheck every tensor is an allocation of its own. A line for each; exit status 1 if something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "perf")]

from decode_bench import fill_cache, random_weights, stage_model  # noqa: E402

from barkstream.engines import Head  # noqa: E402
from barkstream.engines.kernels import UNDER_RACECHECK  # noqa: E402
from barkstream.sampling import COARSE  # noqa: E402
from barkstream.tokens import FineLayout, GPTSize  # noqa: E402

RACECHECK, MEMCHECK, SYNCCHECK = TOOLS = ("racecheck", "memcheck", "synccheck")
SUMMARY = re.compile(r"(?:RACECHECK|ERROR) SUMMARY: (\d+) (?:hazard|error)s?")
N_READERS, STAGE_WORDS = 4, 256  # of ring.cu
# nano-bark's coarse and fine
SIZE = GPTSize(n_layers=8, n_heads=4, width=256, block_size=1024, n_input_ids=2880, n_output_ids=2816)
HEAD = Head(COARSE, first_id=768, n_codebooks=2, size=1024, end=None)
FINE = FineLayout(
    GPTSize(n_layers=6, n_heads=4, width=256, block_size=1024, n_input_ids=1056, n_output_ids=1056),
    n_codebooks=8, n_given=2, codebook_size=1024, window=1024, max_history=512, unknown=1024,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a tool is run on."""

    command: list[str]  # Python's
    # A run for each of them: only kernels whose names have this in them. (Without, racecheck notes all that PyTorch's do, and was killed,
    # for want of memory, we believe.)
    kernels: tuple[str, ...]
    all_arrive: bool = True  # all lanes, under racecheck
    is_clean: bool | None = True  # as it should be; None: this is to be found out
    ends_well: bool = True  # its own exit status is 0
    tools: tuple[str, ...] = TOOLS


def run(work: str, *arguments: str | int) -> list[str]:
    return [str(Path(__file__).resolve()), "--run", work, *map(str, arguments)]


def ring(handed_on: bool, mistake: int = 0) -> list[str]:
    return run("ring", int(handed_on), mistake)


def of_rings() -> dict[str, Case]:
    for_races = dict(kernels=("ring",), tools=(RACECHECK,))
    found = {}
    for name, handed_on in (("ring", False), ("ring, handed on", True)):
        found[f"{name}, one lane"] = Case(ring(handed_on), all_arrive=False, is_clean=None, **for_races)
        found[name] = Case(ring(handed_on), **for_races)
        for mistake, what in ((1, "reads first"), (2, "lets go first")):
            found[f"{name}, {what}"] = Case(ring(handed_on, mistake), is_clean=False, ends_well=False, **for_races)
    return found


def of_decode_kernels() -> dict[str, Case]:
    found = {
        "decode.cu, one lane": Case(
            run("decode", "fused", 16, 16, 2, "nano"),
            all_arrive=False,
            is_clean=None,
            kernels=("decode",),
            tools=(RACECHECK,),
        )
    }
    for way, row_counts in (("fused", (1, 4)), ("wide", (8, 24))):
        file = {"fused": "decode.cu", "wide": "wide.cu"}[way]
        for bits, kv_bits in ((16, 16), (16, 8), (8, 8)):
            named = f"{file}, {bits} and {kv_bits} bits"
            for n in row_counts:
                found[f"{named}, {n} rows"] = Case(run("decode", way, bits, kv_bits, n, "nano"), kernels=("decode",))
            most = row_counts[-1]
            found[f"{named}, {most} rows, large"] = Case(
                run("decode", way, bits, kv_bits, most, "large"), kernels=("decode",), tools=(MEMCHECK,)
            )
    return found


CASES = {
    **of_rings(),
    **of_decode_kernels(),
    "attention.cu, batched.cu, 16 bits": Case(
        run("batched", 16), kernels=("embed", "norm", "store", "attend", "sample")
    ),
    "attention.cu, batched.cu, 8 bits": Case(run("batched", 8), kernels=("embed", "norm", "store", "attend")),
    "attention.cu, fine.cu": Case(run("fine"), kernels=("embed", "norm", "attend", "draw")),
    **{f"lstm.cu, {n} rows": Case(run("lstm", n), kernels=("lstm",)) for n in (1, 4)},
}


def run_ring(handed_on: str, mistake: str) -> bool:
    """Whether the sums are right."""
    import torch

    from barkstream.engines.kernels import build, c_int, c_void_p

    n = 64
    words = torch.arange(n * STAGE_WORDS, dtype=torch.int32, device="cuda") % 1000
    sums = torch.zeros(N_READERS * 32, dtype=torch.int32, device="cuda")
    module = build(str(HERE / "kernels/ring.cu"), "sm_90a", HANDED_ON=int(handed_on), MISTAKE=int(mistake))
    arguments = [c_void_p(words.data_ptr()), c_int(n), c_void_p(sums.data_ptr())]
    module.kernel("ring").launch((1, 1, 1), N_READERS * 32 + 32, arguments, torch.cuda.current_stream().cuda_stream)
    wanted = words.view(n, STAGE_WORDS // 32, 32).sum((0, 1))
    return all(torch.equal(sums[32 * i : 32 * i + 32], wanted * (i + 1)) for i in range(N_READERS))


def run_decode(way: str, bits: str, kv_bits: str, n_rows: str, model: str) -> bool:
    """Steps behind positions that no prefill has made: rows of all lengths, of which one is idle, with and without top-k and top-p.
    Whether they say as much as they should."""
    from barkstream.engines.cuda import CudaEngine

    size, head = (SIZE, HEAD) if model == "nano" else stage_model(model, "coarse")
    n = int(n_rows)
    weights = random_weights(size, head.n_codebooks * head.size)
    engine = CudaEngine(weights, size, head, n_slots=n, max_batch=n, bits=int(bits), kv_bits=int(kv_bits))
    fill_cache(engine.cache)
    return say(engine._fused if way == "fused" else engine._wide, n, size.block_size)


def say(decoder, n_rows: int, block_size: int) -> bool:
    """Three steps."""
    import torch

    from barkstream.engines.kernels.fused import RowArguments

    said = []
    for more in (dict(top_p=1.0), dict(top_p=0.9, top_k=50)):
        rows = [
            RowArguments(
                seed=i, slot=i, length=block_size * (i + 1) // (n_rows + 1), ids=(5, 6), temperature=0.7, min_eos_p=1.0,
                n_tokens=0 if i == 2 else 3, **more,
            )
            for i in range(n_rows)
        ]  # fmt: skip
        _, result = decoder.decode(rows)
        torch.cuda.synchronize()
        said += [int(n) == row.n_tokens for n, row in zip(result[:n_rows, 0].tolist(), rows, strict=True)]
    return all(said)


def run_batched(bits: str) -> bool:
    """Prefixes of two lengths; in bf16 steps behind them, too. Whether these say as much as they should."""
    from barkstream.engines.cuda import CudaEngine

    without_cublas()
    engine = CudaEngine(random_weights(SIZE, 2 * HEAD.size), SIZE, HEAD, n_slots=5, max_batch=5, bits=int(bits))
    engine.prefill([np.arange(n, dtype=np.int32)[:, None] for n in (100, 256)], [0, 1])
    if bits == "8":
        return True
    fill_cache(engine.cache)
    return say(engine._batched, 3, SIZE.block_size)


def run_fine() -> bool:
    """Two windows, one by argmax. Whether what was to be filled is filled, and nothing else."""
    import torch

    from barkstream import gpt
    from barkstream.engines import Window
    from barkstream.engines.cuda_fine import FineEngine

    without_cublas()
    twin = gpt.FineGPT(FINE, n_heads=7, bias=False).cuda()
    engine = FineEngine({name: x.detach() for name, x in twin.state_dict().items()}, FINE, max_batch=2)
    windows = []
    for temperature in (0.5, 0.0):
        codes = torch.randint(0, 1024, (8, 128)).numpy().astype(np.int32)
        codes[2:, 40:] = FINE.unknown
        windows.append(Window(codes, 40, torch.rand(6, 128).numpy(), temperature))
    filled = engine.fill(windows)
    kept = all(
        np.array_equal(now[:, :40], given.codes[:, :40]) and np.array_equal(now[:2], given.codes[:2])
        for now, given in zip(filled, windows, strict=True)
    )
    return kept and max(codes.max() for codes in filled) < FINE.codebook_size


def run_lstm(n_rows: str) -> bool:
    """Five steps. Whether they are PyTorch's on the CPU."""
    import torch

    from barkstream.engines.kernels.lstm import N_LAYERS, WIDTH, Lstm

    without_cublas()
    twin = torch.nn.LSTM(WIDTH, WIDTH, N_LAYERS)
    x, h, c = (torch.randn(n, int(n_rows), WIDTH) for n in (5, N_LAYERS, N_LAYERS))
    with torch.no_grad():
        expected, _ = twin(x, (h, c))
        lstm = Lstm({name: weight.detach().cuda() for name, weight in twin.named_parameters()})
        y, _, _ = lstm(*(each.cuda().contiguous() for each in (x, h.transpose(0, 1), c.transpose(0, 1))))
    return (y.cpu() - expected).abs().max().item() < 1e-3


def without_cublas() -> None:
    """Matrix products without its kernels, and work without graphs, for those of this process."""
    import torch
    from torch.nn import functional as F

    from barkstream.engines import cuda_fine
    from barkstream.engines.kernels import batched

    def product(x, weight, bias=None):
        found = (x.float()[:, None] * weight.float()).sum(-1)
        return (found if bias is None else found + bias).to(torch.bfloat16)

    def gelu_of_product(x, weight, bias=None):
        return F.gelu(product(x, weight, bias), approximate="tanh")

    def add_product(x, y, weight):
        x += product(y, weight)

    @dataclass
    class Graph:
        replay: Callable[[], None]

    def capture(work: Callable[[], None]) -> Graph:
        work()  # what it makes is used behind replays
        return Graph(work)

    for module in (batched, cuda_fine):
        module.product, module.gelu_of_product, module.add_product = product, gelu_of_product, add_product
        module.capture = capture
    torch.mm = lambda x, y, out_dtype: (x.float()[:, None] * y.t().float()).sum(-1)
    torch.addmm = lambda bias, x, y: bias + (x[:, None] * y.t()).sum(-1)


WORK = {"ring": run_ring, "decode": run_decode, "batched": run_batched, "fine": run_fine, "lstm": run_lstm}


def check(tool: str, name: str, case: Case, options: argparse.Namespace) -> bool:
    """Whether it is as it should be."""
    environment = dict(os.environ)
    if tool == RACECHECK and case.all_arrive:
        environment[UNDER_RACECHECK] = "1"
    if tool == MEMCHECK:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [options.sanitizer, "--tool", tool, "--print-limit", "20", "--num-cuda-barriers", "128"]
    are_right = []
    for kernel in case.kernels:
        told = [*command, "--kernel-name", f"kns={kernel}", sys.executable, *case.command]
        ran = subprocess.run(told, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if log := options.logs:
            of = f"{tool}, {name}, {kernel}".replace(", ", "-").replace(" ", "_")
            (log / f"{of}.txt").write_text(ran.stdout)
        summary = SUMMARY.search(ran.stdout)
        n_found = int(summary[1]) if summary else None
        ended_well = ran.returncode == 0 or not case.ends_well
        is_right = n_found is not None and ended_well and case.is_clean in (None, n_found == 0)
        line = dict(tool=tool, case=name, kernels=kernel, found=n_found, exit_status=ran.returncode)
        print(json.dumps(dict(**line, as_it_should_be=is_right)), flush=True)
        if not is_right:
            print("\n".join(ran.stdout.splitlines()[-12:]), flush=True)
        are_right.append(is_right)
    return all(are_right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(map(repr, CASES))}; all, unless told")
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--logs", type=Path, help="a folder for the tools' own words")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="where it is")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        work, *arguments = options.run
        is_right = WORK[work](*arguments)
        print("right" if is_right else "wrong")
        return 0 if is_right else 1
    if unknown := set(options.names) - set(CASES):
        raise SystemExit(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    chosen = [(tool, name) for tool in options.tool for name in options.names or CASES if tool in CASES[name].tools]
    found = [check(tool, name, CASES[name], options) for tool, name in chosen]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
