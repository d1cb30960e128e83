"""What calls waited for, out of a trace of batches (`barkstream/engines/trace.py`).

    BARKSTREAM_TRACE=trace.jsonl python3 perf/gpu_load.py --profile cuda -- --rate 6 --duration 60
    python3 perf/trace_report.py trace.jsonl [--from S] [--to S]

By stage and kind of call: how many pieces, and how long they waited for their turn, ms. A kind is a rank (0 goes first, 3 last), and of
fine and codec the frames asked for; those of fewer than 5 calls are left out. Then by stage: batches, their rows and ms, and how many
were halted. Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FEW = 5  # kinds with fewer calls are left out of the table
STAGES = "semantic", "coarse", "fine", "codec"
AT = (50, 90, 99, 100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--from", dest="from_s", type=float, default=0.0, metavar="S", help="after the first batch")
    parser.add_argument("--to", dest="to_s", type=float, default=float("inf"), metavar="S", help="likewise")
    arguments = parser.parse_args()
    found = report(within(read(arguments.trace), arguments.from_s, arguments.to_s))
    if not found["stages"]:
        parser.error(f"{arguments.trace} has no batch between {arguments.from_s:g} and {arguments.to_s:g} s")
    print(
        f"{'stage':9} {'rank':>4} {'frames':>6} {'calls':>7}  waited ms: {'p50':>6} {'p90':>6} {'p99':>6} {'most':>6}"
    )
    for each in found["calls"]:
        frames = "" if each["n_frames"] is None else each["n_frames"]
        waited = " ".join(f"{ms:6.1f}" for ms in each["waited_ms"])
        print(f"{each['stage']:9} {each['rank']:4} {frames:>6} {each['calls']:7}             {waited}")
    for stage, each in found["stages"].items():
        print(
            f"{stage:9} {each['batches']} batches of {each['rows']} rows and {each['ms']} ms, {each['halted']} halted"
        )
    print(json.dumps(found))
    return 0


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Raises SystemExit for a line that is none of a trace."""
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                batch = json.loads(line)
                batch["stage"], batch["began_s"], batch["calls"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise SystemExit(f"{path}, line {number}: no batch of a trace (BARKSTREAM_TRACE)") from None
            yield batch


def within(batches: Iterable[dict[str, Any]], from_s: float, to_s: float) -> list[dict[str, Any]]:
    """Those that began so long after the first."""
    ordered = sorted(batches, key=lambda batch: batch["began_s"])
    return [batch for batch in ordered if from_s <= batch["began_s"] - ordered[0]["began_s"] <= to_s]


def report(batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """calls: of each kind with FEW calls or more; waited_ms at 50, 90, 99 and 100%. stages: with means of rows and ms."""
    waited_ms: dict[tuple[int, int, int | None], list[float]] = defaultdict(list)
    of_stage: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for batch in batches:
        of_stage[batch["stage"]].append(batch)
        for call in batch["calls"]:
            kind = (STAGES.index(batch["stage"]), call["rank"], call.get("n_frames"))
            waited_ms[kind].append(1e3 * max(0.0, batch["began_s"] - call["since_s"]))
    return {
        "calls": [
            {
                "stage": STAGES[stage],
                "rank": rank,
                "n_frames": n_frames,
                "calls": len(ms),
                "waited_ms": np.percentile(ms, AT).round(1).tolist(),
            }
            for (stage, rank, n_frames), ms in sorted(
                waited_ms.items(), key=lambda each: (*each[0][:2], each[0][2] or 0)
            )
            if len(ms) >= FEW
        ],
        "stages": {
            stage: {
                "batches": len(of_stage[stage]),
                "rows": round(float(np.mean([len(batch["calls"]) for batch in of_stage[stage]])), 1),
                "ms": round(1e3 * float(np.mean([b["ended_s"] - b["began_s"] for b in of_stage[stage]])), 1),
                "halted": sum(batch["is_halted"] for batch in of_stage[stage]),
            }
            for stage in STAGES
            if of_stage[stage]
        },
    }


if __name__ == "__main__":
    sys.exit(main())
