"""Load tests as curves: percentiles of the time to first audio, and audio made a second, over the load.

    python perf/plot_load.py perf/results/*-load.json --out docs/load.png      needs matplotlib

Rates (open loop) and clients (closed loop) get a row of plots each, if there are any; runs with other seeds are averaged.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from load_report import read_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AXES = {"open": ("rate_rps", "requests a second"), "closed": ("n_clients", "clients")}
LINES = {"ttfa_ms_p50": "-", "ttfa_ms_p95": "--", "ttfa_ms_p99": ":"}
PROMISE_MS = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="*-load.json")
    parser.add_argument("--out", type=Path, default=Path("load.png"))
    arguments = parser.parse_args()
    plot([row for path in arguments.results for row in read_rows(path)], arguments.out)
    print(arguments.out)


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the figure; rows of several machines, models or notes are curves of their own."""
    modes = [mode for mode in AXES if any(row["mode"] == mode for row in rows)]
    figure, grid = plt.subplots(len(modes), 2, figsize=(11, 4 * len(modes)), squeeze=False, layout="constrained")
    for (left, right), mode in zip(grid, modes, strict=True):
        series = [row for row in rows if row["mode"] == mode]
        for index, (name, same) in enumerate(itertools.groupby(sorted(series, key=named), key=named)):
            draw(left, right, list(same), AXES[mode][0], name, f"C{index}")
        finish(left, f"{mode} loop: {AXES[mode][1]}", "time to first audio, ms")
        finish(right, f"{mode} loop: {AXES[mode][1]}", "audio-s/s")
        left.axhline(PROMISE_MS, color="grey", linewidth=0.7)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def named(row: dict[str, Any]) -> str:
    where = f"{row['n_gpus']} x {row['gpu']}" if row["gpu"] else row["cpu"]
    return " · ".join(filter(None, [where, row["model"], row["note"]]))


def draw(left: Any, right: Any, rows: list[dict[str, Any]], x: str, name: str, color: str) -> None:
    for key, style in LINES.items():
        left.plot(*mean_over_seeds(rows, x, key), style, marker=".", color=color, label=f"{name} {key[-3:]}")
    right.plot(*mean_over_seeds(rows, x, "audio_s_per_s"), marker=".", color=color, label=name)


def mean_over_seeds(rows: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Sorted x and the mean y at each; a run without a value (every request failed) is left out."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if row[y] is not None:
            values.setdefault(row[x], []).append(row[y])
    at = sorted(values)
    return at, [float(np.mean(values[each])) for each in at]


def finish(axes: Any, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
