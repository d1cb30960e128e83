"""float32 samples to a WAV file."""

from __future__ import annotations

import wave
from os import PathLike

import numpy as np
from numpy.typing import NDArray


def write_wav(path: str | PathLike[str], audio: NDArray[np.float32], sample_rate: int) -> None:
    """Write `audio` [n] (-1..1, clipped beyond) as 16-bit mono. Raises OSError when `path` cannot be written."""
    pcm = np.rint(np.clip(audio, -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(pcm.itemsize)
        file.setframerate(sample_rate)
        file.writeframes(pcm.tobytes())
