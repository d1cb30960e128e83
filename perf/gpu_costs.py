"""What Bark large takes on a GPU, as it was measured (docs/performance.md): for those who have none, perf/simulate_load.py and
perf/pretended_gpu.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

KEYS = 917  # positions behind which coarse steps were measured: the middle of one of the reference's windows
PREFIX = 886  # of a coarse prefill there
PREFIX_STEP = 128  # positions to a multiple of which a prefill is filled up


@dataclass(frozen=True)
class Costs:
    """Milliseconds, Bark large, measured on an H100 (docs/performance.md). Semantic ones between those measured there are estimates: steps
    of 5, 9, 17, 24, 25 and 32 rows, prefills of two to four; of h100-kv8 all but steps of 1, 4, 8, 16, 32 and, coarse, 24 rows."""

    semantic_step: dict[int, float]  # by rows, between which it grows in proportion
    coarse_step: dict[int, float]
    row_keys: float  # of a coarse step: a row's keys and values behind KEYS positions
    semantic_prefill: tuple[float, ...] = (0.95, 1.2, 1.4, 1.6)  # of one to four rows
    coarse_prefill: tuple[float, ...] = (1.65, 2.7, 3.7, 4.7)
    # Of one to eight windows of up to 256 frames.
    fine: tuple[float, ...] = (5.85, 6.9, 8.3, 9.6, 12.8, 12.8, 16.0, 16.0)
    long_fine: float = 10.7  # of one of 1,024
    codec: tuple[float, ...] = (0.55, 1.1, 1.35, 1.65, 2.0, 2.3, 2.55, 2.75)  # of one to eight chunks of any lengths

    def step(self, stage: str, n_rows: int) -> float:
        steps = self.semantic_step if stage == "semantic" else self.coarse_step
        return float(np.interp(n_rows, list(steps), list(steps.values())))

    def times(self, factor: float) -> Costs:
        """All of them so many times as long."""

        def longer(cost: Any) -> Any:
            if isinstance(cost, dict):
                return {n_rows: ms * factor for n_rows, ms in cost.items()}
            return tuple(ms * factor for ms in cost) if isinstance(cost, tuple) else cost * factor

        return Costs(**{each.name: longer(getattr(self, each.name)) for each in fields(self)})

    def prefill(self, stage: str, n_rows: int) -> float:
        return together(self.semantic_prefill if stage == "semantic" else self.coarse_prefill, n_rows)


def together(costs_ms: tuple[float, ...], n: int) -> float:
    """What n take together, where costs_ms are those of one to as many as go at once."""
    at_once = len(costs_ms)
    return n // at_once * costs_ms[-1] + (costs_ms[n % at_once - 1] if n % at_once else 0.0)


def prefix_share(n_positions: int) -> float:
    """Of what a prefill of the reference's windows takes, the part that one of so many positions does."""
    return -(-n_positions // PREFIX_STEP) / -(-PREFIX // PREFIX_STEP)


# Of kernels' numbers of rows, and of one more each.
MEASURED = 1, 2, 4, 5, 8, 9, 16, 17, 24, 25, 32


def by_rows(*steps_ms: float) -> dict[int, float]:
    return dict(zip(MEASURED, steps_ms, strict=True))


COSTS = {
    "h100-int8": Costs(
        by_rows(0.21, 0.28, 0.35, 0.37, 0.38, 0.44, 0.46, 0.57, 0.6, 0.66, 0.7),
        by_rows(0.215, 0.29, 0.355, 0.381, 0.387, 0.518, 0.543, 0.69, 0.723, 0.813, 0.867),
        0.0155,
    ),
    "h100": Costs(
        by_rows(0.255, 0.33, 0.405, 0.41, 0.44, 0.49, 0.586, 0.68, 0.8, 0.85, 0.97),
        by_rows(0.265, 0.37, 0.495, 0.456, 0.515, 0.608, 0.775, 0.903, 1.078, 1.136, 1.301),
        0.029,
    ),
    "h100-kv8": Costs(
        by_rows(0.258, 0.32, 0.385, 0.39, 0.411, 0.47, 0.528, 0.58, 0.62, 0.67, 0.717),
        by_rows(0.258, 0.32, 0.398, 0.4, 0.435, 0.53, 0.584, 0.69, 0.777, 0.81, 0.893),
        0.0155,
    ),
}
