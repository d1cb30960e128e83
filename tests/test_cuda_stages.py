"""Fine and codec on the cuda engine against their plain twins, on fresh random weights and inputs."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from barkstream import gpt  # noqa: E402
from barkstream.engines import Chunk, Window  # noqa: E402
from barkstream.engines.cuda_codec import CodecEngine, Decoder  # noqa: E402
from barkstream.engines.cuda_fine import FineEngine  # noqa: E402
from barkstream.engines.kernels.graphs import capture  # noqa: E402
from barkstream.engines.kernels.lstm import Lstm  # noqa: E402
from barkstream.engines.transfers import Inputs, clear, download, download_all, upload  # noqa: E402
from barkstream.export.codec_state import state_size  # noqa: E402
from barkstream.tokens import CodecLayout, FineLayout, GPTSize  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def fine_layout(n_layers, n_heads, width):
    size = GPTSize(n_layers, n_heads, width, block_size=1024, n_input_ids=1056, n_output_ids=1056)
    return FineLayout(size, n_codebooks=8, n_given=2, codebook_size=1024, window=1024, max_history=512, unknown=1024)


FINE = {"nano": fine_layout(6, 4, 256), "small": fine_layout(12, 12, 768)}
CODEC = CodecLayout(
    sample_rate=24_000,
    upsampling_ratios=(8, 5, 4, 2),
    n_codebooks=8,
    codebook_size=1024,
    codebook_width=128,
    n_filters=32,
    n_lstm_layers=2,
    n_residual_layers=1,
    kernel_size=7,
    last_kernel_size=7,
    residual_kernel_size=3,
    dilation_growth=2,
    compress=2,
    use_conv_shortcut=True,
)


@pytest.fixture(autouse=True)
def exact_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module", params=list(FINE))
def fine(request):
    """The engine and its twin, with the same weights: norms and their biases far from one and zero."""
    layout = FINE[request.param]
    twin = gpt.FineGPT(layout, n_heads=7, bias=False).cuda().eval().requires_grad_(False)
    for name, x in twin.named_parameters():
        x.data.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3 if "norm" in name else 0.05)
    return FineEngine(dict(twin.state_dict()), layout, max_batch=4), twin


def window(n_frames, fill_from, temperature, n_codebooks=8):
    codes = np.random.randint(0, 1024, (n_codebooks, n_frames)).astype(np.int32)
    codes[2:, fill_from:] = 1024
    uniforms = np.random.uniform(0, 1, (n_codebooks - 2, n_frames)).astype(np.float32)
    return Window(codes, fill_from, uniforms, temperature)


def draws_follow_the_twin(twin, given, filled, temperature, bound):
    """Each code filled is what the twin, shown the same codes before it, would draw, but for a near-tie."""
    codes = torch.from_numpy(filled[None]).cuda()
    misses = []
    for k in range(2, 8):
        seen = codes.clone()  # in codebook k itself a pass sees what stood there before
        seen[:, k] = torch.from_numpy(given.codes[k]).cuda()
        logits = twin(seen, k)[0, given.fill_from :, :1024].double()
        token = codes[0, k, given.fill_from :].long()[:, None]
        if temperature:
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            mark = torch.from_numpy(given.uniforms[k - 2, given.fill_from :]).cuda()[:, None]
            below = cdf.gather(1, (token - 1).clamp(min=0)) * (token > 0)
            misses.append(torch.maximum(below - mark, mark - cdf.gather(1, token)).clamp(min=0))
        else:
            misses.append((logits.amax(1, keepdim=True) - logits.gather(1, token)) / logits.abs().max())
    assert torch.cat(misses).max().item() < bound


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize(("n_frames", "fill_from"), [(30, 0), (158, 128), (256, 17), (1024, 512)])
def test_a_window_is_filled_as_the_twin_fills_it(fine, n_frames, fill_from, temperature):
    engine, twin = fine
    given = window(n_frames, fill_from, temperature)
    filled = engine.fill([given])[0]
    assert filled.shape == given.codes.shape
    np.testing.assert_array_equal(filled[:, :fill_from], given.codes[:, :fill_from])
    np.testing.assert_array_equal(filled[:2], given.codes[:2])
    draws_follow_the_twin(twin, given, filled, temperature, bound=0.05)


def test_windows_of_different_lengths_share_a_batch(fine):
    engine, twin = fine
    given = [window(n, n // 2, 0.7) for n in (65, 100, 128, 700, 90, 66, 30)]
    for one, filled in zip(given, engine.fill(given), strict=True):
        assert filled.shape == one.codes.shape
        draws_follow_the_twin(twin, one, filled, 0.7, bound=0.05)


@pytest.mark.parametrize("n_windows", [3, 5, 7])
def test_whole_windows_share_a_batch_that_they_do_not_fill(fine, n_windows):
    """Without a mask, and with rows that hold no window."""
    engine, twin = fine
    given = [window(128, 40 + i, 0.7) for i in range(n_windows)]
    for one, filled in zip(given, engine.fill(given), strict=True):
        draws_follow_the_twin(twin, one, filled, 0.7, bound=0.05)


def test_the_same_window_gives_the_same_codes_after_others(fine):
    engine, _ = fine
    given = window(100, 60, 0.5)
    first = engine.fill([given])[0]
    engine.fill([window(128, 0, 1.0)])
    np.testing.assert_array_equal(engine.fill([given])[0], first)


def test_a_window_that_does_not_fit_is_refused(fine):
    engine, _ = fine
    with pytest.raises(ValueError, match="codes must be"):
        engine.fill([window(1025, 0, 0.5)])
    with pytest.raises(ValueError, match="codes must be 0 to 1055"):
        engine.fill([Window(np.full((8, 10), 1056, np.int32), 0, np.zeros((6, 10), np.float32), 0.5)])


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.bool_, np.uint8])
def test_what_goes_to_the_gpu_comes_back_whatever_its_size(dtype):
    """Small ones through memory that is used again and again, while much is under way."""
    arrays = [np.random.randint(0, 2, (n, 7)).astype(dtype) for n in (0, 1, 5_000, 9_000, 10_000, 50_000) * 20]
    tensors = [upload(array) for array in arrays]
    into = [
        upload(array, torch.empty(array.shape, dtype=tensor.dtype, device="cuda"))
        for array, tensor in zip(arrays, tensors, strict=True)
    ]
    waits = [download_all(*each) for each in zip(tensors, into, strict=True)]
    for array, (first, second) in zip(arrays, waits, strict=True):
        assert np.array_equal(first(), array) and np.array_equal(second(), array)


def test_what_is_laid_out_otherwise_or_of_another_type_arrives_too():
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    place = torch.zeros(4, 3, device="cuda").t()
    assert np.array_equal(upload(array, place).cpu().numpy(), array)
    assert np.array_equal(upload(array.T).cpu().numpy(), array.T)
    assert np.array_equal(download(upload(array)[:, 1:])(), array[:, 1:])
    tensor = upload(array)
    clear(tensor)
    assert not tensor.any()


def test_inputs_that_lie_together_are_sent_by_one_copy():
    inputs = Inputs(ids=((3, 5), torch.int32), draws=((7,), torch.float32), mask=((2, 1, 1, 9), torch.bool))
    random = np.random.default_rng()
    sent = dict(
        ids=random.integers(0, 99, (3, 5)), draws=random.random(7, np.float32), mask=random.random((2, 1, 1, 9)) < 0.5
    )

    def fill(arrays):
        for name, array in sent.items():
            arrays[name][...] = array

    assert not any(inputs[name].any() for name in sent)
    inputs.send(fill)
    for name, array in sent.items():
        assert np.array_equal(inputs[name].cpu().numpy(), array)


@pytest.fixture(scope="module")
def codec():
    """The engine, and the same decoder on the CPU, which the ordinary tests compare with the exported graph."""
    weights = random_codec_weights()
    return CodecEngine(weights, CODEC, max_batch=4), Decoder(weights, CODEC, device="cpu")


def random_codec_weights():
    a, random = CODEC, np.random.default_rng()
    weights = {f"quantizer.layers.{k}.codebook.embed": random.normal(0, 1, (1024, 128)) for k in range(8)}
    width, layer = a.n_filters * 16, 2

    def conv(name, *shape, n_out):
        fan_in = np.prod(shape) / n_out
        weights[f"decoder.{name}.conv.weight"] = random.normal(0, fan_in**-0.5, shape)
        weights[f"decoder.{name}.conv.bias"] = random.normal(0, 0.1, n_out)

    conv("layers.0", width, 128, 7, n_out=width)
    for i in range(2):
        for kind, shape in (("W", (1, 4 * width, width)), ("R", (1, 4 * width, width)), ("B", (1, 8 * width))):
            weights[f"decoder.layers.1.lstm.{kind}{i}"] = random.normal(0, width**-0.5, shape)
    for ratio in a.upsampling_ratios:
        conv(f"layers.{layer + 1}", width, width // 2, 2 * ratio, n_out=width // 2)
        width //= 2
        conv(f"layers.{layer + 2}.block.1", width // 2, width, 3, n_out=width // 2)
        conv(f"layers.{layer + 2}.block.3", width, width // 2, 1, n_out=width)
        conv(f"layers.{layer + 2}.shortcut", width, width, 1, n_out=width)
        layer += 3
    conv(f"layers.{layer + 1}", 1, width, 7, n_out=1)
    return {name: x.astype(np.float32) for name, x in weights.items()}


@pytest.mark.parametrize("warm", [False, True], ids=["eager", "graphs"])
def test_chunks_of_many_streams_equal_the_whole(codec, warm):
    engine, twin = codec
    if warm:
        engine.warm_up([24, 30])
    streams = [np.random.randint(0, 1024, (8, 84)).astype(np.int32) for _ in range(3)]
    states = [np.zeros(state_size(CODEC), np.float32) for _ in streams]
    heard = [[] for _ in streams]
    for a, b in ((0, 24), (24, 54), (54, 84)):
        decoded = engine.decode([Chunk(codes[:, a:b], state) for codes, state in zip(streams, states, strict=True)])
        for i, (audio, state) in enumerate(decoded):
            heard[i].append(audio)
            states[i] = state
    with torch.inference_mode():
        whole, _ = twin(torch.from_numpy(np.stack(streams)), torch.zeros(3, state_size(CODEC)))
    scale = whole.abs().max().item()
    for audio, expected in zip(heard, whole.numpy(), strict=True):
        np.testing.assert_allclose(np.concatenate(audio) / scale, expected / scale, atol=1e-4)


def test_a_long_chunk_is_decoded_in_pieces(codec):
    engine, twin = codec
    engine.warm_up([8, 24])
    codes = [np.random.randint(0, 1024, (8, n)).astype(np.int32) for n in (101, 26)]  # 24 x 4, 5; 24, 2
    state = np.zeros(state_size(CODEC), np.float32)
    for given, (audio, next_state) in zip(codes, engine.decode([Chunk(c, state) for c in codes]), strict=True):
        with torch.inference_mode():
            expected, expected_state = twin(torch.from_numpy(given[None]), torch.from_numpy(state[None]))
        scale = expected.abs().max().item()
        np.testing.assert_allclose(audio / scale, expected[0].numpy() / scale, atol=1e-4)
        np.testing.assert_allclose(next_state, expected_state[0].numpy(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("n", [3, 5, 7, 15])
def test_with_graphs_for_all_that_is_left_over_a_stream_may_begin_with_any_length(n):
    weights = random_codec_weights()
    engine, twin = CodecEngine(weights, CODEC, max_batch=1), Decoder(weights, CODEC, device="cpu")
    engine.warm_up([1, 2, 4, 8])
    codes = np.random.randint(0, 1024, (8, n)).astype(np.int32)
    audio, _ = engine.decode([Chunk(codes, np.zeros(state_size(CODEC), np.float32))])[0]
    with torch.inference_mode():
        expected = twin(torch.from_numpy(codes[None]), torch.zeros(1, state_size(CODEC)))[0][0].numpy()
    np.testing.assert_allclose(audio / np.abs(expected).max(), expected / np.abs(expected).max(), atol=1e-4)


def test_chunks_of_different_lengths_share_a_call(codec):
    engine, _ = codec
    state = np.zeros(state_size(CODEC), np.float32)
    chunks = [Chunk(np.random.randint(0, 1024, (8, n)).astype(np.int32), state) for n in (7, 24, 7, 30, 24, 7, 7, 7)]
    alone = [engine.decode([chunk])[0] for chunk in chunks]
    for (audio, next_state), (expected, expected_state) in zip(engine.decode(chunks), alone, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(audio / scale, expected / scale, atol=1e-4)
        np.testing.assert_allclose(next_state, expected_state, atol=1e-3, rtol=1e-3)


def test_a_chunk_that_does_not_fit_is_refused(codec):
    engine, _ = codec
    state = np.zeros(state_size(CODEC), np.float32)
    with pytest.raises(ValueError, match=r"codes must be \[8"):
        engine.decode([Chunk(np.zeros((7, 10), np.int32), state)])
    with pytest.raises(ValueError, match="state must be"):
        engine.decode([Chunk(np.zeros((8, 10), np.int32), state[1:])])


@pytest.fixture(scope="module")
def lstm():
    """The kernel, and its twin in float64 on the CPU."""
    if not Lstm.fits(512, 2):
        pytest.skip("this GPU cannot run all blocks of the LSTM at once")
    twin = torch.nn.LSTM(512, 512, 2).requires_grad_(False).double()
    for x in twin.parameters():
        x.normal_(0, 512**-0.5)
    return Lstm({name: x.float().cuda() for name, x in twin.state_dict().items()}), twin


def random_sequence(n_steps, n_rows):
    """x [T, B, 512], h and c [B, 2, 512], these as parts of a larger tensor, as the codec carries them."""
    carried = torch.randn(n_rows, 2 * 1024 + 5, device="cuda")
    h, c = (part.reshape(-1, 2, 512) for part in (carried[:, 1:1025].tanh_(), carried[:, 1027:2051]))
    return torch.randn(n_steps, n_rows, 512, device="cuda"), h, c


def agrees(twin, given, found):
    """y, h and c are the twin's."""
    x, h, c = (part.double().cpu() for part in given)
    y, last = twin(x, (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
    for ours, theirs in zip(found, (y, *(state.transpose(0, 1) for state in last)), strict=True):
        np.testing.assert_allclose(ours.cpu().numpy(), theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 24, 240])
def test_the_lstm_equals_its_twin(lstm, n_steps, n_rows):
    kernel, twin = lstm
    given = random_sequence(n_steps, n_rows)
    agrees(twin, given, kernel(*given))


def test_the_lstm_says_the_same_again_whatever_ran_between(lstm):
    kernel, twin = lstm
    given = [random_sequence(n_steps, n_rows) for n_steps, n_rows in ((24, 1), (25, 8), (26, 1), (7, 3), (24, 2))]
    first = [kernel(*each) for each in given]
    for each, found in zip(given, first, strict=True):
        agrees(twin, each, found)
    for _ in range(20):
        for each, found in zip(given, first, strict=True):
            assert all(map(torch.equal, kernel(*each), found))


def test_the_lstm_may_be_cut_anywhere(lstm):
    kernel, twin = lstm
    given = random_sequence(60, 2)
    ys, state = [], given[1:]
    for piece in given[0].split([1, 2, 30, 27]):
        y, *state = kernel(piece, *state)
        ys.append(y)
    agrees(twin, given, (torch.cat(ys), *state))


@pytest.mark.parametrize("n_rows", [1, 3, 8])
def test_the_lstm_in_a_graph_follows_its_inputs(lstm, n_rows):
    kernel, twin = lstm
    given, found = random_sequence(24, n_rows), []
    with torch.inference_mode():
        graph = capture(lambda: found.append(kernel(*given)))
        for _ in range(5):
            changed = random_sequence(24, n_rows)
            for place, values in zip(given, changed, strict=True):
                place.copy_(values)
            graph.replay()
            agrees(twin, changed, found[-1])
