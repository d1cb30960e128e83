"""Audio files back to samples, through FFmpeg, and what is in them."""

from __future__ import annotations

import io

import av
import numpy as np

RATE = 24_000  # Hz, of bare samples


def decode(audio: bytes, format: str) -> tuple[np.ndarray, int]:
    """Samples [n], -1..1, and their rate."""
    if format == "pcm":
        return np.frombuffer(audio, "<i2") / 32768, RATE
    resampler = av.AudioResampler("flt", "mono")
    with av.open(io.BytesIO(audio)) as file:
        frames = [frame for raw in file.decode(audio=0) for frame in resampler.resample(raw)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames]), frames[0].sample_rate
