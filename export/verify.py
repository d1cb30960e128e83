"""Compares every artifact with its plain PyTorch twin, on fresh random inputs.

`python -m barkstream.export.verify CHECKPOINT` prints a table of errors and bounds,
and exits with 1 if any bound is passed. Needs PyTorch and onnxruntime.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import torch

from barkstream import gpt
from barkstream.export.checkpoint import Source
from barkstream.export.sources import add_arguments, open_source
from barkstream.export.write import STAGES, fingerprint
from barkstream.tokens import Checkpoint

N_DECODE_STEPS = 6
POISON = 1e3  # what lies in the unused tail of the KV cache: an over-read shows
BOUNDS = {  # float32, int8
    "logits": (1e-4, 0.1),  # of the largest logit
    "probability": (1e-4, 0.1),  # by which a fine token's draw misses its step of the cumulative distribution
    "margin": (1e-4, 0.1),  # fine, argmax: best logit - the token's, of the largest logit
    "samples": (1e-4, 1e-4),  # full scale is 1
}


class Check(NamedTuple):
    """One line of the table."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def __str__(self) -> str:
        return f"{self.name:52s} {self.error:10.2e} {self.bound:10.1e}  {'ok' if self.passed else 'FAILED'}"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    print(f"{'largest error against the PyTorch twin':52s} {'error':>10s} {'bound':>10s}  seed {args.seed}")
    failed = 0
    try:
        for check in verify(open_source(args), args.repository, args.seed):
            print(check, flush=True)
            failed += not check.passed
    except (ValueError, OSError) as error:
        print(f"barkstream verify: {error}", file=sys.stderr)
        return 1
    print(f"{failed} of the checks failed" if failed else "every artifact agrees with its twin")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="barkstream verify",
        description="Compare a model repository's artifacts with the checkpoint in plain PyTorch.",
    )
    add_arguments(p)
    p.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    p.add_argument(
        "--seed", type=int, default=secrets.randbelow(2**31), help="of the random inputs (default: a fresh one)"
    )
    return p


def verify(source: Source, repository: Path, seed: int) -> Iterator[Check]:
    """One stage at a time. Raises ValueError if an artifact is missing or was made from other weights."""
    check = {"semantic": check_causal, "coarse": check_causal, "fine": check_fine, "codec": check_codec}
    for stage in STAGES:
        yield from check[stage](Artifact(source, stage, repository), np.random.default_rng(seed))


class Artifact:
    """A stage's ONNX session beside its twin. Raises ValueError if the artifact comes from other weights."""

    def __init__(self, source: Source, stage: str, repository: Path) -> None:
        path = repository / f"bark_{stage}/1/model.onnx"
        if not path.exists():
            raise ValueError(f"{path} is missing: run `barkstream export` first")
        weights = source.weights(stage)
        self.stage, self.checkpoint = stage, source.checkpoint
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        described = self.session.get_modelmeta().custom_metadata_map
        if described.get("weights_sha256") != fingerprint(weights):
            raise ValueError(
                f"{path} was exported from other weights ({described.get('checkpoint')}) "
                f"than {source.checkpoint.name}'s: export it again"
            )
        self.int8 = described["weights"] == "int8"
        self.twin = gpt.build(stage, source.checkpoint, weights)

    def check(self, name: str, kind: str, error: float) -> Check:
        return Check(f"{self.stage}: {name}", float(error), BOUNDS[kind][self.int8])


# --- causal GPTs -----------------------------------------------------------------------------------------------------


def check_causal(artifact: Artifact, rng: np.random.Generator) -> Iterator[Check]:
    """Three rows of different lengths: one ragged prefill, then decode steps, over a cache that is full of noise."""
    size = getattr(artifact.checkpoint, artifact.stage).size
    lengths = np.array([size.block_size - N_DECODE_STEPS, 1, rng.integers(2, size.block_size - N_DECODE_STEPS)])
    n_ids = artifact.session.get_inputs()[0].shape[2]
    token_ids = rng.integers(0, size.n_input_ids + (n_ids > 1), (len(lengths), size.block_size, n_ids)).astype(np.int32)
    steps = list(teacher_forced(artifact, token_ids, lengths, rng))  # [1 + n, B, V]
    errors = np.array(
        [_causal_error(artifact, token_ids[b], lengths[b], [step[b] for step in steps]) for b in range(len(lengths))]
    )
    yield artifact.check(f"ragged prefill of {', '.join(map(str, lengths))} tokens", "logits", errors[:, 0].max())
    yield artifact.check(f"{N_DECODE_STEPS} decode steps, rows of different lengths", "logits", errors[:, 1:].max())


