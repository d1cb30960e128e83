"""Export: any Bark checkpoint becomes artifacts, without PyTorch; what cannot be used is named in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file

from barkstream.export import write
from barkstream.export.__main__ import main
from barkstream.export.checkpoint import open_huggingface
from barkstream.export.codec_state import state_size
from barkstream.export.graph import quantize_int8
from barkstream.export.tensors import CheckpointError
from barkstream.export.write import STAGES
from barkstream.tokens import Checkpoint
from checkpoints import configs, random_checkpoint, suno_files

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "tiny")


def session(repository: Path, stage: str) -> ort.InferenceSession:
    return ort.InferenceSession(repository / f"bark_{stage}/1/model.onnx", providers=["CPUExecutionProvider"])


def described(repository: Path, stage: str) -> dict[str, str]:
    return session(repository, stage).get_modelmeta().custom_metadata_map


def fingerprints(repository: Path) -> dict[str, str]:
    return {stage: described(repository, stage)["weights_sha256"] for stage in STAGES}


def edit_weights(directory: Path, edit) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors")


def edit_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_any_size_is_exported_without_pytorch(tiny: Path, tmp_path: Path):
    code = "import sys; sys.modules['torch'] = None; from barkstream.export.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(tiny), "--to", str(tmp_path / "repository")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"bark_{stage}" in done.stdout for stage in STAGES)


def test_every_width_in_the_graphs_is_the_checkpoints(tiny: Path, tmp_path: Path):
    source = open_huggingface(tiny)
    write.export(source, tmp_path)
    bark = source.checkpoint
    shapes = {
        stage: {
            x.name: x.shape for x in (*session(tmp_path, stage).get_inputs(), *session(tmp_path, stage).get_outputs())
        }
        for stage in STAGES
    }
    n_coarse = bark.coarse.n_codebooks * bark.coarse.codebook_size
    assert shapes["semantic"]["logits"][1] == bark.semantic.n_tokens + 1 != bark.semantic.size.n_output_ids
    assert shapes["semantic"]["token_ids"][2] == 2
    assert shapes["coarse"]["logits"][1] == n_coarse != bark.coarse.size.n_output_ids
    assert shapes["coarse"]["token_ids"][2] == 1
    assert shapes["coarse"]["key_1"][1:] == [3, 96, 16] == shapes["coarse"]["value_1_out"][1:]
    assert shapes["fine"]["codes"][1] == 6 == shapes["fine"]["filled"][1]
    assert shapes["fine"]["uniforms"][1] == 4
    assert shapes["codec"]["state"][1] == state_size(bark.codec) == shapes["codec"]["next_state"][1]
    assert described(tmp_path, "codec")["state_size"] == str(state_size(bark.codec))


def test_the_semantic_logits_end_with_the_end_token(tiny: Path, tmp_path: Path):
    """In this checkpoint the end id is not the one after the last semantic token."""
    write.export(open_huggingface(tiny), tmp_path)
    head = load_file(tiny / "model.safetensors")["semantic.lm_head.weight"]
    exported = (
        ir.load(tmp_path / "bark_semantic/1/model.onnx").graph.initializers["lm_head.weight.T"].const_value.numpy()
    )
    np.testing.assert_array_equal(exported[:, -1], head[53])
    np.testing.assert_array_equal(exported[:, :-1], head[:50].T)


def test_each_stage_gets_its_checkpoint_json_and_the_front_its_tokenizer_and_voices(tiny: Path, tmp_path: Path):
    source = open_huggingface(tiny)
    write.export(source, tmp_path)
    for model in ("bark", *(f"bark_{stage}" for stage in STAGES)):
        assert Checkpoint.load(tmp_path / model / "1/checkpoint.json") == source.checkpoint
    assert (tmp_path / "bark/1/tokenizer.json").read_text() == (tiny / "tokenizer.json").read_text()
    voice = np.load(tmp_path / "bark/1/voices/v2/en_test_0.npz")
    for kind in ("semantic_prompt", "coarse_prompt", "fine_prompt"):
        original = np.load(tiny / f"speaker_embeddings/v2/en_test_0_{kind}.npy")
        np.testing.assert_array_equal(voice[kind], original)
        assert voice[kind].dtype == np.int32


def test_another_checkpoint_replaces_all_of_the_first_ones_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as m:
        m.setattr(write, "EXTERNAL_BYTES", 1000)
        write.export(open_huggingface(tiny), tmp_path / "repository")
    other = random_checkpoint(tmp_path / "other", seed=1)
    (other / "speaker_embeddings_path.json").unlink()
    write.export(open_huggingface(other), tmp_path / "repository")
    left = sorted(
        p.relative_to(tmp_path / "repository").as_posix() for p in (tmp_path / "repository").rglob("*") if p.is_file()
    )
    stages = [f"bark_{stage}/1/{file}" for stage in sorted(STAGES) for file in ("checkpoint.json", "model.onnx")]
    assert left == ["bark/1/checkpoint.json", "bark/1/tokenizer.json", *stages]


def test_big_weights_lie_beside_the_model_and_compute_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = open_huggingface(tiny)
    write.export_stage(source, "codec", tmp_path / "inside")
    monkeypatch.setattr(write, "EXTERNAL_BYTES", 1000)
    path = write.export_stage(source, "codec", tmp_path / "beside")
    assert path.with_name("model.onnx.data").stat().st_size > path.stat().st_size
    codes = np.random.default_rng(0).integers(0, 40, (1, 6, 20)).astype(np.int32)
    inputs = {"codes": codes, "state": np.zeros((1, state_size(source.checkpoint.codec)), np.float32)}
    inside, beside = (session(tmp_path / where, "codec").run(None, inputs)[0] for where in ("inside", "beside"))
    np.testing.assert_array_equal(inside, beside)


def test_an_interrupted_export_leaves_the_old_artifact_or_none(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = open_huggingface(tiny)

    def interrupted(model: ir.Model, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half a model")
        raise KeyboardInterrupt

    write.export_stage(source, "coarse", tmp_path)
    before = (tmp_path / "bark_coarse/1/model.onnx").read_bytes()
    monkeypatch.setattr(write.ir, "save", interrupted)
    for stage in ("coarse", "fine"):
        with pytest.raises(KeyboardInterrupt):
            write.export_stage(source, stage, tmp_path)
    assert (tmp_path / "bark_coarse/1/model.onnx").read_bytes() == before
    assert list((tmp_path / "bark_fine/1").iterdir()) == []


def test_int8_weights_are_a_quarter_and_close(tiny: Path, tmp_path: Path):
    weight = np.random.default_rng(0).standard_normal((24, 50)).astype(np.float32)
    packed, scales = quantize_int8(weight)
    restored = ((packed.astype(np.float32) - 128) * scales[..., None]).reshape(24, -1)[:, :50]
    assert packed.dtype == np.uint8
    assert packed.shape == (24, 2, 32)
    assert np.abs(restored - weight).max() <= scales.max() / 2 * 1.001
    assert quantize_int8(np.zeros((4, 32), np.float32))[0].tolist() == np.full((4, 1, 32), 128).tolist()
    wide = random_checkpoint(tmp_path / "wide", width=96)
    assert (
        main([str(wide), "--to", str(tmp_path / "float32")])
        == main([str(wide), "--to", str(tmp_path / "int8"), "--int8"])
        == 0
    )
    sizes = [(tmp_path / kind / "bark_coarse/1/model.onnx").stat().st_size for kind in ("float32", "int8")]
    assert sizes[1] < 0.45 * sizes[0]  # the embedding tables stay in float32
    assert described(tmp_path / "int8", "coarse")["weights"] == "int8"
    assert described(tmp_path / "int8", "codec")["weights"] == "float32"


# --- what can be read ------------------------------------------------------------------------------------------------


def test_shards_half_precision_and_pickles_read_as_the_one_float32_file(tiny: Path, tmp_path: Path):
    torch = pytest.importorskip("torch")
    weights = {
        name: x.astype(np.float16).astype(np.float32) for name, x in load_file(tiny / "model.safetensors").items()
    }
    wanted = {stage: write.fingerprint(open_huggingface(tiny).weights(stage)) for stage in STAGES}
    (tiny / "model.safetensors").unlink()

    def read() -> dict[str, str]:
        found = {stage: write.fingerprint(open_huggingface(tiny).weights(stage)) for stage in STAGES}
        for file in (*tiny.glob("model*.safetensors*"), *tiny.glob("*.bin")):
            file.unlink()
        return found

    save_file(weights, tiny / "model.safetensors")
    expected = read()
    assert expected != wanted  # rounded to float16 above
    save_file({name: x.astype(np.float16) for name, x in weights.items()}, tiny / "model.safetensors")
    assert read() == expected
    shards = [dict(list(weights.items())[i::2]) for i in range(2)]
    for i, shard in enumerate(shards):
        save_file(shard, tiny / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read() == expected
    torch.save({name: torch.from_numpy(x).half() for name, x in weights.items()}, tiny / "pytorch_model.bin")
    assert read() == expected


def test_bfloat16_is_read_without_pytorch(tmp_path: Path):
    exact = open_huggingface(random_checkpoint(tmp_path / "float32")).weights("coarse")
    rounded = open_huggingface(random_checkpoint(tmp_path / "bfloat16", dtype="bfloat16")).weights("coarse")
    for name, x in exact.items():
        assert rounded[name].dtype == np.float32
        np.testing.assert_allclose(rounded[name], x, rtol=2**-8)


def test_both_spellings_of_weight_norm_and_plain_weights_read_alike(tiny: Path):
    expected = open_huggingface(tiny).weights("codec")

    def respell(weights: dict) -> None:
        for name in [name for name in weights if name.endswith("original0")]:
            conv = name.removesuffix(".parametrizations.weight.original0")
            g, v = weights.pop(name), weights.pop(name.replace("original0", "original1"))
            if conv.endswith("layers.0.conv"):
                weights[f"{conv}.weight"] = (
                    g * v / np.sqrt((v.astype(np.float64) ** 2).sum((1, 2), keepdims=True)).astype(np.float32)
                )
            else:
                weights[f"{conv}.weight_g"], weights[f"{conv}.weight_v"] = g, v

    edit_weights(tiny, respell)
    respelled = open_huggingface(tiny).weights("codec")
    assert respelled.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(respelled[name], x, rtol=1e-6)


def test_tied_fine_heads_are_the_next_codebooks_tables(tmp_path: Path):
    fine = open_huggingface(
        random_checkpoint(tmp_path / "tied", bark_ids=True, width=16, n_heads=2, n_layers=1)
    ).weights("fine")
    for k in range(1, 8):
        assert fine[f"lm_heads.{k - 1}.weight"] is fine[f"input_embeds_layers.{k}.weight"]


def test_attention_masks_in_the_file_are_ignored(tiny: Path):
    before = write.fingerprint(open_huggingface(tiny).weights("coarse"))
    edit_weights(
        tiny, lambda weights: weights.update({"coarse_acoustics.layers.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)})
    )
    assert write.fingerprint(open_huggingface(tiny).weights("coarse")) == before


# --- Suno's files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint with Bark's own ids, 2 wide."""
    pytest.importorskip("torch")
    return random_checkpoint(
        tmp_path_factory.mktemp("bark") / "huggingface", bark_ids=True, width=4, n_heads=2, n_layers=1
    )


