"""Sampling without state: the noise of a token is a function of (seed, stage, position), never of the run.

Random bits come from NumPy's Philox (4x64, 10 rounds): key = (seed, stage), counter = (block, position, 0, 0). So a token
does not depend on who shares the batch, where a window was cut, or which engine ran. Semantic and coarse tokens are drawn
by Gumbel-max, argmax(logits / temperature + noise), which samples exactly from the softmax. The fine graph draws by
inverse CDF from one uniform a token (see `docs/architecture.md` for why).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

SEMANTIC, COARSE, FINE = 1, 2, 3  # the stage word of the generator's key
LARGEST_UNIFORM = np.float32(1 - 2**-24)  # the largest float32 below 1


@dataclass(frozen=True)
class Sampling:
    """How one row draws its tokens."""

    seed: int = 0
    temperature: float = 0.7  # 0: argmax
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_eos_p: float = 1.0  # stop when the end token's probability reaches it; 1: only when it is drawn


def uniforms(seed: int, stage: int, position: int, n: int) -> Floats:
    """n uniform numbers in (0, 1) for one position.

    Element i is half i % 2 (low half first) of word i // 2 of the Philox stream that starts at the position.
    """
    key = np.array([seed, stage], np.uint64)
    counter = np.array([0, position, 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw((n + 1) // 2)
    halves = words.astype("<u8").view("<u4")[:n]
    return np.minimum(((halves + 0.5) * 2.0**-32).astype(np.float32), LARGEST_UNIFORM)


def uniforms_of_positions(seed: int, stage: int, positions: NDArray[np.int64], n: int) -> Floats:
    """The same numbers for many positions [P] at once: [P, n]. A generator a position would take 20 us each."""
    n_blocks = -(-n // 8)
    counter = np.zeros((4, len(positions), n_blocks), np.uint64)
    counter[0] = 1 + np.arange(n_blocks, dtype=np.uint64)  # NumPy counts up before it draws a block
    counter[1] = positions.astype(np.uint64)[:, None]
    words = philox(counter, np.array([seed, stage], np.uint64))
    in_order = np.ascontiguousarray(np.moveaxis(words, 0, -1), "<u8").reshape(len(positions), -1)
    halves = in_order.view("<u4")[:, :n]
    return np.minimum(((halves + 0.5) * 2.0**-32).astype(np.float32), LARGEST_UNIFORM)


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): counter [4, ...], key [2] -> [4, ...]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    with np.errstate(over="ignore"):
        for _ in range(10):
            high0, low0 = _wide_product(np.uint64(0xD2E7470EE14C6C93), c0)
            high1, low1 = _wide_product(np.uint64(0xCA5A826395121157), c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + np.uint64(0x9E3779B97F4A7C15), k1 + np.uint64(0xBB67AE8584CAA73B)
    return np.stack([c0, c1, c2, c3])


def gumbel_noise(seed: int, stage: int, position: int, n: int) -> Floats:
    """Standard Gumbel noise [n] for one position's vocabulary."""
    return -np.log(-np.log1p(-uniforms(seed, stage, position, n)))


def keep_likely(logits: Floats, top_k: int, top_p: float) -> Floats:
    """Logits [V] with all but the likely ones at -inf: top-p first, on the plain logits, then top-k (Suno's order)."""
    if top_p < 1:
        order = np.argsort(logits)[::-1]
        cumulative = np.cumsum(_softmax(logits[order]))
        n_kept = int(np.searchsorted(cumulative, top_p, side="right")) + 1  # the one that crosses top_p stays
        logits = _with_minus_inf(logits, order[n_kept:])
    if 0 < top_k < len(logits):
        smallest_kept = np.partition(logits, -top_k)[-top_k]
        logits = _with_minus_inf(logits, logits < smallest_kept)
    return logits


def draw(logits: Floats, noise: Floats, sampling: Sampling) -> tuple[int, Floats]:
    """One token from logits [V] and its noise [V]; also the tempered logits it was drawn from (for `ends`)."""
    kept = keep_likely(logits, sampling.top_k, sampling.top_p)
    if sampling.temperature == 0:
        return int(np.argmax(kept)), kept
    tempered = kept / np.float32(sampling.temperature)
    return int(np.argmax(tempered + noise)), tempered


def ends(token: int, tempered: Floats, end: int, sampling: Sampling) -> bool:
    """Whether speech ends here: the end token was drawn, or its probability reaches min_eos_p (Suno's rule)."""
    if token == end or sampling.temperature == 0 or sampling.min_eos_p >= 1:
        return token == end
    peak = tempered.max()
    return bool(np.exp(tempered[end] - peak) >= sampling.min_eos_p * np.exp(tempered - peak).sum())


def sentence_seed(seed: int, index: int) -> int:
    """A seed of its own for each sentence of a text, so that no two share their noise."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]) >> 1  # fits INT64


def _wide_product(a: np.uint64, b: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """High and low 64 bits of a * b."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low) >> half), a * b


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def _with_minus_inf(logits: Floats, where: NDArray) -> Floats:
    masked = logits.copy()
    masked[where] = -np.inf
    return masked
