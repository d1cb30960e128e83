"""What streaming the fine stage costs: chunks, context and look-ahead against the offline windows.

The fine stage is non-causal over 1,024 frames, so filling a chunk before the rest is there is an approximation. The
same coarse codes are filled offline and by each schedule with the same random numbers, and compared: codes of codebooks
2 to 7 that are equal at temperature 0, and the distance of the audio in log mel bands at the default temperature. The
yardstick is the distance between two offline fillings with different random numbers ("reseeded"). With --listen,
Whisper's character errors and DNSMOS too. What waiting costs is computed: `least_coarse_hz`, the coarse frames a second
below which playback runs dry, if they come at an even pace.

    python perf/fine_schedule.py --schedule "fine_lookahead=6, 6, 36" --schedule "chunk_frames=60, 120; fine_lookahead=24"
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from listening import SAMPLE_RATE, Audio, Clip, Listener
from machine import machine
from quality import ROOT, SENTENCES, seed_of

from barkstream.codec import decode_audio
from barkstream.fine import fill_offline, generate_fine
from barkstream.local import open_pipeline
from barkstream.options import Schedule, SpeechOptions
from barkstream.pipeline import Pipeline, Speech
from barkstream.sampling import Ints
from barkstream.tokens import Checkpoint, exact_div
from barkstream.voices import HistoryPrompt

DEFAULT = Schedule()
SCHEDULES = {
    "default": DEFAULT,
    **{f"look-ahead {n}": replace(DEFAULT, fine_lookahead=(n,)) for n in (0, 6, 12, 48, 96)},
    "look-ahead 6, 36, 66, 96": replace(DEFAULT, fine_lookahead=(6, 36, 66, 96)),
    **{f"context {n}": replace(DEFAULT, fine_context=n) for n in (0, 32, 64, 256, 512)},
    "chunks 15, 30, 60, 120": replace(DEFAULT, chunk_frames=(15, 30, 60, 120)),
    "chunks 60, 120, 240": replace(DEFAULT, chunk_frames=(60, 120, 240)),
    "the cuda profile's": replace(DEFAULT, chunk_frames=(29, 28, 60, 60, 60, 90), fine_lookahead=(1, 3, 3, 33, 63, 33)),
}
TEMPERATURE = SpeechOptions().fine_temperature


@dataclass
class Utterance:
    """One sentence up to its coarse codes."""

    text: str
    history: HistoryPrompt
    seed: int
    coarse: Ints  # [2, t]
    greedy: Ints | None = None  # codes [8, t] filled offline at temperature 0
    mel: np.ndarray | None = None  # of the audio filled offline


class Filler:
    """Fills utterances with codebooks 2.. and decodes them."""

    def __init__(self, pipeline: Pipeline):
        self._stages, self._layout = pipeline.stages, pipeline.checkpoint.fine

    def offline(self, u: Utterance, temperature: float, reseeded: int = 0) -> Ints:
        return fill_offline(u.coarse, u.history, self._layout, u.seed + 10**6 * reseeded, temperature, self._stages)

    def streamed(self, u: Utterance, temperature: float, schedule: Schedule) -> Ints:
        chunks = generate_fine(iter([u.coarse]), u.history, self._layout, u.seed, temperature, schedule, self._stages)
        return np.concatenate(list(chunks), axis=1)

    def audio(self, codes: Ints) -> Audio:
        return np.concatenate(list(decode_audio(iter([codes]), self._stages)))


def say(pipeline: Pipeline, voices: dict[str, HistoryPrompt], sentences: list[str], seed: int) -> list[Utterance]:
    utterances = []
    for i, text in enumerate(sentences):
        history, speech = voices[sorted(voices)[i % len(voices)]], Speech()
        for _ in pipeline.stream(text, SpeechOptions(seed=seed_of(seed, i)), history, speech=speech):
            pass
        utterances.append(Utterance(text, history, seed_of(seed, i), np.concatenate(speech.coarse, axis=1)))
    return utterances


def log_mel(audio: Audio, n_fft: int = 1024, hop: int = 240, n_mels: int = 80) -> np.ndarray:
    """[frames, n_mels], log10 of the magnitude in mel bands up to 12 kHz"""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, n_fft // 2), n_fft)[::hop] * np.hanning(n_fft)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 1400), n_mels + 2) / 2595) - 1)
    hz = np.fft.rfftfreq(n_fft, 1 / SAMPLE_RATE)
    rising = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    bands = np.maximum(0, np.minimum(rising, falling))
    return np.log10(np.abs(np.fft.rfft(frames)) @ bands.T + 1e-3)


def measure(filler: Filler, utterances: list[Utterance], schedule: Schedule | None, listener: Listener | None) -> dict:
    """One row. schedule None: offline again with other random numbers."""
    agreements, distances, scores, seconds = [], [], [], 0.0
    for i, u in enumerate(utterances):
        began = perf_counter()
        codes = (
            filler.offline(u, TEMPERATURE, reseeded=1)
            if schedule is None
            else filler.streamed(u, TEMPERATURE, schedule)
        )
        seconds += perf_counter() - began
        audio = filler.audio(codes)
        distances.append(np.abs(log_mel(audio) - u.mel).mean())
        if schedule is not None:
            agreements.append((u.greedy[2:] == filler.streamed(u, 0.0, schedule)[2:]).mean())
        if listener:
            scores.append(listener.score(Clip("", 0, i, u.text, audio, [])))
    row: dict[str, Any] = {
        "mel_distance": float(np.mean(distances)),
        "fine_s_per_audio_s": seconds / audio_seconds(utterances),
    }
    if agreements:
        row["equal_codes_greedy"] = float(np.mean(agreements))
    if scores:
        row["cer"] = sum(s.character_errors for s in scores) / sum(s.n_characters for s in scores)
        row["ovrl"] = float(np.mean([s.ovrl for s in scores]))
    return row


def least_coarse_hz(schedule: Schedule, checkpoint: Checkpoint) -> float:
    """Coarse frames a second, made at an even pace and by whole windows, that keep playback from running dry.

    A chunk must be sent before the one before it has been played, by a player that starts at the first. Fine stage and
    codec are taken to need the same time for every chunk.
    """
    window, end, needed, hz = exact_div(checkpoint.coarse.window, checkpoint.coarse.n_codebooks), 0, [], []
    for index in range(max(len(schedule.chunk_frames), len(schedule.fine_lookahead)) + 1):
        start, end = end, end + schedule.chunk(index)
        needed.append(-(-(end + schedule.lookahead(index)) // window) * window)  # frames
        if index:
            hz.append((needed[-1] - needed[0]) / (start / checkpoint.coarse.rate_hz))
    return max(hz)


def parse_schedule(text: str) -> Schedule:
    """The default schedule but for what `text` says: "name=value; name=value", values as in config.pbtxt."""
    given = {name.strip(): value for name, _, value in (each.partition("=") for each in text.split(";"))}
    if unknown := set(given) - {field.name for field in fields(Schedule)}:
        raise argparse.ArgumentTypeError(f"a schedule has no {min(unknown)!r}")
    try:
        return Schedule.parse(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def in_words(schedule: Schedule) -> str:
    """What it has in place of the default's, as `parse_schedule` reads it."""
    names = (field.name for field in fields(Schedule) if getattr(schedule, field.name) != getattr(DEFAULT, field.name))
    return "; ".join(f"{name}={str(getattr(schedule, name)).strip('(,)')}" for name in names) or "default"


