"""Do longer coarse windows keep the voice? Speech with each, compared with the preset's own by a speaker encoder.

    pip download --no-deps Resemblyzer==0.1.4 && unzip -j Resemblyzer-0.1.4-py3-none-any.whl resemblyzer/pretrained.pt
    .venv/bin/python perf/voice_similarity.py --encoder pretrained.pt --windows 0 "0, 0, 120, 180, 180, 310" --together 3 --seeds 4

Similarity: the cosine of two embeddings (GE2E encoder, 256 dimensions; 1: the same) of a clip and of the preset's own codes, decoded. By
clips, and by their last 1.6 s, where a voice that drifts is furthest away. --together: sentences in one, said offline, so that most
windows are long ones. nano-bark with 8-bit weights; needs PyTorch and librosa (`make .venv/oracles .venv/quality`). Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from coarse_windows import say, voice_of
from listening import SAMPLE_RATE, Audio, Clip
from machine import machine
from quality import ROOT, SENTENCES, open_exported, progress

from barkstream.codec import decode_audio
from barkstream.pipeline import Pipeline
from barkstream.voices import HistoryPrompt

RATE, PARTIAL, HOP = 16_000, 160, 80  # Hz; mel frames of 10 ms that an embedding is made of, and between two


class SpeakerEncoder(torch.nn.Module):
    """Resemblyzer's: mel frames through three LSTM layers, embedding by the last state."""

    def __init__(self, weights: Path):
        super().__init__()
        self.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = torch.nn.Linear(256, 256)
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({name: tensor for name, tensor in state.items() if name in self.state_dict()})

    @torch.no_grad()
    def embed(self, audio: Audio) -> np.ndarray:
        """[n, 256] of length 1: of each 1.6 s of audio [samples at 24 kHz], .8 s apart, the last one at its end."""
        import librosa

        at_rate = librosa.resample(audio, orig_sr=SAMPLE_RATE, target_sr=RATE)
        least = 10 ** (-30 / 20)  # -30 dBFS, as it was trained
        loud = at_rate * max(1.0, least / float(np.sqrt(np.mean(at_rate**2))))
        mel = librosa.feature.melspectrogram(y=loud, sr=RATE, n_fft=400, hop_length=160, n_mels=40).astype(np.float32).T
        last = max(0, len(mel) - PARTIAL)
        partials = np.stack([mel[start : start + PARTIAL] for start in (*range(0, last, HOP), last)])
        _, (hidden, _) = self.lstm(torch.from_numpy(partials))
        embeddings = torch.relu(self.linear(hidden[-1]))
        return torch.nn.functional.normalize(embeddings, dim=1).numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="Resemblyzer's pretrained.pt")
    parser.add_argument("--windows", nargs="+", default=["0", "0, 0, 120, 180, 180, 310"])
    parser.add_argument("--together", type=int, default=3, help="sentences in one text")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "nano-bark")
    options = parser.parse_args()
    lines = [line.rstrip(".") for line in SENTENCES.read_text().splitlines() if line]
    groups = zip(*[iter(lines)] * options.together, strict=False)
    texts = [", ".join(group) + "." for group in groups]
    encoder = SpeakerEncoder(options.encoder)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipeline, voices = open_exported(options.checkpoint, Path(folder), int8=True)
        own = {name: whole(encoder.embed(own_speech(pipeline, voice))) for name, voice in voices.items()}
        for given in options.windows:
            clips = progress(say(pipeline, voices, given, texts, range(options.seeds)))
            found[given] = [similarities(clip, encoder, own) for clip in clips]
    rows = {
        given: {key: round(float(np.mean([each[key] for each in scores])), 4) for key in scores[0]}
        for given, scores in found.items()
    }
    for given, row in rows.items():
        print(f"{given:30} {len(found[given])} clips", *(f"{key} {value}" for key, value in row.items()))
    reference, *others = options.windows
    differences = {given: paired(found[reference], found[given]) for given in others}
    for given, each in differences.items():
        print(f"{given} - {reference}:", *(f"{key} {mean:+.4f} +- {error:.4f}" for key, (mean, error) in each.items()))
    settings = {"texts": len(texts), "together": options.together, "seeds": options.seeds, "voices": sorted(voices)}
    where = machine("numpy", "onnxruntime", "torch")
    print(json.dumps({"rows": rows, "differences": differences, "settings": settings, "machine": where}))
    return 0


def own_speech(pipeline: Pipeline, voice: HistoryPrompt) -> Audio:
    """What a preset was made from."""
    return np.concatenate(list(decode_audio(iter([voice.fine]), pipeline.stages)))


def similarities(clip: Clip, encoder: SpeakerEncoder, own: dict[str, np.ndarray]) -> dict[str, float]:
    """A clip's seconds, and its similarity with its own preset, of which own has the embeddings, and with the others."""
    name, embeddings = voice_of(clip.sentence, own), encoder.embed(clip.audio)
    return {
        "seconds": len(clip.audio) / SAMPLE_RATE,
        "own": float(whole(embeddings) @ own[name]),
        "own_at_the_end": float(embeddings[-1] @ own[name]),
        "others": float(np.mean([whole(embeddings) @ own[other] for other in own if other != name])),
    }


def whole(embeddings: np.ndarray) -> np.ndarray:
    """One embedding of a clip."""
    mean = embeddings.mean(axis=0)
    return mean / np.linalg.norm(mean)


def paired(a: list[dict[str, float]], b: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Of each number b's less a's, clip by clip: the mean, and two standard errors of it."""
    differences = {key: np.array([y[key] - x[key] for x, y in zip(a, b, strict=True)]) for key in a[0]}
    return {
        key: (round(float(each.mean()), 4), round(float(2 * each.std(ddof=1) / np.sqrt(len(each))), 4))
        for key, each in differences.items()
    }


if __name__ == "__main__":
    sys.exit(main())
