"""Load on a Barkstream server: what many listeners at once would hear.

    python3 perf/load_test.py --rate 1 2 4 --duration 30 --seeds 0 1 2       open loop: Poisson arrivals at each rate
    python3 perf/load_test.py --clients 1 4 16 --duration 30                 closed loop: n clients, one request after another
    python3 perf/load_test.py --url HOST:PORT ... --output perf/results/DATE-load.json

Without --url a server is started for the measurement. Texts of three lengths in turn, every request with a seed of its own.
TTFA: client's send -> first audible chunk at the client. Underruns: of a player that starts at the first chunk. A request
that failed or was refused stays in the table. --output adds a row a run to a JSON array, and writes a CSV a run beside it
with every chunk's arrival. Needs numpy and tritonclient[grpc]. Table first, last line JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from load_report import (
    NOT_AUDIBLE,
    Outcome,
    Request,
    append_row,
    exit_with,
    origin,
    read_rows,
    summarize,
    table,
    write_requests,
)
from ttfa import default_voice, open_server

from barkstream.clients import AsyncClient, BarkstreamError
from barkstream.clients.playback import Arrival, simulate_playback
from barkstream.clients.protocol import Options

TEXTS = {
    "short": "Good morning, how are you today?",  # 2 to 3 s
    "medium": "The train left the station a little after seven, and the rain had stopped by then. "
    "Nobody in the carriage said a word until the first tunnel.",  # about 9 s
    "long": "We had planned to leave before sunrise, but the car would not start. "
    "My brother walked to the village and came back with a mechanic and a bag of warm bread. "
    "While they worked on the engine, the rest of us sat on the wall and ate. "
    "By noon we were on the road at last, and nobody was in a hurry any more.",  # about 20 s
}
NO_VOICE = "none"
PAUSE_S = 0.25  # between two requests of a conversation
TOLD, UNTOLD = "told", "untold"
RETRY_S = 1.0  # for a server that is unavailable and does not say for how long


@dataclass(frozen=True)
class Load:
    """One run: arrivals at a rate (open loop), or a number of clients (closed loop)."""

    rate_rps: float | None
    n_clients: int | None
    seed: int  # of the arrivals and of the requests

    @property
    def name(self) -> str:
        load = f"open-{self.rate_rps:g}rps" if self.rate_rps is not None else f"closed-{self.n_clients}"
        return f"{load}-seed{self.seed}"

    def row(self) -> dict[str, Any]:
        mode = "open" if self.rate_rps is not None else "closed"
        return {"mode": mode, "rate_rps": self.rate_rps, "n_clients": self.n_clients, "seed": self.seed}


@dataclass(frozen=True)
class Plan:
    """What every run asks for."""

    texts: Sequence[str]  # names
    voices: Sequence[str | None]
    duration_s: float  # no request is sent later than this
    max_requests: int | None
    max_seconds: float | None  # of one request's speech
    timeout_s: float  # longest wait for the next response
    ramp_s: float = 0.0  # closed loop: the clients come one after the other, the last one after so long
    by_sentence: str | None = None  # TOLD, UNTOLD: each sentence is a request of its own; None: the text is one

    def requests(self, seed: int) -> Iterator[Request]:
        """Without end, due at once: texts and voices in turn, so that each text meets each voice."""
        turns = itertools.product(self.voices, self.texts)
        for index, (voice, name) in enumerate(itertools.cycle(turns)):
            yield Request(index, 0.0, TEXTS[name], name, voice, seed=1000 * seed + index)

    def arrivals(self, rate_rps: float, seed: int) -> list[Request]:
        """Poisson arrivals within the duration."""
        generator = np.random.default_rng(seed)
        gaps_s = iter(lambda: generator.exponential(1 / rate_rps), None)
        due = itertools.takewhile(lambda due_s: due_s < self.duration_s, itertools.accumulate(gaps_s))
        requests = (replace(request, due_s=due_s) for due_s, request in zip(due, self.requests(seed), strict=False))
        return list(itertools.islice(requests, self.max_requests))


def main() -> int:
    arguments = parse_arguments()
    plan = plan_of(arguments)
    where = origin(arguments.gpu, arguments.n_gpus, arguments.commit, arguments.model)
    rows = []
    with open_server(arguments.url) as url:
        warm_up(url, plan, arguments.warmup)
        for load in loads(arguments):
            row, outcomes, sample_rate = measure(url, load, plan)
            rows.append({**where, **row, "note": arguments.note})
            keep(arguments.output, load, rows[-1], outcomes, sample_rate)
    print(table(rows))
    for error, n in sorted(error for row in rows for error in row["errors"].items()):
        print(f"failed: {n} x {error}")
    print(json.dumps(rows))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, nargs="+", default=[], help="open loop: requests a second; a run each")
    parser.add_argument("--clients", type=int, nargs="+", default=[], help="closed loop: clients; a run each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each run once with each (default: 0)")
    parser.add_argument(
        "--ramp", type=float, default=0.0, metavar="S", help="closed loop: clients come in turn over S seconds"
    )
    add_plan_arguments(parser)
    arguments = parser.parse_args()
    if not arguments.rate and not arguments.clients:
        parser.error("give --rate or --clients")
    return arguments


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that capacity.py has too."""
    parser.add_argument("--url", help="host:port of a running server's gRPC; without, one is started")
    parser.add_argument("--duration", type=float, default=30, metavar="S", help="of each run (default: %(default)s)")
    parser.add_argument("--requests", type=int, metavar="N", help="at most so many a run")
    parser.add_argument("--text", nargs="+", choices=TEXTS, default=list(TEXTS), help="in turn (default: all)")
    parser.add_argument(
        "--voice", nargs="+", metavar="NAME", help=f"in turn; {NO_VOICE}: no preset (default: the first)"
    )
    parser.add_argument("--max-seconds", type=float, metavar="S", help="of one request's speech")
    parser.add_argument(
        "--by-sentence",
        choices=(TOLD, UNTOLD),
        help="each sentence is a request of its own, as of a conversation; told: with what its listener has in hand",
    )
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="longest silence (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, metavar="N", help="requests before (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="perf/results/*-load.json that gets the rows")
    parser.add_argument("--model", help="what the server speaks with (default: what was exported last)")
    parser.add_argument("--gpu", help="the server's GPU (default: this machine's)")
    parser.add_argument("--n-gpus", type=int, help="that the server uses (default: this machine's)")
    parser.add_argument("--commit", help="of the server (default: this checkout's)")
    parser.add_argument("--note", default="", help="a remark that is kept with the rows")