def audio_seconds(utterances: list[Utterance]) -> float:
    return sum(u.coarse.shape[1] for u in utterances) / 75


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--sentences", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="other speech for another one (default: %(default)s)")
    parser.add_argument("--listen", action="store_true")
    parser.add_argument(
        "--schedule", type=parse_schedule, action="append", dest="schedules", metavar="NAME=VALUE;...",
        help="one to measure beside the default, in place of the usual ones; may be repeated",
    )  # fmt: skip
    options = parser.parse_args(argv)
    schedules = {"default": DEFAULT, **{in_words(s): s for s in options.schedules}} if options.schedules else SCHEDULES
    pipeline, voices = open_pipeline(options.repository)
    for schedule in schedules.values():
        schedule.check(pipeline.checkpoint)
    utterances = say(pipeline, voices, SENTENCES.read_text().splitlines()[: options.sentences], options.seed)
    filler, listener = Filler(pipeline), Listener() if options.listen else None
    for u in utterances:
        u.greedy, u.mel = filler.offline(u, 0.0), log_mel(filler.audio(filler.offline(u, TEMPERATURE)))
    columns = ("equal_codes_greedy", "mel_distance", "fine_s_per_audio_s", "least_coarse_hz", "cer", "ovrl")
    print(f"| schedule | {' | '.join(columns)} |\n|" + " --- |" * (1 + len(columns)))
    rows = {}
    for name, schedule in {"offline, reseeded": None, **schedules}.items():
        rows[name] = measure(filler, utterances, schedule, listener)
        if schedule is not None:
            rows[name]["least_coarse_hz"] = least_coarse_hz(schedule, pipeline.checkpoint)
        print(f"| {name} | {' | '.join(f'{rows[name][key]:.3f}' if key in rows[name] else '' for key in columns)} |")
    sentences = {"sentences": len(utterances), "audio_s": audio_seconds(utterances)}
    print(
        json.dumps({"schedules": rows, "seed": options.seed, **sentences, "machine": machine("numpy", "onnxruntime")})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
