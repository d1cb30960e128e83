"""Claims about how the cuda engine keeps a GPT's weights."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from barkstream.engines import Head  # noqa: E402
from barkstream.engines.kernels.fused import PackedLayers, pack_units  # noqa: E402
from barkstream.engines.kernels.weights import GPTWeights, LayerWeights  # noqa: E402
from barkstream.sampling import COARSE  # noqa: E402
from barkstream.tokens import GPTSize  # noqa: E402


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
