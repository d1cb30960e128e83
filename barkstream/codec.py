"""Codes to samples, with the decoder's state carried from chunk to chunk: streamed samples equal the offline ones."""

from __future__ import annotations

from collections.abc import Iterator

from barkstream.sampling import Floats, Ints
from barkstream.stages import Stages


def decode_audio(codes: Iterator[Ints], stages: Stages) -> Iterator[Floats]:
    """Samples [320 n] for each chunk of codes [8, n]."""
    state = stages.codec_state()
    for chunk in codes:
        audio, state = stages.codec(chunk, state)
        yield audio