@pytest.fixture
def suno(bark: Path, tmp_path: Path) -> Path:
    return suno_files(bark, tmp_path / "suno")


@pytest.mark.parametrize("options", [{}, {"suffix": "", "prefix": "", "one_vocabulary": True}], ids=["large", "small"])
def test_sunos_files_export_as_the_same_model_in_hugging_faces_format(options: dict, bark: Path, tmp_path: Path):
    suno = suno_files(bark, tmp_path / "suno", **options)
    assert main([str(bark), "--to", str(tmp_path / "a")]) == 0
    arguments = ["--codec", str(bark), "--tokenizer", str(bark / "tokenizer.json")]
    assert main([str(suno), *arguments, "--to", str(tmp_path / "b"), "--name", "huggingface"]) == 0
    assert fingerprints(tmp_path / "a") == fingerprints(tmp_path / "b")
    one, other = (Checkpoint.load(tmp_path / x / "bark/1/checkpoint.json") for x in "ab")
    assert one == other


def test_sunos_numpy_scalars_load_and_code_in_a_pickle_does_not(suno: Path, bark: Path, tmp_path: Path, capsys):
    import torch

    arguments = [
        str(suno),
        "--codec",
        str(bark),
        "--tokenizer",
        str(bark / "tokenizer.json"),
        "--to",
        str(tmp_path / "x"),
    ]
    checkpoint = torch.load(suno / "coarse_2.pt", weights_only=True)
    torch.save({**checkpoint, "best_val_loss": np.float64(2.5)}, suno / "coarse_2.pt")  # as in the published files
    assert main(arguments) == 0
    torch.save({**checkpoint, "best_val_loss": subprocess.Popen}, suno / "coarse_2.pt")
    assert main(arguments) == 1
    assert "coarse_2.pt is damaged, only partly downloaded, or holds more than tensors" in capsys.readouterr().err


