"""Can chunk boundaries be heard? Steps between samples and changes of spectrum there, against elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from listening import Audio, Clip

FRAME = 320  # samples


def jump(audio: Audio, at: int) -> float:
    """Step between the last sample before `at` and the first from it on."""
    return float(abs(audio[at] - audio[at - 1]))


def spectral_flux(audio: Audio, at: int, n: int = 480) -> float:
    """Distance of the log spectra of the 20 ms before `at` and the 20 ms from it on."""
    before, after = (
        np.log(np.abs(np.fft.rfft(piece * np.hanning(n))) + 1e-3) for piece in (audio[at - n : at], audio[at : at + n])
    )
    return float(np.sqrt(np.mean((after - before) ** 2)))


def boundary_test(
    streamed: list[Clip], offline: list[Clip], measure: Callable[[Audio, int], float], n_draws: int = 5000
) -> dict[str, float]:
    """Do chunk boundaries raise `measure`? One-sided permutation test against frame borders inside the chunks.

    Boundaries lie at fixed times, where speech is louder than at its ends; so what is compared is log(streamed /
    offline) at the same place of the same tokens: offline audio has no boundary there. Inside means at least four
    frames from any boundary.
    """
    pairs = [(a, b) for a, b in zip(streamed, offline, strict=True) if a.boundaries and len(a.audio) == len(b.audio)]
    at_boundaries, inside, raw = [], [], []
    for a, b in pairs:
        places = np.arange(2 * FRAME, len(a.audio) - 2 * FRAME, FRAME)
        values = np.array([[measure(clip.audio, int(i)) for i in places] for clip in (a, b)]) + 1e-6
        change, distance = np.log(values[0] / values[1]), np.abs(places[:, None] - np.array(a.boundaries)).min(axis=1)
        at_boundaries.append(change[distance == 0])
        inside.append(change[distance >= 4 * FRAME])
        raw.append([values[0][distance == 0], values[1][distance == 0], values[0][distance >= 4 * FRAME]])
    rng, n = np.random.default_rng(0), sum(map(len, at_boundaries))
    observed = float(np.concatenate(at_boundaries).mean())
    drawn = (
        sum(
            rng.choice(pool, (n_draws, len(found))).sum(axis=1)
            for found, pool in zip(at_boundaries, inside, strict=True)
        )
        / n
    )
    streamed_there, offline_there, streamed_inside = (
        float(np.concatenate(values).mean()) for values in zip(*raw, strict=True)
    )
    return {
        "n": n,
        "streamed_at_boundaries": streamed_there,
        "offline_at_the_same_places": offline_there,
        "streamed_inside_chunks": streamed_inside,
        "log_ratio_at_boundaries": observed,
        "log_ratio_inside": float(drawn.mean()),
        "p": float((1 + np.sum(drawn >= observed)) / (n_draws + 1)),
    }


def boundary_report(streamed: list[Clip], offline: list[Clip]) -> dict[str, Any]:
    report: dict[str, Any] = {
        name: boundary_test(streamed, offline, f) for name, f in (("jump", jump), ("flux", spectral_flux))
    }
    report["passed"] = all(report[name]["p"] > 0.01 for name in ("jump", "flux"))
    return report
