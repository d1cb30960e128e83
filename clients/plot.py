"""Waveform and spectrogram of a stream, with its chunk boundaries. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from barkstream.clients.playback import Arrival

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW_S = 0.032  # of the spectrogram: 31 Hz apart, speech harmonics in sight
HOP_S = 0.004  # or longer: at most MAX_COLUMNS
MAX_COLUMNS = 6000
FLOOR_DB = -80.0  # below the loudest bin: black
INK, WAVE, WAVE_ALT = "#222933", "#2f6f9f", "#d9822b"
MIN_LABEL_INCHES = 0.2  # a chunk narrower than this gets no label
MIN_TIME_INCHES = 0.45  # nor, below this, its arrival time


class PlotUnavailable(RuntimeError):
    """matplotlib is not installed."""


def load_matplotlib() -> type[Figure]:
    """matplotlib's Figure. Raises PlotUnavailable, which says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotUnavailable("drawing needs matplotlib: pip install 'barkstream[plot]'") from None
    return Figure


def plot_speech(
    path: str | PathLike[str],
    audio: NDArray[np.float32],
    arrivals: Sequence[Arrival],
    sample_rate: int,
    title: str = "",
) -> None:
    """Draw `audio` [n], which came in the chunks `arrivals`, into a PNG file.

    Raises PlotUnavailable without matplotlib, ValueError for no audio, OSError when `path` cannot be written.
    """
    if not audio.size:
        raise ValueError("no audio to draw")
    inches = min(max(12, 0.8 * len(audio) / sample_rate), 48)  # long speech gets a long picture
    figure = load_matplotlib()(figsize=(inches, 5.4), dpi=130, layout="constrained")  # no pyplot: needs no display
    wave, spectrum = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.5])
    bounds_s = np.cumsum([0, *(chunk.n_samples for chunk in arrivals)]) / sample_rate
    _draw_wave(wave, audio, bounds_s, sample_rate)
    _draw_spectrogram(figure, spectrum, audio, sample_rate)
    for boundary in bounds_s[1:-1]:
        wave.axvline(boundary, color=INK, lw=0.7, alpha=0.55)
        spectrum.axvline(boundary, color="white", lw=0.7, alpha=0.7, ls=(0, (4, 3)))
    _label_chunks(wave, arrivals, bounds_s, inches)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, parse_math=False)
    figure.text(0.99, 0.985, "above the wave: chunk, and when it arrived", ha="right", va="top", fontsize=8, color=INK)
    figure.savefig(path, format="png")


def spectrogram_db(audio: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    """Power of `audio` [n] in dB below its loudest bin: [n_bins, n_frames], bins from 0 Hz to half the sample rate."""
    width, hop = round(WINDOW_S * sample_rate), max(round(HOP_S * sample_rate), -(-len(audio) // MAX_COLUMNS))
    padded = np.pad(audio, (width // 2, width))  # frame i is centred on sample i * hop
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[: len(audio) + 1 : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(width), axis=1)) ** 2
    return (10 * np.log10(np.maximum(power / max(power.max(), 1e-12), 10 ** (FLOOR_DB / 10)))).T.astype(np.float32)


def _draw_wave(axes: Axes, audio: NDArray[np.float32], bounds_s: NDArray[Any], sample_rate: int) -> None:
    """Each chunk in one of two colours, as the envelope of its samples."""
    step = max(1, len(audio) // MAX_COLUMNS)  # samples a column: a few columns a pixel
    n = len(audio) // step
    columns = audio[: n * step].reshape(n, step)
    low, high, at_s = columns.min(1), columns.max(1), np.arange(n) * step / sample_rate
    parity = (np.searchsorted(bounds_s, at_s, side="right") - 1) % 2
    for which, color in enumerate((WAVE, WAVE_ALT)):
        axes.fill_between(at_s, low, high, where=parity == which, color=color, lw=0.3)
    peak = max(float(np.abs(audio).max()), 1e-3)
    axes.set(ylim=(-1.1 * peak, 1.1 * peak), ylabel="amplitude", xlim=(0, len(audio) / sample_rate))
    axes.axhline(0, color=INK, lw=0.4, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_spectrogram(figure: Figure, axes: Axes, audio: NDArray[np.float32], sample_rate: int) -> None:
    picture = axes.imshow(
        spectrogram_db(audio, sample_rate), origin="lower", aspect="auto", cmap="magma", vmin=FLOOR_DB, vmax=0,
        extent=(0, len(audio) / sample_rate, 0, sample_rate / 2000),
    )  # fmt: skip
    axes.set(xlabel="seconds", ylabel="kHz")
    narrow = 12 / figure.get_figwidth()
    figure.colorbar(picture, ax=axes, label="dB", pad=0.01 * narrow, fraction=0.03 * narrow)
    axes.locator_params(axis="x", nbins=round(9 / narrow))


def _label_chunks(axes: Axes, arrivals: Sequence[Arrival], bounds_s: NDArray[Any], inches: float) -> None:
    """Above each chunk that is wide enough: its number, and when it arrived."""
    for i, chunk in enumerate(arrivals):
        wide = (bounds_s[i + 1] - bounds_s[i]) / bounds_s[-1] * inches
        if wide < MIN_LABEL_INCHES:
            continue
        label = f"{i + 1}\n{chunk.at_s:.2f} s" if wide >= MIN_TIME_INCHES else f"{i + 1}"
        middle = (bounds_s[i] + bounds_s[i + 1]) / 2
        axes.annotate(
            label, (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=8, color=(WAVE, WAVE_ALT)[i % 2], linespacing=1.1,
        )  # fmt: skip
