"""Put what is trained so far into a stock Hugging Face Bark directory, and cut it into pieces that travel.

assemble.py OUT [DESTINATION]
"""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import codec
import gpt
import numpy as np
import torch
from safetensors.torch import load_file
from teacher import SEM_HZ
from transformers import BarkConfig, BarkModel, EncodecConfig, GenerationConfig
from transformers.models.bark import BarkCoarseConfig, BarkFineConfig, BarkSemanticConfig
from transformers.models.bark.generation_configuration_bark import (
    BarkCoarseGenerationConfig,
    BarkFineGenerationConfig,
    BarkGenerationConfig,
    BarkSemanticGenerationConfig,
)

HERE = Path(__file__).parent
PIECE = 16_000_000  # bytes
PRESETS = dict(heart_0=4, heart_1=6, deep_0=7, deep_1=11)  # texts of the corpus


def config():
    def shape(kind):
        n_layers, n_heads, width = gpt.SHAPES[kind]
        sizes = dict(num_layers=n_layers, num_heads=n_heads, hidden_size=width)
        return dict(sizes, block_size=1024, dropout=0.0, bias=False, use_cache=True)

    semantic = BarkSemanticConfig(input_vocab_size=gpt.SEM_IN, output_vocab_size=gpt.SEM_OUT, **shape("semantic"))
    coarse = BarkCoarseConfig(input_vocab_size=gpt.COARSE_IN, output_vocab_size=gpt.COARSE_OUT, **shape("coarse"))
    fine = BarkFineConfig(
        input_vocab_size=gpt.FINE_IN, output_vocab_size=gpt.FINE_IN, n_codes_total=8, n_codes_given=1,
        tie_word_embeddings=True, **shape("fine"),
    )  # fmt: skip
    return BarkConfig(
        semantic_config=semantic.to_dict(),
        coarse_acoustics_config=coarse.to_dict(),
        fine_acoustics_config=fine.to_dict(),
        codec_config=EncodecConfig(**codec.CONFIG).to_dict(),
    )


def generation():
    semantic = BarkSemanticGenerationConfig(
        eos_token_id=gpt.SEM_PAD, pad_token_id=gpt.SEM_PAD, semantic_pad_token=gpt.SEM_PAD, max_new_tokens=768,
        temperature=0.7, do_sample=True, text_encoding_offset=gpt.TEXT_OFFSET, text_pad_token=gpt.TEXT_PAD,
        semantic_infer_token=gpt.SEM_INFER, semantic_vocab_size=gpt.N_UNITS, max_input_semantic_length=256,
        semantic_rate_hz=SEM_HZ,
    )  # fmt: skip
    coarse = BarkCoarseGenerationConfig(
        temperature=0.7, do_sample=True, coarse_semantic_pad_token=gpt.COARSE_PAD, coarse_infer_token=gpt.COARSE_INFER,
        coarse_rate_hz=75, n_coarse_codebooks=2, max_coarse_input_length=gpt.WINDOW_UNITS,
        max_coarse_history=gpt.PAST, sliding_window_len=gpt.NEW,
    )  # fmt: skip
    fine = BarkFineGenerationConfig(
        temperature=0.5, max_fine_history_length=512, max_fine_input_length=1024, n_fine_codebooks=8
    )
    whole = BarkGenerationConfig(
        semantic_config=semantic.to_dict(), coarse_acoustics_config=coarse.to_dict(),
        fine_acoustics_config=fine.to_dict(), sample_rate=24000, codebook_size=1024,
    )  # fmt: skip
    given = lambda d: {k: given(v) if isinstance(v, dict) else v for k, v in d.items() if v is not None}  # noqa: E731
    return given(whole.to_dict())


def fill(module, state, absent=()):
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    missing, unknown = module.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("attn.bias") and not k.startswith(absent or "none")]
    assert not missing and not unknown, (missing[:5], unknown[:5])


