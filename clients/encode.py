"""float32 samples to the bytes of an audio file or stream, chunk by chunk."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Name: PyAV's container and codec, or None for what needs no library.
FORMATS = {
    "wav": None,
    "pcm": None,  # 16-bit little-endian samples, no header
    "flac": ("flac", "flac"),
    "mp3": ("mp3", "libmp3lame"),
    "opus": ("ogg", "libopus"),
    "aac": ("adts", "aac"),
}
PAGE_US = 20_000  # of an Ogg stream; by default a page is sent when it holds a second
UNKNOWN_SIZE = 0xFFFFFFFF  # of a WAV that is still being written


class FormatUnavailable(RuntimeError):
    """The format needs a library that is not installed, or there is no such format."""


class Encoder:
    """One audio stream: `encode` chunk after chunk, then `close`; the bytes of all calls, joined, are the file.

    A WAV's header says that its size is unknown; `wav_header` gives the one to put over it at the end. Raises
    FormatUnavailable.
    """

    def __init__(self, format: str, sample_rate: int):
        if format not in FORMATS:
            raise FormatUnavailable(f"no format {format!r}; there are {', '.join(FORMATS)}")
        codec = FORMATS[format]
        self._rate, self._compressor = sample_rate, _Compressor(*codec, sample_rate) if codec else None
        self._header = wav_header(sample_rate) if format == "wav" else b""

    def encode(self, samples: NDArray[np.float32]) -> bytes:
        """Bytes for samples [n] (-1..1, clipped beyond); a compressor may keep some back until the next call."""
        pcm = np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2")
        header, self._header = self._header, b""
        return header + (self._compressor.encode(pcm) if self._compressor else pcm.tobytes())

    def close(self) -> bytes:
        """The last bytes."""
        header, self._header = self._header, b""
        return header + (self._compressor.close() if self._compressor else b"")


def wav_header(sample_rate: int, n_bytes: int | None = None) -> bytes:
    """The 44 bytes before 16-bit mono samples. n_bytes: of the samples; None: not known yet."""
    size = UNKNOWN_SIZE if n_bytes is None else n_bytes
    whole = size if n_bytes is None else size + 36
    audio = struct.pack("<IHHIIHH", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return b"RIFF" + struct.pack("<I", whole) + b"WAVEfmt " + audio + b"data" + struct.pack("<I", size)


class _Compressor:
    """PyAV, writing into memory."""

    def __init__(self, container: str, codec: str, sample_rate: int):
        try:
            import av
        except ImportError:
            raise FormatUnavailable(f"{codec} needs PyAV: pip install 'barkstream[formats]'") from None
        self._av, self._written, self._rate, self._n_samples = av, _Written(), sample_rate, 0
        pages = {"page_duration": str(PAGE_US)} if container == "ogg" else {}
        self._container: Any = av.open(self._written, "w", format=container, options=pages)
        self._stream: Any = self._container.add_stream(codec, rate=sample_rate, layout="mono")

    def encode(self, pcm: NDArray[np.int16]) -> bytes:
        if not pcm.size:
            return b""
        frame = self._av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = self._rate, self._n_samples
        self._n_samples += pcm.size
        self._container.mux(self._stream.encode(frame))
        return self._written.take()

    def close(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._written.take()


class _Written:
    """What PyAV has written and nobody has taken. It cannot seek: what is taken is gone."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)
