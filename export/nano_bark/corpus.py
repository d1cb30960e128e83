"""The teacher says the training texts: shards of audio and semantic units, written as they are made.

    corpus.py CORPUS_JSON TEACHER_ONNX OUT WORKERS LIMIT

A shard holds whole frames of 320 samples: wav int16, sem uint16 and, as long, phone (which of the text's phones a unit
belongs to) and, per utterance, meta = voice, frames, units, text.
"""

import gzip
import json
import os
import sys
import time
from multiprocessing import Process
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
from teacher import SEM_HZ, SR, Teacher, Units

TEXTS_PER_SHARD = 125
FRAME = 320  # samples of a code frame
FRAMES_PER_UNIT = 75 / SEM_HZ


def say(texts, onnx, out, first, stride):
    os.nice(5)  # the trainers go first
    teacher, units = Teacher(onnx), Units()
    for shard in range(first, -(-len(texts) // TEXTS_PER_SHARD), stride):
        wav, sem, phone, meta = [], [], [], []
        for i in range(shard * TEXTS_PER_SHARD, min((shard + 1) * TEXTS_PER_SHARD, len(texts))):
            voice = i % 2
            audio, place, features = teacher(texts[i]["ids"], voice, i)
            if not 1.0 <= len(audio) / SR <= 14.0:
                continue
            unit, spoken = units(texts[i]["ids"], place, features)
            n = min(len(audio) // FRAME, int(len(unit) * FRAMES_PER_UNIT))
            wav.append((np.clip(audio[: n * FRAME], -1, 1) * 32767).astype(np.int16))
            sem.append(unit.astype(np.uint16)), phone.append(spoken.astype(np.uint16))
            meta.append((voice, n, len(unit), i))
        partial = out / f".s{shard:05d}.npz"
        wav, sem, phone = (np.concatenate(x) for x in (wav, sem, phone))
        np.savez(partial, wav=wav, sem=sem, phone=phone, meta=np.array(meta, np.int64))
        partial.rename(out / f"s{shard:05d}.npz")


def main(corpus, onnx, out, n_workers, limit):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with gzip.open(corpus, "rt") as file:
        texts = json.load(file)["train"][: int(limit)]
    workers = [Process(target=say, args=(texts, onnx, out, i, int(n_workers))) for i in range(int(n_workers))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    (out / "done").write_text(f"{time.time() - began:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