def plan_of(arguments: argparse.Namespace) -> Plan:
    names = arguments.voice or [default_voice() or NO_VOICE]
    return Plan(
        texts=arguments.text,
        voices=[None if name == NO_VOICE else name for name in names],
        duration_s=arguments.duration,
        max_requests=arguments.requests,
        max_seconds=arguments.max_seconds,
        timeout_s=arguments.timeout,
        ramp_s=getattr(arguments, "ramp", 0.0),
        by_sentence=arguments.by_sentence,
    )


def loads(arguments: argparse.Namespace) -> list[Load]:
    open_loop = [Load(rate, None, seed) for rate in arguments.rate for seed in arguments.seeds]
    return open_loop + [Load(None, n, seed) for n in arguments.clients for seed in arguments.seeds]


def warm_up(url: str, plan: Plan, n_requests: int) -> None:
    """Requests that are not measured, two at a time. Raises BarkstreamError if none of them succeeds."""
    warm = replace(plan, texts=plan.texts[:1], max_requests=n_requests, duration_s=float("inf"))
    outcomes, _ = asyncio.run(run(url, Load(None, 2, seed=999), warm)) if n_requests else ([], 0)
    if outcomes and all(outcome.failed for outcome in outcomes):
        raise BarkstreamError(f"warm-up failed: {outcomes[0].error}", outcomes[0].status)


def measure(url: str, load: Load, plan: Plan) -> tuple[dict[str, Any], list[Outcome], int]:
    """One run: its row, its requests' outcomes in the order of their index, and the sample rate in Hz."""
    outcomes, sample_rate = asyncio.run(run(url, load, plan))
    return {**load.row(), "tool": "load_test", **summarize(outcomes, sample_rate)}, outcomes, sample_rate


