"""The highest rate of requests at which a Barkstream server keeps its promise to every listener.

    python3 perf/capacity.py [--url HOST:PORT] [--start 1] [--duration 30] [--seeds 0 1] [--output perf/results/DATE-load.json]

The promise: p95 of the time to first audio at most 250 ms, no underrun, every request complete; each can be changed. Open
loop, Poisson arrivals. The rate is doubled (or halved) until the promise breaks (or holds), then the gap is halved until it is
within --resolution. A rate passes if every seed does. Every run tried is a row of the table, and of --output, with `kept`.
Needs numpy and tritonclient[grpc]. Table first, last line JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from load_report import exit_with, origin, table
from load_test import Load, Plan, add_plan_arguments, keep, measure, plan_of, warm_up
from ttfa import open_server

MIN_RATE_RPS, MAX_RATE_RPS = 1 / 64, 4096.0  # where the search gives up


@dataclass(frozen=True)
class Promise:
    """What a rate must keep to count."""

    ttfa_ms_p95: float = 250.0
    underruns: int = 0  # at most, over all requests
    complete: float = 1.0  # at least, share of the requests

    def kept(self, row: dict[str, Any]) -> bool:
        """Whether a run's row keeps it; a run without a request shows nothing, so it does not."""
        p95, n = row["ttfa_ms_p95"], row["requests"]
        return (
            p95 is not None
            and p95 <= self.ttfa_ms_p95
            and row["underruns"] <= self.underruns
            and n - row["failed"] >= self.complete * n
        )


def main() -> int:
    arguments = parse_arguments()
    plan, rows = plan_of(arguments), []
    promise = Promise(arguments.ttfa_ms, arguments.underruns, arguments.complete)
    where = origin(arguments.gpu, arguments.n_gpus, arguments.commit, arguments.model)

    def try_rate(url: str, rate_rps: float, seed: int) -> bool:
        row = trial(url, Load(rate_rps, None, seed), plan, promise, {**where, "note": arguments.note}, arguments)
        rows.append(row)
        print(f"{rate_rps:8.3f} rps, seed {seed}: {'kept' if row['kept'] else 'broken'}", file=sys.stderr, flush=True)
        return bool(row["kept"])

    with open_server(arguments.url) as url:
        warm_up(url, plan, arguments.warmup)
        capacity_rps = highest_rate(
            lambda rate_rps: all(try_rate(url, rate_rps, seed) for seed in arguments.seeds),
            arguments.start,
            arguments.resolution,
        )
    print(table(rows))
    print(f"capacity: {capacity_rps:.3g} requests/s" if capacity_rps else "the promise was kept at no rate")
    print(json.dumps({"benchmark": "capacity", "capacity_rps": capacity_rps, "promise": asdict(promise), "runs": rows}))
    return 0 if capacity_rps else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=float, default=1.0, metavar="RPS", help="first rate (default: %(default)s)")
    parser.add_argument("--resolution", type=float, default=0.1, help="relative gap to stop at (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a rate must pass with each (default: 0)")
    parser.add_argument("--ttfa-ms", type=float, default=Promise.ttfa_ms_p95, help="p95 (default: %(default)s)")
    parser.add_argument("--underruns", type=int, default=Promise.underruns, help="at most (default: %(default)s)")
    parser.add_argument("--complete", type=float, default=Promise.complete, help="share (default: %(default)s)")
    add_plan_arguments(parser)
    return parser.parse_args()


def trial(
    url: str, load: Load, plan: Plan, promise: Promise, named: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One run's row, kept on disk as load_test.py keeps it."""
    row, outcomes, sample_rate = measure(url, load, plan)
    row = {**named, **row, "promise": asdict(promise), "kept": promise.kept(row)}
    keep(arguments.output, load, row, outcomes, sample_rate)
    return row


def highest_rate(passes: Callable[[float], bool], start: float, resolution: float) -> float | None:
    """The highest rate seen to pass, known to within `resolution` of one that fails; None if none passes.

    Assumes that a rate passes if a higher one does: noise near the edge moves the answer, hence several seeds.
    """
    good, bad = None, None
    rate = start
    while MIN_RATE_RPS <= rate <= MAX_RATE_RPS and (good is None or bad is None):
        if passes(rate):
            good, rate = rate, 2 * rate
        else:
            bad, rate = rate, rate / 2
    while good is not None and bad is not None and bad > good * (1 + resolution):
        middle = (good + bad) / 2
        if passes(middle):
            good = middle
        else:
            bad = middle
    return good


if __name__ == "__main__":
    exit_with(main)