def keep(weights, name, out):
    """A part of a checkpoint made before, as its trainer would leave it in `out`."""
    state = {k.removeprefix(f"{name}."): v for k, v in load_file(weights).items() if k.startswith(f"{name}.")}
    torch.save(dict(model=state), Path(out) / f"{name}.pt")


def load(out, name):
    return torch.load(out / f"{name}.pt", map_location="cpu", weights_only=True)


def build(out):
    model = BarkModel(config())
    fill(model.semantic, load(out, "semantic")["model"])
    fill(model.coarse_acoustics, load(out, "coarse")["model"])
    with torch.no_grad():
        model.coarse_acoustics.lm_head.weight *= gpt.COARSE_SHARPNESS
    fill(model.fine_acoustics, load(out, "fine")["model"], "lm_heads")
    for i in range(7):
        model.fine_acoustics.lm_heads[i].weight = model.fine_acoustics.input_embeds_layers[i + 1].weight
    fill(model.codec_model, load(out, "codec")["codec"])
    model.generation_config = GenerationConfig.from_dict(generation())
    return model.eval()


def presets(tokens, destination):
    """Utterances of the corpus as history prompts, in Bark's own layout."""
    meta, sem, codes = (np.load(tokens / f"{name}.npy", mmap_mode="r") for name in ("meta", "sem", "codes"))
    start = np.concatenate([[[0, 0]], np.cumsum(meta[:, 1:3], 0)])
    paths = {"repo_or_path": "."}
    for name, text in PRESETS.items():
        i = int(np.flatnonzero(meta[:, 3] == text)[0])
        (frame, unit), (frame_end, unit_end) = start[i], start[i + 1]
        spoken = np.array(codes[:, frame:frame_end], np.int64)
        prompt = dict(semantic=np.array(sem[unit:unit_end], np.int64), coarse=spoken[:2], fine=spoken)
        paths[name] = {f"{part}_prompt": f"speaker_embeddings/{name}_{part}_prompt.npy" for part in prompt}
        for part, tokens_of in prompt.items():
            np.save(destination / paths[name][f"{part}_prompt"], tokens_of)
    (destination / "speaker_embeddings_path.json").write_text(json.dumps(paths, indent=2))


def main(out, destination=None):
    out = Path(out)
    destination = Path(destination or out / "nano-bark")
    partial = destination.with_name(f".{destination.name}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "speaker_embeddings").mkdir(parents=True)
    model = build(out).half()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("attn.bias")}  # masks: rebuilt on load
    model.save_pretrained(partial, state_dict=state)
    (partial / "generation_config.json").write_text(json.dumps(generation(), indent=2))
    for file in (HERE / "tokenizer").iterdir():
        shutil.copy(file, partial)
    presets(out / "tokens", partial)
    size = (partial / "model.safetensors").stat().st_size
    assert size <= 64_000_000, size
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)
    codec = load(out, "codec")
    more = {part: {k: v.half() for k, v in codec[part].items()} for part in ("judges", "expected")}
    torch.save(more, destination / "training.pt")
    pieces(destination, out / "pieces")
    print(f"{destination}: model.safetensors {size / 1e6:.1f} MB", flush=True)


def pieces(model, folder):
    """The weights in pieces (join them with cat) and everything else in one archive."""
    whole, folder = folder, folder.with_name(".pieces")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    weights = (model / "model.safetensors").read_bytes()
    for i in range(0, len(weights), PIECE):
        (folder / f"model.safetensors.{i // PIECE}").write_bytes(weights[i : i + PIECE])
    with tarfile.open(folder / "rest.tar.gz", "w:gz") as archive:
        for file in sorted(model.rglob("*")):
            if file.is_file() and file.name != "model.safetensors":
                archive.add(file, file.relative_to(model))
    shutil.rmtree(whole, ignore_errors=True)
    folder.rename(whole)


if __name__ == "__main__":
    main(*sys.argv[1:])
