"""Claims about how the cuda engine keeps a GPT's weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from barkstream.engines import Head, kernels  # noqa: E402
from barkstream.engines.kernels.fused import Bits, PackedLayers, pack_units  # noqa: E402
from barkstream.engines.kernels.weights import GPTWeights, LayerWeights  # noqa: E402
from barkstream.engines.open import EngineError, open_causal  # noqa: E402
from barkstream.export.checkpoint import open_huggingface  # noqa: E402
from barkstream.sampling import COARSE  # noqa: E402
from barkstream.tokens import GPTSize  # noqa: E402

NANO_BARK = Path(__file__).resolve().parents[1] / "checkpoints" / "nano-bark"


@pytest.mark.parametrize("n_heads", [4, 5])
def test_packed_layers_are_the_layers(n_heads):
    width, n_layers = 64 * n_heads, 2
    size = GPTSize(n_layers, n_heads, width, block_size=1024, n_input_ids=10, n_output_ids=200)
    head = Head(COARSE, first_id=0, n_codebooks=2, size=100, end=None)

    def matrix(n_out, n_in):
        return torch.randn(n_out, n_in).to(torch.bfloat16)

    layers = [
        LayerWeights(matrix(3 * width, width), matrix(width, width), matrix(4 * width, width), matrix(width, 4 * width))
        for _ in range(n_layers)
    ]
    weights = GPTWeights(matrix(11, width), torch.zeros(1024, width), layers, matrix(200, width))
    packed = PackedLayers(pack_units(weights, size, head).words, size)
    assert len(packed) == n_layers
    for found, expected in zip(packed, layers, strict=True):
        for name in ("qkv", "out", "up", "down"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
            assert getattr(found, name).is_contiguous()


def test_8_bits_are_the_weights_to_half_a_step():
    width, size = 256, GPTSize(1, 4, 256, block_size=1024, n_input_ids=10, n_output_ids=200)
    head = Head(COARSE, first_id=0, n_codebooks=2, size=100, end=None)
    shapes = dict(qkv=(3 * width, width), out=(width, width), up=(4 * width, width), down=(width, 4 * width))
    layer = LayerWeights(**{name: (torch.randn(shape) * 0.1).to(torch.bfloat16) for name, shape in shapes.items()})
    layer.down[5] = 0  # a row of zeros has a scale, too
    tables = torch.zeros(11, width, dtype=torch.bfloat16), torch.zeros(1024, width)
    weights = GPTWeights(*tables, [layer], torch.randn(200, width).to(torch.bfloat16))
    exact, packed = (pack_units(weights, size, head, bits) for bits in (16, 8))
    assert packed.words.dtype == torch.uint8 and packed.words.min() >= 1
    # A unit's lanes 4 g ... hold row g.
    scales = packed.scales[:, :, None, :, None].expand(-1, -1, width // 32, -1, 4).reshape(*exact.words.shape[:-1], 1)
    error = (packed.words.float() - 128) * scales - exact.words.float()
    assert (error.abs() <= 0.501 * scales).all() and (error != 0).any()
    down = packed.scales[:, 8:12]  # the four pieces of k of one product's rows
    assert torch.equal(down, down[:, :1].expand_as(down))
    assert packed.scale_bytes == packed.scales[0].numel() * 4 and exact.scale_bytes == 0


@pytest.mark.parametrize("name", ["bits", "kv_bits"])
def test_bits_that_a_cpu_does_not_know_are_no_secret(name, tmp_path):
    checkpoint = open_huggingface(NANO_BARK).checkpoint
    with pytest.raises(EngineError, match=f"^{name} 8 is the cuda engine's"):
        open_causal("onnxruntime", "coarse", tmp_path, checkpoint, n_slots=1, max_batch=1, **{name: 8})


def test_bits_that_no_kernel_is_for_say_what_would_be_right():
    assert Bits(16, 8).kv == 8
    for bits, message in ((Bits, "weights have 16 or 8 bits, not 4"), (partial(Bits, 16), "keys and values have")):
        with pytest.raises(ValueError, match=message):
            bits(4)
    with pytest.raises(ValueError, match="weights of 8 bits need keys and values of 8 bits"):
        Bits(8, 16)


class FakeNvrtc:
    def nvrtcVersion(self, major, minor):
        return 0


def test_a_kernel_is_compiled_once_for_each_set_of_options(tmp_path, monkeypatch):
    compiled = []

    def compile_options(file, headers, options):
        compiled.append(options)
        return b"machine code " + str(len(compiled)).encode()

    monkeypatch.setattr(kernels, "CACHE", tmp_path / "kept")
    monkeypatch.setattr(kernels, "_nvrtc", FakeNvrtc)
    monkeypatch.setattr(kernels, "_compile", compile_options)
    first = kernels.compile_source("fine.cu", "sm_90a", WIDTH=1024)
    assert kernels.compile_source("fine.cu", "sm_90a", WIDTH=1024) == first and len(compiled) == 1
    assert kernels.compile_source("fine.cu", "sm_90a", WIDTH=768) != first
    assert kernels.compile_source("fine.cu", "sm_90", WIDTH=1024) != first
    assert len(compiled) == 3 and {path.suffix for path in (tmp_path / "kept").iterdir()} == {".cubin"}


def test_a_folder_that_nobody_may_write_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("not a folder")
    monkeypatch.setattr(kernels, "CACHE", tmp_path / "kept")
    monkeypatch.setattr(kernels, "_nvrtc", FakeNvrtc)
    monkeypatch.setattr(kernels, "_compile", lambda file, headers, options: b"machine code")
    assert kernels.compile_source("fine.cu", "sm_90a", WIDTH=1024) == b"machine code"
