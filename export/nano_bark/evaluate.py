"""Score what synthesize.py said: MODEL_CARD's table.

    evaluate.py --model MODEL_DIR --teacher TEACHER.npz CLIPS.npz [CLIPS.npz ...] [--json SCORES.json]

Needs what `make quality` needs (Whisper tiny, DNSMOS, librosa), PyTorch and transformers; and hibari-tts and onnx to
make TEACHER.npz, the teacher's own reading of the held-out sentences, where that file does not exist yet.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "perf"))

from listening import Clip, Listener  # noqa: E402
from synthesize import SEED  # noqa: E402
from teacher import VOICES, Teacher, export  # noqa: E402

HELD = json.loads((HERE / "heldout.json").read_text())
LONGEST_S = 768 / 49.9  # what the semantic model may say before it is cut off


def make_teacher(path):
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder, "teacher.onnx"))
        teacher = Teacher(Path(folder, "teacher.onnx"))
        audio = [teacher(h["ids"], i % 2, SEED + i)[0] for i, h in enumerate(HELD)]
    clips = {f"teacher_{i:03d}": (np.clip(a, -1, 1) * 32767).astype(np.int16) for i, a in enumerate(audio)}
    np.savez_compressed(path, **clips)


def read(path):
    """{condition: {sentence: float samples}}"""
    found = {}
    with np.load(path) as z:
        for key in z.files:
            condition, sentence = key.rsplit("_", 1)
            found.setdefault(condition, {})[int(sentence)] = z[key].astype(np.float32) / 32768
    return found


def pitch(audio):
    """F0 of the voiced frames, Hz: pYIN at 16 kHz."""
    import librosa
    from scipy.signal import resample_poly

    x = resample_poly(audio, 2, 3).astype(np.float32)
    if len(x) < 2048:
        return np.zeros(0)
    f0, voiced, _ = librosa.pyin(x, fmin=60, fmax=400, sr=16_000, frame_length=1024, hop_length=320)
    return f0[voiced]


def preset_pitch(folder):
    """Median F0 of each voice's preset _0, as the codec says its codes."""
    import torch
    from transformers import BarkModel

    model, medians = BarkModel.from_pretrained(folder, dtype=torch.float32).eval(), {}
    for voice in VOICES:
        codes = torch.as_tensor(np.load(folder / "speaker_embeddings" / f"{voice}_0_fine_prompt.npy"))
        with torch.no_grad():
            audio = model.codec_decode(codes[None])[0].numpy()
        medians[voice] = float(np.median(pitch(audio)))
    return medians


def score(listener, condition, clips, teacher):
    heard = [listener.score(Clip(condition, 0, i, HELD[i]["text"], clips[i], [])) for i in sorted(clips)]
    row = dict(n=len(heard))
    row["wer"] = sum(s.word_errors for s in heard) / sum(s.n_words for s in heard)
    row["cer"] = sum(s.character_errors for s in heard) / sum(s.n_characters for s in heard)
    row |= {k: float(np.mean([getattr(s, k) for s in heard])) for k in ("ovrl", "sig", "bak", "p808")}
    row["length"] = sum(map(len, clips.values())) / sum(len(teacher[i]) for i in clips)
    row["ended"] = sum(len(a) / 24_000 < LONGEST_S - 0.1 for a in clips.values())
    for v, voice in enumerate(VOICES):
        mine = [s for s in heard if s.sentence % 2 == v]
        row[f"wer_{voice}"] = sum(s.word_errors for s in mine) / max(1, sum(s.n_words for s in mine))
        row[f"ovrl_{voice}"] = float(np.mean([s.ovrl for s in mine]))
        row[f"f0_{voice}"] = float(np.median(np.concatenate([pitch(clips[i]) for i in clips if i % 2 == v])))
    row["heard"] = {s.sentence: s.heard for s in heard}
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("clips", nargs="*", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--teacher", type=Path, default=HERE / "teacher.npz")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.teacher.exists():
        make_teacher(options.teacher)
    teacher, listener, rows = read(options.teacher)["teacher"], Listener(), {}
    conditions = {} if options.clips else {"teacher": teacher}
    for path in options.clips:
        conditions |= read(path)
    print(
        "| condition | n | WER | CER | DNSMOS overall | signal | background | P.808 | length | ended | F0 heart / deep, Hz |"
    )
    print("| --- |" + " --- |" * 10)
    for name, clips in conditions.items():
        r = rows[name] = score(listener, name, clips, teacher)
        print(
            f"| {name} | {r['n']} | {r['wer']:.1%} | {r['cer']:.1%} | {r['ovrl']:.2f} | {r['sig']:.2f} | {r['bak']:.2f} "
            f"| {r['p808']:.2f} | {r['length']:.3f} | {r['ended']} | {r['f0_heart']:.0f} / {r['f0_deep']:.0f} |",
            flush=True,
        )
    if options.model:
        rows["presets"] = preset_pitch(options.model)
        print("presets' median F0, Hz:", {k: round(v, 1) for k, v in rows["presets"].items()})
    for name, r in rows.items():
        if name != "presets":
            print(f"{name} by voice:", {k: round(v, 3) for k, v in r.items() if k.endswith(tuple(VOICES))})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
