"""Claims about clients/encode.py: samples to bytes, chunk by chunk, in every format."""

from __future__ import annotations

import io
import sys
import wave

import numpy as np
import pytest

pytest.importorskip("av", reason="the formats extra is not installed: make .venv/gateway")
from decode import RATE, decode

from barkstream.clients.encode import FORMATS, FormatUnavailable, open_encoder, wav_header

CHUNK = 7680  # samples of a first chunk: .32 s
EMPTY = np.zeros(0, np.float32)


def tone(seconds: float, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def encode(samples: np.ndarray, format: str, speed: float = 1.0) -> list[bytes]:
    """A piece for every chunk, then the rest."""
    encoder = open_encoder(format, RATE, speed)
    pieces = [encoder.encode(samples[i : i + CHUNK]) for i in range(0, len(samples), CHUNK)]
    return [*pieces, encoder.finish()]


def loudest_hz(samples: np.ndarray, rate: int) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_streams_from_the_first_chunk_and_holds_the_audio(format):
    pieces = encode(tone(2.0), format)
    assert all(pieces[:3])
    heard, rate = decode(b"".join(pieces), format)
    assert len(heard) / rate == pytest.approx(2.0, abs=0.1)  # encoders pad
    assert loudest_hz(heard, rate) == pytest.approx(440, abs=2)
    assert np.abs(heard).max() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("format", ["wav", "pcm", "flac"])
def test_what_is_not_compressed_or_only_packed_is_exact(format):
    heard, _ = decode(b"".join(encode(tone(1.0), format)), format)
    np.testing.assert_allclose(heard, tone(1.0), atol=1e-4)


@pytest.mark.parametrize("speed", [1.0, 2.0])
@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_chunk_changes_nothing(format, speed):
    encoder = open_encoder(format, RATE, speed)
    pieces = [encoder.encode(chunk) for chunk in (EMPTY, tone(1.0), EMPTY, tone(1.0))]
    heard, rate = decode(b"".join([*pieces, encoder.finish()]), format)
    assert len(heard) / rate == pytest.approx(2.0 / speed, abs=0.1)


@pytest.mark.parametrize("speed", [0.25, 0.7, 2.0, 4.0])
def test_speed_changes_the_duration_and_not_the_pitch(speed):
    heard, rate = decode(b"".join(encode(tone(2.0), "pcm", speed)), "pcm")
    assert len(heard) / rate == pytest.approx(2.0 / speed, rel=0.05)
    assert loudest_hz(heard, rate) == pytest.approx(440, abs=5)


def test_a_wav_of_known_length_is_read_by_the_standard_library():
    with wave.open(io.BytesIO(wav_header(RATE, 8) + bytes(8))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()) == (RATE, 1, 2, 4)


def test_what_needs_a_library_that_is_not_installed_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for format, speed in (("mp3", 1.0), ("pcm", 2.0)):
        with pytest.raises(FormatUnavailable, match=r"pip install 'barkstream\[formats\]'"):
            open_encoder(format, RATE, speed)
    open_encoder("wav", RATE)
