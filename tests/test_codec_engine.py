"""The cuda engine's codec decoder in plain PyTorch, on the CPU, against the exported graph."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from barkstream.engines.cuda_codec import Decoder  # noqa: E402
from barkstream.engines.kernels.weights import read_initializers  # noqa: E402
from barkstream.local import LocalStages  # noqa: E402


@pytest.fixture(scope="module")
def decoder(repository, pipeline):
    return Decoder(read_initializers(repository / "bark_codec/1/model.onnx"), pipeline.checkpoint.codec, device="cpu")


def decode(decoder, codes, state):
    with torch.inference_mode():
        audio, next_state = decoder(torch.from_numpy(codes[None]), torch.from_numpy(state[None]))
    return audio[0].numpy(), next_state[0].numpy()


@pytest.mark.parametrize("cuts", [[40], [7, 8, 39], [24, 54, 55, 120]])
def test_chunks_and_states_equal_the_exported_graphs(decoder, pipeline, cuts):
    stages: LocalStages = pipeline.stages
    codes = np.random.randint(0, 1024, (8, cuts[-1])).astype(np.int32)
    ours = theirs = stages.codec_state()
    for a, b in zip([0, *cuts[:-1]], cuts, strict=True):
        audio, ours = decode(decoder, codes[:, a:b], ours)
        expected, theirs = stages.codec(codes[:, a:b], theirs)
        np.testing.assert_allclose(audio, expected, atol=1e-5)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
