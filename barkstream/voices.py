"""Voices: a preset's name, and the history prompt it stands for, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from barkstream.options import BadRequest
from barkstream.tokens import Checkpoint


@dataclass(frozen=True)
class HistoryPrompt:
    """What a speaker said before, at three levels; Bark goes on in that voice."""

    semantic: NDArray[np.int32]  # [n]
    coarse: NDArray[np.int32]  # [2, t]
    fine: NDArray[np.int32]  # [8, t]

    @classmethod
    def check(cls, semantic: NDArray, coarse: NDArray, fine: NDArray, checkpoint: Checkpoint) -> HistoryPrompt:
        """Three arrays as a caller gave them, as a prompt that fits the checkpoint.

        Raises BadRequest for a wrong shape, kind, range, or lengths that do not cover the same time.
        """
        layout = checkpoint.coarse
        _check_array("semantic_prompt", semantic, (None,), checkpoint.semantic.n_tokens)
        _check_array("coarse_prompt", coarse, (layout.n_codebooks, None), layout.codebook_size)
        _check_array("fine_prompt", fine, (checkpoint.fine.n_codebooks, None), checkpoint.fine.codebook_size)
        n, t = len(semantic), coarse.shape[1]
        frames_per_token = layout.tokens_per_semantic / layout.n_codebooks
        if round(t / n, 1) != round(frames_per_token, 1):  # Suno's own test
            raise BadRequest(
                f"semantic_prompt and coarse_prompt must cover the same time: {n} semantic tokens go with about "
                f"{round(n * frames_per_token)} frames, got {t}"
            )
        if fine.shape[1] != t:
            raise BadRequest(f"coarse_prompt and fine_prompt must have as many frames, got {t} and {fine.shape[1]}")
        return cls(semantic.astype(np.int32), coarse.astype(np.int32), fine.astype(np.int32))

    @classmethod
    def load(cls, path: Path, checkpoint: Checkpoint) -> HistoryPrompt:
        """A prompt from a .npz with semantic_prompt, coarse_prompt and fine_prompt (Suno's format)."""
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"semantic_prompt", "coarse_prompt", "fine_prompt"} - set(arrays.files)
            if missing:
                raise BadRequest(
                    f"{path.name} holds no {sorted(missing)[0]}; a voice has semantic_, coarse_ and fine_prompt"
                )
            return cls.check(arrays["semantic_prompt"], arrays["coarse_prompt"], arrays["fine_prompt"], checkpoint)

    def save(self, path: Path) -> None:
        np.savez(path, semantic_prompt=self.semantic, coarse_prompt=self.coarse, fine_prompt=self.fine)


def load_voices(folder: Path, checkpoint: Checkpoint) -> dict[str, HistoryPrompt]:
    """Every voice below a folder, by name: `v2/en_speaker_6.npz` is the voice v2/en_speaker_6."""
    paths = sorted(folder.rglob("*.npz"))
    return {path.relative_to(folder).with_suffix("").as_posix(): HistoryPrompt.load(path, checkpoint) for path in paths}


def find_voice(voices: dict[str, HistoryPrompt], name: str) -> HistoryPrompt:
    """The voice of that name. Raises BadRequest with the nearest names."""
    if name in voices:
        return voices[name]
    near = get_close_matches(name, voices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise BadRequest(f"no voice {name!r}; {hint}{len(voices)} voices: barkstream voices")


def _check_array(name: str, array: NDArray, shape: tuple[int | None, ...], n_ids: int) -> None:
    wanted = f"[{', '.join('n' if n is None else str(n) for n in shape)}]"
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits or array.size == 0:
        raise BadRequest(f"{name} must have the shape {wanted} and not be empty, got {list(array.shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise BadRequest(f"{name} must hold whole numbers, got {array.dtype}")
    if array.min() < 0 or array.max() >= n_ids:
        raise BadRequest(f"{name} must hold ids from 0 to {n_ids - 1}, got {array.min()} to {array.max()}")
