"""Say the held-out sentences with the stock Hugging Face pipeline, for evaluate.py to score.

    synthesize.py MODEL_DIR TEACHER_ONNX OUT --text 100 --diagnosis 40

OUT/text.npz: from text, voices heart_0 and deep_0 alternating, temperatures .7/.7/.5 as in the generation config.
OUT/diagnosis.npz: codec (the teacher's audio through the codec), coarse (the teacher's first two codebooks -> fine ->
codec) and units (the teacher's units -> coarse -> fine -> codec). int16, 24 kHz, keys CONDITION_NNN.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from teacher import VOICES, Teacher, Units
from transformers import BarkModel, BarkProcessor
from transformers.models.bark.generation_configuration_bark import (
    BarkCoarseGenerationConfig,
    BarkFineGenerationConfig,
    BarkSemanticGenerationConfig,
)

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 5000  # of the teacher's noise: sentence i is said with SEED + i


class Speaker:
    def __init__(self, folder):
        self.model = BarkModel.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE)
        self.processor = BarkProcessor.from_pretrained(folder)
        given = self.model.generation_config
        self.semantic = BarkSemanticGenerationConfig(**given.semantic_config)
        self.coarse = BarkCoarseGenerationConfig(**given.coarse_acoustics_config)
        self.fine = BarkFineGenerationConfig(**given.fine_acoustics_config)
        self.configs = dict(semantic_generation_config=self.semantic, coarse_generation_config=self.coarse)
        self.preset = {}
        for voice in VOICES:
            prompt = self.processor("x", voice_preset=f"{voice}_0")["history_prompt"]
            self.preset[voice] = {k: torch.as_tensor(v).to(DEVICE) for k, v in prompt.items()}

    def from_text(self, texts, voice):
        given = self.processor(texts)
        audio, n = self.model.generate(
            given["input_ids"].to(DEVICE), attention_mask=given["attention_mask"].to(DEVICE),
            history_prompt=self.preset[voice], return_output_lengths=True,
        )  # fmt: skip
        return [a[:k] for a, k in zip(audio, n, strict=True)]

    def from_units(self, units, voice):
        rows = torch.nn.utils.rnn.pad_sequence(units, batch_first=True, padding_value=self.semantic.semantic_pad_token)
        coarse, n = self.model.coarse_acoustics.generate(
            rows.to(DEVICE), history_prompt=self.preset[voice], return_output_lengths=True, **self.configs
        )
        return self.from_coarse(coarse, n // 2, voice)

    def from_codes(self, codes, voice):
        """codes: [2, frames] each"""
        n = torch.tensor([c.shape[1] for c in codes])
        rows = [c.t() + torch.tensor([0, 1024]) + self.semantic.semantic_vocab_size for c in codes]
        last = [torch.cat([r, r[-1:].expand(int(n.max()) - len(r), 2)]) for r in rows]
        return self.from_coarse(torch.stack(last).flatten(1).to(DEVICE), n, voice)

    def from_coarse(self, coarse, n_frames, voice):
        codes = self.model.fine_acoustics.generate(
            coarse,
            history_prompt=self.preset[voice],
            fine_generation_config=self.fine,
            codebook_size=1024,
            **self.configs,
        )
        return self.model.codec_decode(codes, n_frames.tolist())

    def encode(self, wav):
        """float samples -> codes [8, frames], on the CPU"""
        x = torch.as_tensor(wav[: len(wav) // 320 * 320], dtype=torch.float32, device=DEVICE)
        return self.model.codec_model.quantizer.encode(self.model.codec_model.encoder(x[None, None]), 6.0)[:, 0].cpu()

    def decode(self, codes):
        return self.model.codec_decode(codes[None].to(DEVICE))[0]


def by_voice(items, say, rows):
    """say(rows of items, voice) -> audio, voices taking turns over the items; results in the items' order."""
    out = [None] * len(items)
    for v, voice in enumerate(VOICES):
        mine = list(range(v, len(items), 2))
        for i in range(0, len(mine), rows):
            chosen = mine[i : i + rows]
            for j, audio in zip(chosen, say([items[j] for j in chosen], voice), strict=True):
                out[j] = audio
    return out


def pcm(audio):
    if torch.is_tensor(audio):
        audio = audio.float().cpu().numpy()
    return (np.clip(audio.reshape(-1), -1, 1) * 32767).astype(np.int16)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model"), parser.add_argument("teacher"), parser.add_argument("out")
    parser.add_argument("--text", type=int, default=100)
    parser.add_argument("--diagnosis", type=int, default=40)
    parser.add_argument("--rows", type=int, default=50, help="sentences said at once; 1 as a user would")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    out, began = Path(options.out), time.time()
    out.mkdir(parents=True, exist_ok=True)
    held, speaker = json.loads((HERE / "heldout.json").read_text()), Speaker(options.model)

    def write(name, **conditions):
        clips = {f"{c}_{i:03d}": pcm(a) for c, audio in conditions.items() for i, a in enumerate(audio)}
        np.savez_compressed(out / f".{name}.npz", **clips)
        (out / f".{name}.npz").rename(out / f"{name}.npz")
        print(
            f"{name}: {sum(map(len, clips.values())) / 24000:.0f} s of audio after {time.time() - began:.0f} s",
            flush=True,
        )

    texts = [h["text"] for h in held[: options.text]]
    write("text", text=by_voice(texts, speaker.from_text, options.rows))
    teacher, units = Teacher(options.teacher), Units()
    codes, sem = [], []
    for i, h in enumerate(held[: options.diagnosis]):
        wav, place, features = teacher(h["ids"], i % 2, SEED + i)
        sem.append(torch.as_tensor(units(h["ids"], place, features)[0]))
        codes.append(speaker.encode(wav))
    write(
        "diagnosis",
        codec=[speaker.decode(c) for c in codes],
        coarse=by_voice([c[:2] for c in codes], speaker.from_codes, options.rows),
        units=by_voice(sem, speaker.from_units, options.rows),
    )


if __name__ == "__main__":
    main()