def test_an_encodec_weights_file_serves_as_sunos_codec(bark: Path, tmp_path: Path):
    """EnCodec's own names. (The toy codec is smaller than ENCODEC_24KHZ says, so only the names are compared.)"""
    import torch

    from barkstream.export.suno import CODEC_NAMES, open_encodec, renamed

    ours = open_huggingface(bark).weights("codec")
    names = {
        "decoder.layers.": "decoder.model.",
        "quantizer.layers": "quantizer.vq.layers",
        ".codebook.": "._codebook.",
    }
    theirs = {}
    for name, x in ours.items():
        module = "convtr" if name.split(".")[2] in ("3", "6", "9", "12") and ".conv." in name else "conv"
        for a, b in names.items():
            name = name.replace(a, b)
        theirs[name.replace(".conv.", f".{module}.{module}.")] = torch.from_numpy(x)
    assert "decoder.model.3.convtr.convtr.weight" in theirs
    assert "decoder.model.4.block.1.conv.conv.weight" in theirs
    torch.save(theirs, tmp_path / "encodec.th")
    config, read = open_encodec(str(tmp_path / "encodec.th"))
    assert config["num_filters"] == 32
    assert renamed(read(), CODEC_NAMES).keys() == ours.keys()


def test_a_folder_of_npz_voices_is_added(tiny: Path, tmp_path: Path):
    (tmp_path / "prompts/v2").mkdir(parents=True)
    prompts = {
        "semantic_prompt": np.arange(9),
        "coarse_prompt": np.ones((2, 9), np.uint16),
        "fine_prompt": np.ones((6, 9), np.int64),
    }
    np.savez(tmp_path / "prompts/v2/fr_speaker_3.npz", **prompts)
    np.savez(tmp_path / "prompts/announcer.npz", **prompts)
    assert main([str(tiny), "--to", str(tmp_path / "x"), "--voices", str(tmp_path / "prompts")]) == 0
    voices = tmp_path / "x/bark/1/voices"
    found = sorted(p.relative_to(voices).as_posix() for p in voices.rglob("*.npz"))
    assert found == ["announcer.npz", "v2/en_test_0.npz", "v2/fr_speaker_3.npz"]
    assert np.load(voices / "announcer.npz")["coarse_prompt"].dtype == np.int32