async def run(url: str, load: Load, plan: Plan) -> tuple[list[Outcome], int]:
    async with AsyncClient(url, stall_timeout_s=plan.timeout_s) as client:
        sample_rate = await client.sample_rate()
        if load.rate_rps is not None:
            outcomes = await open_loop(client, plan.arrivals(load.rate_rps, load.seed), plan)
        else:
            outcomes = await closed_loop(client, load.n_clients or 0, load.seed, plan)
    return sorted(outcomes, key=lambda outcome: outcome.request.index), sample_rate


async def open_loop(client: AsyncClient, requests: Sequence[Request], plan: Plan) -> list[Outcome]:
    """Every request when it is due, whatever has become of those before it."""
    began = perf_counter()
    tasks = []
    for request in requests:
        await asyncio.sleep(request.due_s - (perf_counter() - began))
        tasks.append(asyncio.create_task(ask(client, request, plan, began)))
    return await asyncio.gather(*tasks)


async def closed_loop(client: AsyncClient, n_clients: int, seed: int, plan: Plan) -> list[Outcome]:
    """n clients, each with a request under way (from when it came) until the duration is over or max_requests have been sent.

    One who was refused waits as long as the server says, and asks for something else.
    """
    requests = itertools.islice(plan.requests(seed), plan.max_requests)
    began = perf_counter()

    async def listen(client_index: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        await asyncio.sleep(plan.ramp_s * client_index / n_clients)
        while (due_s := perf_counter() - began) < plan.duration_s and (request := next(requests, None)) is not None:
            outcomes.append(await ask(client, replace(request, due_s=due_s), plan, began))
            if outcomes[-1].status == "UNAVAILABLE":
                await asyncio.sleep(outcomes[-1].retry_after_s or RETRY_S)
        return outcomes

    heard = await asyncio.gather(*(listen(i) for i in range(n_clients)))
    return [outcome for outcomes in heard for outcome in outcomes]


async def ask(client: AsyncClient, request: Request, plan: Plan, began: float) -> Outcome:
    """One request from send to end; a failure is in the outcome. began: perf_counter at the run's start."""
    outcome = Outcome(request, sent_s=perf_counter() - began, arrivals=[])
    texts = re.split(r"(?<=[.!?]) ", request.text) if plan.by_sentence else [request.text]
    try:
        for index, text in enumerate(texts):
            await hear(client, text, index, outcome, plan, began)
        if outcome.ttfa_s is None:
            outcome.status, outcome.error = "UNKNOWN", NOT_AUDIBLE
    except BarkstreamError as error:
        outcome.status, outcome.error = error.status, str(error)
    outcome.end_s = perf_counter() - began
    return outcome


async def hear(client: AsyncClient, text: str, index: int, outcome: Outcome, plan: Plan, began: float) -> None:
    """A text from send to end, which goes on behind what there is of the outcome. index: of it, in the request."""
    request = outcome.request
    options = Options(voice=request.voice, seed=request.seed + index, max_seconds=plan.max_seconds)
    sent_s = perf_counter() - began - outcome.sent_s
    if index:
        rate = await client.sample_rate()
        outcome.arrivals.append(Arrival(sent_s, round(PAUSE_S * rate), 0.0))
        if plan.by_sentence == TOLD:
            options["lead_s"] = simulate_playback(outcome.arrivals, rate).in_hand_s
    stream = client.stream(text, **options)
    try:
        async for _ in stream:
            pass
    finally:
        outcome.arrivals += [replace(arrival, at_s=sent_s + arrival.at_s) for arrival in stream.arrivals]


def keep(output: Path | None, load: Load, row: dict[str, Any], outcomes: Sequence[Outcome], sample_rate: int) -> None:
    """Write a run's row and its requests as soon as it is over; nothing without `output`."""
    if output is None:
        return
    n_before = len(read_rows(output)) if output.exists() else 0
    requests = output.with_name(f"{output.stem}-{n_before + 1:02}-{load.name}.csv")
    write_requests(requests, outcomes, sample_rate)
    row["requests_csv"] = requests.name
    append_row(output, row)


if __name__ == "__main__":
    exit_with(main)
