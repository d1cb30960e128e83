"""What a load test found: each request's outcome, a CSV of them, and a row of a table for each run.

All load tools (load_test.py, perf_analyzer_report.py, locustfile.py)
come down to `Outcome`; failed and refused requests stay in the table.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # an installed barkstream is not needed

from barkstream.clients import BarkstreamError  # noqa: E402
from barkstream.clients.playback import Arrival, Playback, simulate_playback, time_to_first_audio  # noqa: E402
from barkstream.server import ServerError  # noqa: E402

PERCENTILES = (50, 95, 99)
NOT_AUDIBLE = "nothing audible came"
COLUMNS = ("mode", "load", "requests", "failed", "refused", "ttfa_ms_p50", "ttfa_ms_p95", "ttfa_ms_p99", "underruns",
           "audio_s_per_s")  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What one listener asks for."""

    index: int
    due_s: float  # since the run began; open loop: when it must be sent
    text: str
    text_name: str
    voice: str | None
    seed: int


@dataclass
class Outcome:
    """What came of one request."""

    request: Request
    sent_s: float  # since the run began
    arrivals: list[Arrival] = field(default_factory=list)  # seconds since it was sent
    end_s: float = 0.0  # since the run began: the last response, or the failure
    status: str = "OK"  # or gRPC's name of the error
    error: str = ""

    @property
    def ttfa_s(self) -> float | None:
        return time_to_first_audio(self.arrivals)

    @property
    def failed(self) -> bool:
        return self.status != "OK"

    @property
    def retry_after_s(self) -> float | None:
        """When to ask again, as a server that is full says; None for any other outcome."""
        return BarkstreamError(self.error, self.status).retry_after_s

    def audio_s(self, sample_rate: int) -> float:
        return sum(chunk.n_samples for chunk in self.arrivals) / sample_rate

    def playback(self, sample_rate: int) -> Playback:
        """A player that starts at the first chunk, as `barkstream.clients.playback` simulates it."""
        return simulate_playback(self.arrivals, sample_rate)


def summarize(outcomes: Sequence[Outcome], sample_rate: int) -> dict[str, Any]:
    """A run's row, without what names the run. Percentiles are over the requests that did not fail.

    audio_s_per_s: audio received, that of requests which failed later included, over the time from the first send to the
    last response. underruns: playback ran dry, counted over all requests. send_lag_ms_max: how much later than due a
    request was sent; large, the load generator was the bottleneck.
    """
    done = [outcome for outcome in outcomes if not outcome.failed]
    playbacks = [outcome.playback(sample_rate) for outcome in outcomes]
    audio_s = sum(outcome.audio_s(sample_rate) for outcome in outcomes)
    span_s = max((o.end_s for o in outcomes), default=0.0) - min((o.sent_s for o in outcomes), default=0.0)
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(done),
        "refused": sum(outcome.retry_after_s is not None for outcome in outcomes),
        **percentiles("ttfa_ms", [1000 * o.ttfa_s for o in done if o.ttfa_s is not None]),
        "underruns": sum(playback.n_underruns for playback in playbacks),
        "underrun_requests": sum(playback.n_underruns > 0 for playback in playbacks),
        "underrun_s": round(sum(playback.underrun_s for playback in playbacks), 3),
        "audio_s_per_s": round(audio_s / span_s, 3) if span_s else 0.0,
        "span_s": round(span_s, 3),
        "audio_s": round(audio_s, 3),
        "streams_max": most_at_once(outcomes),
        "send_lag_ms_max": round(1000 * max((o.sent_s - o.request.due_s for o in outcomes), default=0.0), 1),
        "errors": dict(Counter(f"{o.status}: {o.error}" for o in outcomes if o.failed)),
    }


def percentiles(key: str, values: Iterable[float]) -> dict[str, float | None]:
    """`{key}_p50` and so on; None where there are no values."""
    known = list(values)
    return {f"{key}_p{p}": round(float(np.percentile(known, p)), 2) if known else None for p in PERCENTILES}