# --- the hub ---------------------------------------------------------------------------------------------------------


def fake_hub(monkeypatch: pytest.MonkeyPatch, names: list[str], directory: Path) -> list[list[str]]:
    """A huggingface_hub that offers `names` and gives `directory`; returns the list of what it is asked for."""
    asked: list[list[str]] = []
    hub = types.ModuleType("huggingface_hub")
    hub.HfApi = lambda: types.SimpleNamespace(list_repo_files=lambda repository: names)  # type: ignore[attr-defined]
    hub.snapshot_download = lambda repository, allow_patterns: (asked.append(allow_patterns), str(directory))[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return asked


def test_from_the_hub_only_one_format_of_the_weights_is_fetched(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = fake_hub(
        monkeypatch, ["config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "text_2.pt"], tiny
    )
    assert main(["suno/bark-small", "--to", str(tmp_path / "x")]) == 0
    assert "model-*.safetensors" in asked[0]
    assert not any("bin" in pattern or ".pt" in pattern for pattern in asked[0])
    assert described(tmp_path / "x", "coarse")["checkpoint"] == "bark-small"
    asked = fake_hub(monkeypatch, ["config.json", "pytorch_model.bin"], tiny)
    assert main(["suno/bark", "--to", str(tmp_path / "x")]) == 0
    assert "pytorch_model.bin" in asked[0]


# --- what cannot be used says why ------------------------------------------------------------------------------------


def message(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    """The one line that a refused export prints."""
    assert main([*map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("barkstream export: ")
    assert error.count("\n") == 1
    return error


def test_a_missing_file_is_named(tiny: Path, tmp_path: Path, capsys):
    assert "hub id looks like suno/bark-small" in message(capsys, "nowhere", "--to", tmp_path / "x")
    for file in (
        "tokenizer.json",
        "generation_config.json",
        "speaker_embeddings/v2/en_test_0_coarse_prompt.npy",
        "config.json",
    ):
        (tiny / file).rename(tmp_path / "aside")
        assert file.rpartition("/")[2] in message(capsys, tiny, "--to", tmp_path / "x")
        (tmp_path / "aside").rename(tiny / file)
    (tiny / "model.safetensors").unlink()
    assert "expected model.safetensors or pytorch_model.bin" in message(capsys, tiny, "--to", tmp_path / "x")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    assert "model-1.safetensors" in message(capsys, tiny, "--to", tmp_path / "x")


def test_truncated_weights_are_called_damaged(tiny: Path, tmp_path: Path, capsys):
    whole = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is damaged or only partly downloaded" in message(capsys, tiny, "--to", tmp_path / "x")
    assert not list((tmp_path / "x").rglob("*.onnx"))


def test_a_truncated_pickle_is_called_damaged(suno: Path, bark: Path, tmp_path: Path, capsys):
    whole = (suno / "fine_2.pt").read_bytes()
    (suno / "fine_2.pt").write_bytes(whole[: len(whole) // 2])
    arguments = ["--codec", str(bark), "--tokenizer", str(bark / "tokenizer.json"), "--to", str(tmp_path / "x")]
    assert "fine_2.pt is damaged" in message(capsys, suno, *arguments)
    (suno / "fine_2.pt").unlink()
    assert "Suno's fine model is missing" in message(capsys, suno, *arguments)


def test_sunos_files_without_a_codec_ask_for_one(
    suno: Path, bark: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "encodec", None)
    tokenizer = ["--tokenizer", str(bark / "tokenizer.json")]
    assert "--codec" in message(capsys, suno, *tokenizer, "--to", tmp_path / "x")


def test_a_missing_or_misshapen_tensor_is_named(tiny: Path, tmp_path: Path, capsys):
    edit_weights(tiny, lambda weights: weights.pop("semantic.layers.1.mlp.in_proj.weight"))
    error = message(capsys, tiny, "--to", tmp_path / "x")
    assert "the semantic weights lack layers.1.mlp.in_proj.weight" in error
    edit_json(tiny / "config.json", lambda config: config["semantic_config"].update(num_layers=1))
    edit_json(tiny / "config.json", lambda config: config["codec_config"].update(num_filters=3))
    error = message(capsys, tiny, "--to", tmp_path / "x")
    assert "the codec weights' decoder.layers.0.conv.weight is [16, 16, 5]; the config says [24, 16, 5]" in error


def test_a_missing_config_key_is_named(tiny: Path, tmp_path: Path, capsys):
    edit_json(
        tiny / "generation_config.json", lambda config: config["coarse_acoustics_config"].pop("sliding_window_len")
    )
    assert "sliding_window_len" in message(capsys, tiny, "--to", tmp_path / "x")
    (tiny / "config.json").write_text("{")
    assert "config.json is no JSON" in message(capsys, tiny, "--to", tmp_path / "x")


def test_a_codec_that_cannot_stream_is_refused(tiny: Path, tmp_path: Path, capsys):
    edit_json(tiny / "config.json", lambda config: config["codec_config"].update(use_causal_conv=False))
    assert "use_causal_conv = False" in message(capsys, tiny, "--to", tmp_path / "x")


def test_the_fixture_has_none_of_nano_barks_sizes():
    config, generation = configs(48, 3, 2, 2, bark_ids=False)
    nano = ROOT / "checkpoints/nano-bark"
    theirs, ours = (
        Checkpoint.from_configs(c, g, "x")
        for c, g in (
            (config, generation),
            tuple(json.loads((nano / f).read_text()) for f in ("config.json", "generation_config.json")),
        )
    )
    for stage in ("semantic", "coarse", "fine"):
        assert not set(vars(getattr(theirs, stage).size).items()) & set(vars(getattr(ours, stage).size).items())


def test_errors_are_value_errors():
    assert issubclass(CheckpointError, ValueError)
