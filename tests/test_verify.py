"""The gate of the artifacts: they agree with the plain PyTorch twins, and a changed one does not pass."""

from __future__ import annotations

import shutil
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from checkpoints import random_checkpoint

pytest.importorskip("torch")

from barkstream.export.__main__ import main as export
from barkstream.export.checkpoint import open_huggingface
from barkstream.export.codec_state import state_size
from barkstream.export.suno import CODEC_NAMES, ENCODEC_24KHZ, GENERATION, renamed
from barkstream.export.tensors import checked, expected_shapes, fold_weight_norm
from barkstream.export.verify import decode_chunks, main, random_chunks
from barkstream.gpt import build
from barkstream.tokens import _codec_layout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def repository(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    assert export([str(tiny), "--to", str(path)]) == 0
    return path


def test_the_artifacts_of_a_random_checkpoint_agree_with_their_twins(tiny: Path, repository: Path, capsys):
    assert main([str(tiny), "--repository", str(repository)]) == 0
    out = capsys.readouterr().out
    assert "every artifact agrees with its twin" in out
    assert out.count(" ok\n") == 11


def test_the_artifacts_of_a_checkpoint_with_barks_own_ids_agree(tmp_path: Path):
    checkpoint = random_checkpoint(tmp_path / "bark", bark_ids=True, width=32, n_heads=2, n_layers=1)
    assert export([str(checkpoint), "--to", str(tmp_path / "repository")]) == 0
    assert main([str(checkpoint), "--repository", str(tmp_path / "repository")]) == 0


def test_int8_artifacts_stay_within_their_bound(tiny: Path, tmp_path: Path, capsys):
    assert export([str(tiny), "--to", str(tmp_path), "--int8"]) == 0
    assert main([str(tiny), "--repository", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("1.0e-01  ok") == 7  # the codec's bound stays float32's


@pytest.mark.parametrize(
    ("stage", "tensor"),
    [
        ("semantic", "layers.1.attn.out_proj.weight.T"),
        ("coarse", "layers.0.mlp.in_proj.weight.T"),
        ("fine", "lm_heads.3.weight.T"),
        ("codec", "decoder.layers.1.lstm.R1"),
    ],
)
def test_one_changed_weight_fails_the_gate(
    stage: str, tensor: str, tiny: Path, repository: Path, tmp_path: Path, capsys
):
    shutil.copytree(repository, tmp_path / "changed")
    path = tmp_path / f"changed/bark_{stage}/1/model.onnx"
    model = ir.load(path)
    value = model.graph.initializers[tensor]
    changed = value.const_value.numpy().copy()
    changed[..., 0, 0] += 10  # +1 in a head hid once behind draws that fell on other tokens
    value.const_value = ir.tensor(changed, name=tensor)
    ir.save(model, path)
    assert main([str(tiny), "--repository", str(tmp_path / "changed")]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert failed
    assert all(line.startswith(stage) for line in failed)


def test_artifacts_of_another_checkpoint_or_none_are_refused(repository: Path, tmp_path: Path, capsys):
    other = random_checkpoint(tmp_path / "other", seed=1)
    assert main([str(other), "--repository", str(repository)]) == 1
    assert "was exported from other weights (tiny) than other's" in capsys.readouterr().err
    assert main([str(other), "--repository", str(tmp_path)]) == 1
    assert "run `barkstream export` first" in capsys.readouterr().err


def test_the_codec_twin_is_encodecs_own_decoder(monkeypatch: pytest.MonkeyPatch):
    """At EnCodec's true size, with its package's random weights under its package's names."""
    import torch

    if find_spec("torchaudio") is None:  # imported at the top of a module, used for files only
        monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    encodec = pytest.importorskip("encodec").EncodecModel.encodec_model_24khz(pretrained=False).eval()
    for layer in encodec.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    checkpoint = SimpleNamespace(codec=_codec_layout(ENCODEC_24KHZ, GENERATION))
    tensors = {name: x.float().numpy() for name, x in encodec.state_dict().items()}
    weights = fold_weight_norm(renamed(tensors, CODEC_NAMES))
    twin = build("codec", checkpoint, checked("codec", weights, expected_shapes(checkpoint, "codec")))
    codes = torch.randint(0, 1024, (2, 8, 30))
    with torch.no_grad():
        expected = encodec.decoder(encodec.quantizer.decode(codes.transpose(0, 1)))[:, 0]
    torch.testing.assert_close(twin(codes), expected, atol=1e-5, rtol=0)


def test_chunks_decode_to_the_samples_of_the_whole(tiny: Path, repository: Path):
    codec = ort.InferenceSession(repository / "bark_codec/1/model.onnx", providers=["CPUExecutionProvider"])
    layout = open_huggingface(tiny).checkpoint.codec
    rng = np.random.default_rng()
    codes = rng.integers(0, layout.codebook_size, (3, layout.n_codebooks, 90)).astype(np.int32)
    whole = decode_chunks(codec, codes, [90])
    assert whole.shape == (3, 90 * layout.samples_per_frame)
    for _ in range(5):
        chunks = random_chunks(rng, 90, layout.min_first_chunk)
        np.testing.assert_allclose(decode_chunks(codec, codes, chunks), whole, atol=1e-4, err_msg=str(chunks))


def test_streams_at_different_places_share_a_codec_batch(tiny: Path, repository: Path):
    """One row starts while the other goes on: the state says which, row by row."""
    codec = ort.InferenceSession(repository / "bark_codec/1/model.onnx", providers=["CPUExecutionProvider"])
    layout = open_huggingface(tiny).checkpoint.codec
    codes = np.random.default_rng(0).integers(0, layout.codebook_size, (2, layout.n_codebooks, 30)).astype(np.int32)
    alone = [decode_chunks(codec, codes[[b]], [30])[0] for b in range(2)]
    zero = np.zeros((1, state_size(layout)), np.float32)
    first, state = codec.run(None, {"codes": codes[:1, :, :10], "state": zero})
    joined = np.stack([codes[0, :, 10:20], codes[1, :, :10]])
    audio, _ = codec.run(None, {"codes": joined, "state": np.concatenate([state, zero])})
    n = 10 * layout.samples_per_frame
    np.testing.assert_allclose(np.concatenate([first[0], audio[0]]), alone[0][: 2 * n], atol=1e-4)
    np.testing.assert_allclose(audio[1], alone[1][:n], atol=1e-4)