def most_at_once(outcomes: Iterable[Outcome]) -> int:
    """The largest number of requests that were under way at a time, as the client saw it; refused ones included."""
    edges = sorted(edge for o in outcomes for edge in ((o.sent_s, 1), (o.end_s, -1)))
    return int(np.cumsum([step for _, step in edges]).max(initial=0)) if edges else 0


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a script; a server that cannot be reached or started is one sentence, not a traceback."""
    try:
        sys.exit(main())
    except (BarkstreamError, ServerError) as error:
        sys.exit(str(error))


def origin(gpu: str | None, n_gpus: int | None, commit: str | None, model: str | None) -> dict[str, Any]:
    """Where a run's figures come from; what is not given is found out on this machine."""
    names = gpu_names()
    return {
        "gpu": gpu or (names[0] if names else None),
        "n_gpus": len(names) if n_gpus is None else n_gpus,
        "cpu": cpu_name(),
        "commit": commit or git_commit(),
        "model": model or exported_model(),
    }


def gpu_names() -> list[str]:
    """The GPUs that nvidia-smi lists, empty without it."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[:-1]


def cpu_name() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "unknown"


def git_commit() -> str:
    """Of the checkout, with -dirty where files were changed; "unknown" outside one."""
    if not shutil.which("git"):
        return "unknown"
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def exported_model() -> str:
    """Name of the checkpoint that `make export` wrote last."""
    marker = ROOT / "model_repository/.exported"
    return Path(marker.read_text().strip()).name if marker.exists() else "unknown"


def write_requests(path: Path, outcomes: Iterable[Outcome], sample_rate: int) -> None:
    """A CSV with a line a request; the chunks' arrivals, durations and peaks are lists, separated by spaces."""
    lines = [describe_request(outcome, sample_rate) for outcome in outcomes]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else ["index"])
        writer.writeheader()
        writer.writerows(lines)


def describe_request(outcome: Outcome, sample_rate: int) -> dict[str, Any]:
    """One request's line of the CSV."""
    request, played = outcome.request, outcome.playback(sample_rate)
    return {
        "index": request.index,
        "text": request.text_name,
        "n_characters": len(request.text),
        "voice": request.voice or "",
        "seed": request.seed,
        "due_s": f"{request.due_s:.4f}",
        "sent_s": f"{outcome.sent_s:.4f}",
        "end_s": f"{outcome.end_s:.4f}",
        "status": outcome.status,
        "error": outcome.error,
        "ttfa_ms": "" if outcome.ttfa_s is None else f"{1000 * outcome.ttfa_s:.2f}",
        "audio_s": f"{outcome.audio_s(sample_rate):.3f}",
        "underruns": played.n_underruns,
        "underrun_s": f"{played.underrun_s:.3f}",
        "smallest_lead_s": "" if played.smallest_lead_s is None else f"{played.smallest_lead_s:.3f}",
        "chunk_at_ms": " ".join(f"{1000 * chunk.at_s:.2f}" for chunk in outcome.arrivals),
        "chunk_audio_s": " ".join(f"{chunk.n_samples / sample_rate:.3f}" for chunk in outcome.arrivals),
        "chunk_peak": " ".join(f"{chunk.peak:.4f}" for chunk in outcome.arrivals),
    }


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a run to a *-load.json: a JSON array, a line a run."""
    rows = [*read_rows(path), row] if path.exists() else [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows for people."""
    cells = [COLUMNS, *(tuple(cell(row, column) for column in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{text:>{w}}" for text, w in zip(line, widths, strict=True)) for line in cells)


def cell(row: dict[str, Any], column: str) -> str:
    if column == "load":
        return f"{row['rate_rps']:g} rps" if row["rate_rps"] is not None else f"{row['n_clients']} clients"
    value = row[column]
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
