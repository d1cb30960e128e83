"""float32 samples to the bytes of an audio format, piece by piece: what goes in can be heard at once.

`encode` takes samples and returns all bytes that are ready; `finish` returns the rest. Everything is mono.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

import av
import av.filter
import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]  # [n], -1..1

UNKNOWN_SIZE = 0xFFFFFFFF  # what a WAV says whose end is not known yet; players then read on to the end
N_WAV_HEADER = 36  # bytes of a WAV between its size field and the samples


@dataclass(frozen=True)
class LibavFormat:
    """How FFmpeg writes a format."""

    media_type: str
    container: str
    codec: str
    bit_rate: int | None  # bits a second; None: lossless
    options: dict[str, str]  # of the container


# A file that cannot be rewound has no room for a table of contents, and Ogg must not gather a second's packets for a page.
LIBAV_FORMATS = {
    "mp3": LibavFormat("audio/mpeg", "mp3", "libmp3lame", 96_000, {"write_xing": "0", "id3v2_version": "0"}),
    "opus": LibavFormat("audio/ogg; codecs=opus", "ogg", "libopus", 48_000, {"page_duration": "20000"}),  # µs
    "flac": LibavFormat("audio/flac", "flac", "flac", None, {}),
    "aac": LibavFormat("audio/aac", "adts", "aac", 96_000, {}),
}
FORMATS = (*LIBAV_FORMATS, "wav", "pcm")


class Encoder(Protocol):
    """One stream of audio being written."""

    def encode(self, samples: Samples) -> bytes: ...

    def finish(self) -> bytes: ...


def media_type(response_format: str, sample_rate: int) -> str:
    """For the Content-Type header."""
    if response_format in LIBAV_FORMATS:
        return LIBAV_FORMATS[response_format].media_type
    return "audio/wav" if response_format == "wav" else f"audio/pcm; rate={sample_rate}; channels=1"


def open_encoder(response_format: str, sample_rate: int, speed: float = 1.0) -> Encoder:
    """An encoder to one of FORMATS. speed: 2 says it in half the time, at the same pitch."""
    encoder: Encoder
    if response_format in LIBAV_FORMATS:
        encoder = LibavEncoder(response_format, sample_rate)
    else:
        encoder = PcmEncoder(wav_header(sample_rate) if response_format == "wav" else b"")
    return encoder if speed == 1 else TempoEncoder(encoder, speed, sample_rate)


class PcmEncoder:
    """16-bit little-endian samples behind a header; no header is OpenAI's `pcm`."""

    def __init__(self, header: bytes) -> None:
        self._header = header

    def encode(self, samples: Samples) -> bytes:
        header, self._header = self._header, b""
        return header + np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()

    def finish(self) -> bytes:
        return b""


class LibavEncoder:
    """One of FFmpeg's encoders, through PyAV."""

    def __init__(self, response_format: str, sample_rate: int) -> None:
        how = LIBAV_FORMATS[response_format]
        self._sample_rate = sample_rate
        self._n_samples = 0
        self._written = _Written()
        self._container = av.open(
            self._written, "w", format=how.container, options={"flush_packets": "1", **how.options}
        )
        self._stream = self._container.add_stream(how.codec, rate=sample_rate, layout="mono")
        if how.bit_rate:
            self._stream.bit_rate = how.bit_rate

    def encode(self, samples: Samples) -> bytes:
        frame = _frame(samples, self._sample_rate, self._n_samples)
        self._n_samples += len(samples)
        self._container.mux(self._stream.encode(frame))
        return self._written.take()

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._written.take()


class TempoEncoder:
    """Another encoder's stream, spoken faster or slower by FFmpeg's `atempo` (overlap-add, the pitch stays)."""

    def __init__(self, encoder: Encoder, speed: float, sample_rate: int) -> None:
        self._encoder = encoder
        self._sample_rate = sample_rate
        self._n_samples = 0
        self._graph = av.filter.Graph()
        links = [self._graph.add_abuffer(format="flt", sample_rate=sample_rate, layout="mono")]
        links += [self._graph.add("atempo", str(factor)) for factor in _tempo_factors(speed)]
        links += [self._graph.add("aformat", "sample_fmts=flt"), self._graph.add("abuffersink")]
        self._graph.link_nodes(*links).configure()

    def encode(self, samples: Samples) -> bytes:
        self._graph.push(_frame(samples, self._sample_rate, self._n_samples))
        self._n_samples += len(samples)
        return self._pull()

    def finish(self) -> bytes:
        self._graph.push(None)
        return self._pull() + self._encoder.finish()

    def _pull(self) -> bytes:
        """What the filter has ready, encoded."""
        encoded = b""
        while True:
            try:
                encoded += self._encoder.encode(self._graph.pull().to_ndarray()[0])
            except (av.BlockingIOError, av.EOFError):  # it wants more; it has no more
                return encoded


def wav_header(sample_rate: int, n_bytes: int = UNKNOWN_SIZE) -> bytes:
    """The head of a 16-bit mono WAV with n_bytes of samples."""
    size = min(UNKNOWN_SIZE, n_bytes + N_WAV_HEADER)
    fields = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)  # PCM, mono, ..., 2 bytes a sample
    return b"RIFF" + struct.pack("<I", size) + b"WAVEfmt \x10\0\0\0" + fields + b"data" + struct.pack("<I", n_bytes)


class _Written:
    """A file that PyAV writes to and cannot rewind."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, part: bytes) -> int:
        self._bytes += part
        return len(part)

    def take(self) -> bytes:
        taken = bytes(self._bytes)
        self._bytes.clear()
        return taken


def _frame(samples: Samples, sample_rate: int, position: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="flt", layout="mono")
    frame.sample_rate, frame.pts = sample_rate, position
    return frame


def _tempo_factors(speed: float) -> list[float]:
    """`atempo` goes down to 0.5: slower is two of them."""
    return [speed] if speed >= 0.5 else [speed**0.5, speed**0.5]
