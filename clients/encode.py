"""float32 samples to the bytes of an audio format, chunk by chunk: what goes in can be heard at once. Always mono."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import av

Samples = NDArray[np.float32]  # [n], -1..1, clipped beyond

UNKNOWN_SIZE = 0xFFFFFFFF  # what a WAV says whose end is not known yet; players then read on to the end
N_WAV_HEADER = 36  # bytes of a WAV between its size field and the samples


class FormatUnavailable(RuntimeError):
    """The format, or another speed, needs a library that is not installed."""


@dataclass(frozen=True)
class Format:
    """What a format is called, and how FFmpeg writes it."""

    media_type: str
    container: str = ""  # "": 16-bit samples, which need no library
    codec: str = ""
    bit_rate: int | None = None  # bits a second; None: lossless
    options: dict[str, str] = field(default_factory=dict)  # of the container


# A file that cannot be rewound has no room for a table of contents, and Ogg must not gather a second's packets for a page.
FORMATS = {
    "mp3": Format("audio/mpeg", "mp3", "libmp3lame", 96_000, {"write_xing": "0", "id3v2_version": "0"}),
    "opus": Format("audio/ogg; codecs=opus", "ogg", "libopus", 48_000, {"page_duration": "20000"}),  # µs
    "flac": Format("audio/flac", "flac", "flac"),
    "aac": Format("audio/aac", "adts", "aac", 96_000),
    "wav": Format("audio/wav"),
    "pcm": Format("audio/pcm; rate={sample_rate}; channels=1"),  # little-endian samples, no header
}


class Encoder(Protocol):
    """One stream of audio being written: the bytes of all calls, joined, are the file."""

    def encode(self, samples: Samples) -> bytes:
        """All bytes that are ready; a compressor may keep some back until the next call."""

    def finish(self) -> bytes:
        """The rest."""


def media_type(format: str, sample_rate: int) -> str:
    """For the Content-Type header."""
    return FORMATS[format].media_type.format(sample_rate=sample_rate)


def open_encoder(format: str, sample_rate: int, speed: float = 1.0) -> Encoder:
    """An encoder to one of FORMATS. speed: 2 says it in half the time, at the same pitch. Raises FormatUnavailable.

    A WAV says that its size is unknown; `wav_header` gives the head to put over it at the end.
    """
    encoder: Encoder
    if FORMATS[format].codec:
        encoder = LibavEncoder(FORMATS[format], sample_rate)
    else:
        encoder = PcmEncoder(wav_header(sample_rate) if format == "wav" else b"")
    return encoder if speed == 1 else TempoEncoder(encoder, speed, sample_rate)


class PcmEncoder:
    """16-bit little-endian samples behind a header."""

    def __init__(self, header: bytes) -> None:
        self._header = header

    def encode(self, samples: Samples) -> bytes:
        header, self._header = self._header, b""
        return header + np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()

    def finish(self) -> bytes:
        header, self._header = self._header, b""
        return header


class LibavEncoder:
    """One of FFmpeg's encoders, through PyAV."""

    def __init__(self, format: Format, sample_rate: int) -> None:
        av = load_av(format.codec)
        self._sample_rate, self._n_samples, self._written = sample_rate, 0, _Written()
        options = {"flush_packets": "1", **format.options}
        self._container = av.open(self._written, "w", format=format.container, options=options)
        self._stream = self._container.add_stream(format.codec, rate=sample_rate, layout="mono")
        if format.bit_rate:
            self._stream.bit_rate = format.bit_rate

    def encode(self, samples: Samples) -> bytes:
        if len(samples):  # FFmpeg's encoders refuse an empty frame
            self._container.mux(self._stream.encode(_frame(samples, self._sample_rate, self._n_samples)))
        self._n_samples += len(samples)
        return self._written.take()

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._written.take()


class TempoEncoder:
    """Another encoder's stream, spoken faster or slower by FFmpeg's `atempo` (overlap-add, the pitch stays)."""

    def __init__(self, encoder: Encoder, speed: float, sample_rate: int) -> None:
        self._av = load_av("another speed")
        self._encoder, self._sample_rate, self._n_samples = encoder, sample_rate, 0
        self._graph = self._av.filter.Graph()
        links = [self._graph.add_abuffer(format="flt", sample_rate=sample_rate, layout="mono")]
        links += [self._graph.add("atempo", str(factor)) for factor in _tempo_factors(speed)]
        links += [self._graph.add("aformat", "sample_fmts=flt"), self._graph.add("abuffersink")]
        self._graph.link_nodes(*links).configure()

    def encode(self, samples: Samples) -> bytes:
        if len(samples):
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
            except (self._av.BlockingIOError, self._av.EOFError):  # it wants more; it has no more
                return encoded


def load_av(what: str) -> ModuleType:
    """PyAV, for what needs it. Raises FormatUnavailable without it."""
    try:
        import av
        import av.filter
    except ImportError:
        raise FormatUnavailable(f"{what} needs PyAV: pip install 'barkstream[formats]'") from None
    return av


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
    av = load_av("a frame")
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="flt", layout="mono")
    frame.sample_rate, frame.pts = sample_rate, position
    return frame


def _tempo_factors(speed: float) -> list[float]:
    """`atempo` goes down to 0.5: slower is two of them."""
    return [speed] if speed >= 0.5 else [speed**0.5, speed**0.5]
