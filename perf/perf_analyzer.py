"""Triton's own load tool, `perf_analyzer`, on the streaming model, and its export as a row of our table.

    python3 perf/perf_analyzer.py --url HOST:PORT --clients 2 --requests 20 [--output perf/results/DATE-load.json]
    python3 perf/perf_analyzer.py --url HOST:PORT --rate 1.5 --requests 60         Poisson arrivals
    python3 perf/perf_analyzer.py --read EXPORT.json                               an export made before

Runs `perf_analyzer -m bark -i grpc --streaming --async ... --profile-export-file` from the PATH (pip install perf-analyzer;
Triton's SDK container has it). Its export holds every response with its samples, about .6 MB a second of audio, and the
time that each arrived; so TTFA and underruns are those of load_test.py. perf_analyzer stops at the first request that is refused or
fails. Table first, last line JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from load_report import NOT_AUDIBLE, Arrival, Outcome, Request, exit_with, origin, summarize, table
from load_test import NO_VOICE, TEXTS, Load, add_plan_arguments, keep, plan_of

from barkstream.clients import Client

NS = 1e9  # perf_analyzer's clock, a second


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        export = arguments.read or profile(arguments, Path(folder))
        with open(export) as file:
            experiments = json.load(file)["experiments"]
    where = origin(arguments.gpu, arguments.n_gpus, arguments.commit, arguments.model)
    rows = []
    for experiment in experiments:
        load, outcomes = load_of(experiment["experiment"]), outcomes_of(experiment["requests"])
        named = {**where, **load.row(), "tool": "perf_analyzer", "seed": None, "note": arguments.note}
        rows.append({**named, **summarize(outcomes, arguments.sample_rate)})
        keep(arguments.output, load, rows[-1], outcomes, arguments.sample_rate)
    print(table(rows))
    print(json.dumps(rows))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--clients", type=int, help="closed loop: requests under way at a time")
    load.add_argument("--rate", type=float, help="open loop: requests a second")
    load.add_argument("--read", type=Path, metavar="JSON", help="do not run, read this export")
    parser.add_argument("--sample-rate", type=int, help="Hz (default: the server's, 24000 with --read)")
    add_plan_arguments(parser)
    parser.set_defaults(requests=20, url="127.0.0.1:8001")
    arguments = parser.parse_args()
    if arguments.sample_rate is None:
        arguments.sample_rate = 24000 if arguments.read else sample_rate_of(arguments.url)
    return arguments


def sample_rate_of(url: str) -> int:
    with Client(url) as client:
        return client.sample_rate


def profile(arguments: argparse.Namespace, folder: Path) -> Path:
    """Run perf_analyzer; the path of its export. Raises SystemExit after its own words, if it fails or is not there."""
    inputs, export = folder / "inputs.json", folder / "export.json"
    inputs.write_text(json.dumps({"data": input_data(arguments)}))
    if not shutil.which("perf_analyzer"):
        raise SystemExit(
            "no perf_analyzer on the PATH: pip install perf-analyzer (it needs glibc 2.38), see docs/load.md"
        )
    if status := subprocess.run(command(arguments, inputs, export), stdout=sys.stderr).returncode:
        raise SystemExit(
            f"perf_analyzer ended with status {status}; it gives up at the first refused or failed request"
        )
    return export


def command(arguments: argparse.Namespace, inputs: Path, export: Path) -> list[str]:
    """perf_analyzer's command line."""
    if arguments.clients:
        load = [f"--concurrency-range={arguments.clients}"]
    else:
        load = [f"--request-rate-range={arguments.rate}", "--request-distribution=poisson"]
    return [
        *["perf_analyzer", "-m", "bark", "-u", arguments.url, "-i", "grpc", "--streaming", "--async", *load],
        f"--request-count={arguments.requests}",
        f"--input-data={inputs}",
        f"--profile-export-file={export}",
    ]


def input_data(arguments: argparse.Namespace) -> list[dict[str, list[Any]]]:
    """perf_analyzer's `data`: the requests of load_test.py, which it sends in turn."""
    plan = plan_of(arguments)
    requests = itertools.islice(plan.requests(seed=0), plan.max_requests)
    return [input_of(request, plan.max_seconds) for request in requests]


def input_of(request: Request, max_seconds: float | None) -> dict[str, list[Any]]:
    optional = {"voice": request.voice, "max_seconds": max_seconds}
    given = {name: [value] for name, value in optional.items() if value is not None}
    return {"text": [request.text], "seed": [request.seed], **given}


def load_of(experiment: dict[str, Any]) -> Load:
    """An export's `experiment`: {"mode": "concurrency" or "request_rate", "value": n}."""
    value = experiment["value"]
    return Load(None, int(value), 0) if experiment["mode"] == "concurrency" else Load(float(value), None, 0)


def outcomes_of(requests: list[dict[str, Any]]) -> list[Outcome]:
    """An export's requests. The time that a request was due is not in it: taken as the time that it was sent."""
    requests = sorted(requests, key=lambda request: request["timestamp"])
    began = requests[0]["timestamp"] if requests else 0
    return [outcome_of(index, request, began) for index, request in enumerate(requests)]


def outcome_of(index: int, exported: dict[str, Any], began: int) -> Outcome:
    sent, given = exported["timestamp"], exported["request_inputs"]
    name = next((name for name, text in TEXTS.items() if text == given["text"]), "")
    voice = given.get("voice", NO_VOICE)
    request = Request(index, (sent - began) / NS, given["text"], name, voice, int(given["seed"]))
    outcome = Outcome(request, request.due_s, list(arrivals_of(exported)))
    outcome.end_s = (max(exported["response_timestamps"], default=sent) - began) / NS
    if outcome.ttfa_s is None:
        outcome.status, outcome.error = "UNKNOWN", NOT_AUDIBLE
    return outcome


def arrivals_of(exported: dict[str, Any]) -> Iterator[Arrival]:
    """The chunks; a response without samples (FINAL) is none. One sample alone is a number, not a list."""
    for at, outputs in zip(exported["response_timestamps"], exported["response_outputs"], strict=True):
        if outputs["audio"] not in ("", []):
            samples = np.atleast_1d(np.array(outputs["audio"], np.float32))
            yield Arrival((at - exported["timestamp"]) / NS, samples.size, float(np.abs(samples).max()))


if __name__ == "__main__":
    exit_with(main)