def teacher_forced(
    artifact: Artifact, token_ids: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Logits [B, V] after each row's first lengths[b] tokens, then after each of the next ones."""
    cached = CachedSession(artifact.session, len(lengths), rng)
    yield cached.step(token_ids[:, : lengths.max()], lengths - 1, lengths)
    for n in range(N_DECODE_STEPS):
        yield cached.step(token_ids[np.arange(len(lengths)), lengths + n][:, None], 0 * lengths, lengths + n + 1)


class CachedSession:
    """A causal artifact over a KV cache of noise that the graph updates in place, as the engines have it."""

    def __init__(self, session: ort.InferenceSession, n_rows: int, rng: np.random.Generator) -> None:
        self._session, self._binding = session, session.io_binding()
        self._binding.bind_output("logits")
        self._caches = []  # a binding does not keep them alive
        for cache in session.get_inputs()[3:]:
            noise = (POISON * rng.standard_normal((n_rows, *cache.shape[1:]))).astype(np.float32)
            self._caches.append(ort.OrtValue.ortvalue_from_numpy(noise))
            self._binding.bind_ortvalue_input(cache.name, self._caches[-1])
            self._binding.bind_ortvalue_output(f"{cache.name}_out", self._caches[-1])

    def step(self, token_ids: np.ndarray, last: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Logits [B, V]"""
        for name, x in (("token_ids", token_ids), ("last", last), ("lengths", lengths)):
            self._binding.bind_cpu_input(name, np.ascontiguousarray(x, np.int32))
        self._session.run_with_iobinding(self._binding)
        return self._binding.get_outputs()[0].numpy().copy()  # the next step writes into the same buffer


def _causal_error(artifact: Artifact, token_ids: np.ndarray, length: int, steps: list[np.ndarray]) -> list[float]:
    """One row's error at each step, as a part of the largest logit."""
    ids = torch.from_numpy(token_ids[None, : length + N_DECODE_STEPS].astype(np.int64))
    expected = artifact.twin(ids)[0][0, length - 1 :, head_ids(artifact.checkpoint, artifact.stage)].numpy()
    return [float(np.abs(step - row).max() / np.abs(row).max()) for step, row in zip(steps, expected, strict=True)]


def head_ids(checkpoint: Checkpoint, stage: str) -> np.ndarray:
    """Which of the model's output ids the artifact's logits are."""
    if stage == "semantic":
        return np.append(np.arange(checkpoint.semantic.n_tokens), checkpoint.semantic.end)
    return checkpoint.coarse.first_id + np.arange(checkpoint.coarse.n_codebooks * checkpoint.coarse.codebook_size)


# --- fine ------------------------------------------------------------------------------------------------------------


def check_fine(artifact: Artifact, rng: np.random.Generator) -> Iterator[Check]:
    """The twin follows the artifact's own tokens, so that one near-tie does not change all that comes after."""
    layout = artifact.checkpoint.fine
    yield _check_fill(artifact, rng, n_rows=2, n_frames=layout.window // 5, temperature=0.7)
    yield _check_fill(artifact, rng, n_rows=1, n_frames=layout.window, temperature=0.5)
    yield _check_fill(artifact, rng, n_rows=2, n_frames=layout.window // 7, temperature=0.0)


def _check_fill(artifact: Artifact, rng: np.random.Generator, n_rows: int, n_frames: int, temperature: float) -> Check:
    layout = artifact.checkpoint.fine
    codes = rng.integers(0, layout.codebook_size, (n_rows, layout.n_codebooks, n_frames)).astype(np.int32)
    fill_from = n_frames // 3
    codes[:, layout.n_given :, 2 * fill_from :] = layout.unknown  # between the two: filled before, to be filled again
    codes[:, :, n_frames - 2 :] = layout.unknown  # padding
    uniforms = rng.uniform(size=(n_rows, layout.n_codebooks - layout.n_given, n_frames)).astype(np.float32)
    inputs = {
        "codes": codes,
        "fill_from": np.full((n_rows, 1), fill_from, np.int32),
        "uniforms": uniforms,
        "temperature": np.full((n_rows, 1), temperature, np.float32),
    }
    filled = artifact.session.run(None, inputs)[0]
    known = np.ones(codes.shape, bool)
    known[:, layout.n_given :, fill_from:] = False
    wrong = (
        (filled[known] != codes[known]).any()
        or filled[~known].max() >= layout.codebook_size
        or filled[~known].min() < 0
    )
    error = np.inf if wrong else fill_error(artifact, codes, fill_from, filled, uniforms, temperature)
    name = f"{n_rows} x {n_frames} frames, temperature {temperature:g}"
    return artifact.check(name, "probability" if temperature else "margin", error)


def fill_error(
    artifact: Artifact, codes: np.ndarray, fill_from: int, filled: np.ndarray, uniforms: np.ndarray, temperature: float
) -> float:
    """How far the filled tokens are from what the twin would fill in their place, given all codebooks before."""
    layout, worst = artifact.checkpoint.fine, 0.0
    seen = torch.from_numpy(filled.astype(np.int64))
    for i, k in enumerate(range(layout.n_given, layout.n_codebooks)):
        inputs, token = seen.clone(), seen[:, k, :, None]
        inputs[:, k] = torch.from_numpy(codes[:, k].astype(np.int64))
        logits = artifact.twin(inputs, k)[..., : layout.codebook_size]
        misses = (
            _draw_error(logits / temperature, token, uniforms[:, i]) if temperature else _argmax_error(logits, token)
        )
        worst = max(worst, float(misses[:, fill_from:].max()))
    return worst


def _argmax_error(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return (logits.amax(-1) - logits.gather(-1, token)[..., 0]) / logits.abs().max()


def _draw_error(logits: torch.Tensor, token: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
    """Distance of the uniform from the token's interval of the cumulative distribution."""
    cdf = torch.nn.functional.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))
    low, high = (cdf.gather(-1, token + i)[..., 0] for i in (0, 1))
    mark = torch.from_numpy(uniform).double() * cdf[..., -1]
    return torch.clamp(torch.maximum(low - mark, mark - high), min=0)


# --- codec -----------------------------------------------------------------------------------------------------------


def check_codec(artifact: Artifact, rng: np.random.Generator) -> Iterator[Check]:
    layout, n, first = artifact.checkpoint.codec, 150, artifact.checkpoint.codec.min_first_chunk
    codes = rng.integers(0, layout.codebook_size, (2, layout.n_codebooks, n)).astype(np.int32)
    yield artifact.check(f"{n} frames, whole", "samples", _codec_error(artifact, codes, [n]))
    yield artifact.check(
        f"{n} frames, in random chunks", "samples", _codec_error(artifact, codes, random_chunks(rng, n, first))
    )
    yield artifact.check(
        f"{n} frames, one by one", "samples", _codec_error(artifact, codes, [first, *[1] * (n - first)])
    )
    yield artifact.check("2 frames, fewer than are reflected", "samples", _codec_error(artifact, codes[:, :, :2], [2]))


def random_chunks(rng: np.random.Generator, n_frames: int, first: int) -> list[int]:
    """Lengths that sum to n_frames, the first one at least `first`."""
    cuts = np.sort(rng.choice(np.arange(first, n_frames), 6, replace=False))
    return np.diff([0, *cuts, n_frames]).tolist()


def _codec_error(artifact: Artifact, codes: np.ndarray, chunks: list[int]) -> float:
    audio = decode_chunks(artifact.session, codes, chunks)
    expected = artifact.twin(torch.from_numpy(codes.astype(np.int64))).numpy()
    return float(np.abs(audio - expected).max()) if audio.shape == expected.shape else np.inf


def decode_chunks(session: ort.InferenceSession, codes: np.ndarray, chunks: list[int]) -> np.ndarray:
    """codes [B, K, n] -> samples [B, samples_per_frame * n], the state carried from chunk to chunk."""
    state = np.zeros((len(codes), session.get_inputs()[1].shape[1]), np.float32)
    audio = []
    for part in np.split(codes, np.cumsum(chunks)[:-1], axis=2):
        samples, state = session.run(None, {"codes": part, "state": state})
        audio.append(samples)
    return np.concatenate(audio, axis=1)


if __name__ == "__main__":
    sys.exit(main())
