"""The cuda engine against the plain fp32 twin, on fresh random weights and inputs, with a poisoned KV cache."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from barkstream.engines import Chain, Head, Row, by_windows  # noqa: E402
from barkstream.engines.cuda import CudaEngine, GpuSlot  # noqa: E402
from barkstream.sampling import COARSE, SEMANTIC, Sampling, draw, ends, gumbel_noise  # noqa: E402
from barkstream.tokens import GPTSize  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SEMANTIC_HEAD = Head(SEMANTIC, first_id=0, n_codebooks=1, size=769, end=768)
COARSE_HEAD = Head(COARSE, first_id=768, n_codebooks=2, size=1024, end=None)
NANO_SEMANTIC = GPTSize(n_layers=8, n_heads=5, width=320, block_size=1024, n_input_ids=896, n_output_ids=832)
NANO_COARSE = GPTSize(n_layers=8, n_heads=4, width=256, block_size=1024, n_input_ids=2880, n_output_ids=2816)
SMALL_COARSE = GPTSize(n_layers=12, n_heads=12, width=768, block_size=1024, n_input_ids=2880, n_output_ids=2816)
LARGE_SEMANTIC = GPTSize(n_layers=24, n_heads=16, width=1024, block_size=1024, n_input_ids=12_000, n_output_ids=10_048)
LARGE_HEAD = Head(SEMANTIC, first_id=0, n_codebooks=1, size=10_001, end=10_000)
MODELS = {
    "nano-semantic": (NANO_SEMANTIC, SEMANTIC_HEAD),
    "nano-coarse": (NANO_COARSE, COARSE_HEAD),
    "small-coarse": (SMALL_COARSE, COARSE_HEAD),
    "large-semantic": (LARGE_SEMANTIC, LARGE_HEAD),
}


@pytest.fixture(autouse=True)
def exact_float32():
    torch.backends.cuda.matmul.allow_tf32 = False


# 8 bits: of keys and values, or of weights, too.
WAYS = ("fused", "wide", "batched", "fused-kv8", "wide-kv8", "fused-8", "wide-8")
# Of logits' relative error, by bits: with 8 most of it is what rounding weights, keys and values costs.
BOUNDS = {(16, 16): 0.03, (16, 8): 0.04, (8, 8): 0.05}


@pytest.fixture(scope="module", params=[(name, way) for name in MODELS for way in WAYS], ids="-".join)
def model(request):
    name, way = request.param
    return Model(*MODELS[name], way)


class Model:
    """An engine over random weights, and the twin that holds the same ones in float32."""

    def __init__(self, size, head, way):
        self.size, self.head = size, head
        self.way, _, less = way.partition("-")
        self.bits = {"": (16, 16), "kv8": (16, 8), "8": (8, 8)}[less]
        way = self.way
        self.weights = random_weights(size, head.n_codebooks * head.size)
        n_rows = 64 if way == "wide" else 8 if way == "fused" else 16
        self.engine = CudaEngine(
            self.weights,
            size,
            head,
            n_slots=16,
            max_batch=n_rows,
            fused=way != "batched",
            one_copy=way == "wide",
            bits=self.bits[0],
            kv_bits=self.bits[1],
        )
        decoder = {"fused": self.engine._fused, "wide": self.engine._wide, "batched": self.engine._batched}[way]
        if decoder is None:
            pytest.skip("this GPU does not fit the kernel")
        self.engine._decoder = lambda n_rows: decoder
        self.poison()

    def poison(self):
        """Whatever the engine reads without having written it shows."""
        cache = self.engine.cache
        (cache.values if cache.scales is None else cache.scales).fill_(float("nan"))

    def prefix(self, n):
        return np.random.randint(0, self.size.n_input_ids, (n, 1)).astype(np.int32)

    def last_logits(self, rows):
        """Logits [rows, V] of the last of equally many steps, beside what generate would return."""
        logits = torch.full((len(rows), self.head.size), float("nan"), device="cuda")
        with self.engine._slots.lease(rows) as slots:
            self.engine.prefill(
                [row.ids[:-1] for row in rows if len(row.ids) > 1],
                [s.index for s, row in zip(slots, rows, strict=True) if len(row.ids) > 1],
            )
            tokens, result = self.engine.decode(
                [self.engine._arguments(*each) for each in zip(rows, slots, strict=True)], logits
            )
            torch.cuda.synchronize()
        return logits.cpu().numpy(), tokens.cpu().numpy(), result.cpu().numpy()

    def twin_logits(self, ids, position):
        """Eligible logits [V] after ids [S], by the fp32 twin."""
        from barkstream.gpt import CausalGPT

        if not hasattr(self, "twin"):
            size = GPTSize(**{**self.size.__dict__, "n_output_ids": self.head.n_codebooks * self.head.size})
            self.twin = CausalGPT(size).cuda().eval().requires_grad_(False)
            self.twin.load_state_dict(self.weights)
        with torch.device("cuda"), torch.no_grad():
            logits = self.twin(torch.as_tensor(ids).long()[None])[0][0, -1]
        return self.head.eligible(logits.cpu().numpy(), position)[0]


def random_weights(size, n_logits):
    """Weights that keep activations near 1 and spread the logits over several units."""
    w, draw_normal = size.width, lambda *shape, std: torch.randn(*shape, device="cuda") * std
    weights = {
        "input_embeds_layer.weight": draw_normal(size.n_input_ids, w, std=0.7),
        "position_embeds_layer.weight": draw_normal(size.block_size, w, std=0.3),
    }
    for i in range(size.n_layers):
        shapes = {
            "attn.att_proj": (3 * w, w),
            "attn.out_proj": (w, w),
            "mlp.in_proj": (4 * w, w),
            "mlp.out_proj": (w, 4 * w),
        }
        weights |= {
            f"layers.{i}.{name}.weight": draw_normal(*shape, std=1.2 * shape[1] ** -0.5)
            for name, shape in shapes.items()
        }
        weights |= {f"layers.{i}.layernorm_{j}.weight": 1 + draw_normal(w, std=0.2) for j in (1, 2)}
    return {
        **weights,
        "layernorm_final.weight": 1 + draw_normal(w, std=0.2),
        "lm_head.weight": draw_normal(n_logits, w, std=2.5 * w**-0.5),
    }


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 8, 11, 20, 27, 45])
def test_logits_equal_the_twins(model, n_rows):
    if n_rows > model.engine.max_batch:
        pytest.skip("more rows than this kernel takes")
    model.poison()
    lengths = np.random.randint(2, 1000, n_rows).tolist()
    rows = [Row(model.prefix(n), 5, i, Sampling(seed=i, temperature=0.7)) for i, n in enumerate(lengths)]
    logits, tokens, result = model.last_logits(rows)
    for i, row in enumerate(rows):
        if result[i, 1]:  # ended: the steps after it feed the same position again
            continue
        books = (row.position + np.arange(5)) % model.head.n_codebooks
        drawn = model.head.first_id + books * model.head.size + tokens[i, :5]
        twin = model.twin_logits(np.concatenate([row.ids[:, 0], drawn[:4]]), row.position + 4)
        assert relative_error(logits[i], twin) < BOUNDS[model.bits], (i, lengths[i])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=1, temperature=0.7),
        Sampling(seed=2**63 + 5, temperature=1.3),
        Sampling(seed=3, temperature=0),
        Sampling(seed=4, temperature=0.9, top_k=7),
        Sampling(seed=5, temperature=0.9, top_p=0.6),
        Sampling(seed=6, temperature=1.0, top_k=40, top_p=0.95),
        Sampling(seed=7, temperature=0, top_k=3),
        Sampling(seed=8, temperature=0.7, min_eos_p=1e-9),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_sampling_py_says(model, sampling):
    for position in range(4):
        rows = [Row(model.prefix(40 + 10 * i), 1, position + i, sampling) for i in range(3)]
        logits, tokens, result = model.last_logits(rows)
        for i, row in enumerate(rows):
            noise = gumbel_noise(sampling.seed, model.head.stage, row.position, model.head.size)
            token, tempered = draw(logits[i], noise, sampling)
            ended = model.head.end is not None and ends(token, tempered, model.head.end, sampling)
            assert list(result[i]) == [not ended, ended]
            assert ended or tokens[i, 0] == token


def decode_alone(model, rows, slots):
    """Tokens [rows, n_tokens] and results of decode steps over filled slots, without a prefill."""
    arguments = [model.engine._arguments(row, GpuSlot(row.ids, slot)) for row, slot in zip(rows, slots, strict=True)]
    tokens, result = (values.cpu().numpy()[: len(rows)] for values in model.engine.decode(arguments))
    return [tokens[i, :n] for i, n in enumerate(result[:, 0])]


def test_a_row_does_not_depend_on_who_shares_its_batch(model):
    rows = [Row(model.prefix(n), 12, n, Sampling(seed=n, temperature=0.8)) for n in (3, 900, 64, 65, 300, 17, 511, 128)]
    for slot, row in enumerate(rows):
        model.engine.prefill([row.ids[:-1]], [slot])
    together = decode_alone(model, rows, range(8))
    order = np.random.permutation(8)
    for place, tokens in zip(order, decode_alone(model, [rows[i] for i in order], order), strict=True):
        assert np.array_equal(tokens, together[place])
    same = [np.array_equal(decode_alone(model, [row], [slot])[0], together[slot]) for slot, row in enumerate(rows)]
    assert (
        np.mean(same) >= 0.5
    )  # another number of rows sums attention in another order: a near-tie may fall the other way


def test_a_row_does_not_depend_on_the_size_of_its_batch(model):
    if model.way != "wide":
        pytest.skip("another number of rows sums attention in another order")
    model.poison()
    lengths, n_tokens = np.random.randint(1, 900, 45).tolist(), np.random.randint(0, 16, 45).tolist()
    rows = [
        Row(model.prefix(n), k, n, Sampling(seed=n, temperature=0.8)) for n, k in zip(lengths, n_tokens, strict=True)
    ]
    for slot, row in enumerate(rows):
        if len(row.ids) > 1:
            model.engine.prefill([row.ids[:-1]], [slot])
    together = decode_alone(model, rows, range(45))
    for n_rows in (1, 9, 20):
        chosen = np.random.permutation(45)[:n_rows]
        for row, tokens in zip(chosen, decode_alone(model, [rows[i] for i in chosen], chosen), strict=True):
            assert np.array_equal(tokens, together[row])
            assert len(tokens) == n_tokens[row] or model.head.end is not None


def test_windows_may_be_cut_anywhere(model):
    model.poison()
    prefix, sampling = model.prefix(257), Sampling(seed=11, temperature=0.7)
    whole = model.engine.generate([Row(prefix, 30, 0, sampling)])[0].tokens
    for stream in (5, 0):  # with its KV cache kept, and with a prefill each call
        if stream == 0 and model.way == "batched":
            continue  # cuBLAS's prefill and decode round differently
        ids, cut = prefix, []
        for n in (1, 12, 17):
            new = model.engine.generate([Row(ids, n, len(cut), sampling, stream)])[0].tokens
            cut, ids = [*cut, *new], np.concatenate([ids, new[:, None]])
            if len(new) < n:
                break
        if (
            stream and model.way != "wide"
        ):  # whose packets' marks, the lowest bit of a number, alternate from step to step
            assert np.array_equal(cut, whole)
        else:
            assert (
                np.mean(np.array(cut) == whole[: len(cut)]) > 0.3
            )  # prefilled keys round differently: a near-tie may fall the other way
    model.engine.release(5)
    assert model.engine.n_owned_slots == 0


@pytest.mark.parametrize("n_behind", [630, 100], ids=["history slides", "history grows"])
@pytest.mark.parametrize("lengths", [(60, 60, 60), (60, 180, 120)])
def test_a_chain_says_what_its_windows_say(model, n_behind, lengths):
    if model.head.end is not None or model.way != "fused":
        pytest.skip("only coarse has windows, and an only row is the fused kernel's")
    model.poison()
    head_ids = np.random.randint(0, 768, (5, 257)).astype(np.int32)
    if n_behind < 630:
        head_ids[:] = head_ids[0]  # then nothing slides, and the cache goes on
    books = model.head.first_id + model.head.size * (np.arange(n_behind) % 2) + np.random.randint(0, 1024, n_behind)
    prefix = np.concatenate([head_ids[0], books]).astype(np.int32)[:, None]
    windows = np.array([[n, 690 - max(n, 60)] for n in (*lengths, 22)], np.int32)
    chain = Chain(head_ids[1:], windows)
    row = Row(prefix, 60 + chain.n_tokens, 0, Sampling(seed=9, temperature=0.7), 3, chain)
    row.check(model.size)
    apart = by_windows(model.engine.generate, [replace(row, stream=4)])[0].tokens  # in another slot
    for n_piece in (60, 25):
        whole = model.engine.start_alone(row, n_piece, lambda: True)()[0].tokens
        assert np.array_equal(whole, apart) and len(whole) == row.n_tokens
        model.engine.release(3)
    begun = model.engine.start_alone(row, 60, lambda: False)()[0].tokens
    assert np.array_equal(begun, apart[:60])
    rest = model.engine.start_alone(row.after(begun), 60, lambda: True)()[0].tokens
    assert np.array_equal(rest, apart[60:])
    model.engine.release(3, 4)
    assert model.engine.n_owned_slots == 0


def test_pieces_behind_one_another_say_what_one_says(model):
    """Some go on to the end, some end at once, and some in between."""
    if model.head.end is None or model.way != "fused":
        pytest.skip("the fused kernel's, and coarse never ends by itself")
    model.poison()
    ended = 0
    for seed in range(24):
        # 4e-3 to 2e-14 (of some random weights the end is never likelier than 2e-8); the first ones end only where it is likeliest of
        # all, which is rare
        sampling = Sampling(
            seed=seed, temperature=0.7 if seed > 3 else 0, min_eos_p=10 ** (-0.6 * seed) if seed > 3 else 2
        )
        row = Row(model.prefix(257), 90, 0, sampling, 3)
        whole = model.engine.generate([replace(row, stream=4)])[0]
        pieces = model.engine.start_alone(row, 20, lambda: True)()[0]
        assert np.array_equal(pieces.tokens, whole.tokens) and pieces.ended == whole.ended
        held = model.engine._slots._owned[3].ids
        assert np.array_equal(held[257:, 0], whole.tokens[: len(held) - 257])
        ended += whole.ended
        model.engine.release(3, 4)
    assert model.engine.n_owned_slots == 0 and 0 < ended < 24


@pytest.mark.parametrize("n_rows", [1, 3, 8])
def test_what_is_halted_is_the_beginning_of_what_would_have_been_said(model, n_rows):
    if model.engine.halt is None:
        pytest.skip("CUDA graphs know no end")
    model.poison()
    # Speech must not end before it is halted: of 8, all had.
    tried = [
        Row(model.prefix(40 + i % 8), 900, 0, Sampling(seed=i, temperature=0.7)) for i in range(max(40, 8 * n_rows))
    ]
    n_said = [len(each.tokens) for each in model.engine.generate(tried)]
    longest = sorted(range(len(tried)), key=lambda i: -n_said[i])[:n_rows]
    rows = [replace(tried[i], stream=1 + j) for j, i in enumerate(longest)]
    whole = model.engine.generate([replace(row, stream=0) for row in rows])
    finish = model.engine.start(rows)
    time.sleep(0.01)
    model.engine.halt()
    halted = finish()
    lengths = {len(each.tokens) for each in halted if not each.ended}
    assert len(lengths) == 1 and 0 < lengths.pop() < 900  # all at the same step
    for each, expected in zip(halted, whole, strict=True):
        assert np.array_equal(each.tokens, expected.tokens[: len(each.tokens)])
        assert not each.ended or len(each.tokens) == len(expected.tokens)
    for row, each in zip(rows, halted, strict=True):  # and the cache holds what was said
        assert model.engine._slots._owned[row.stream].n_known(row.after(each.tokens).ids) >= 39 + len(each.tokens)
    if n_rows == 1 and model.way == "fused":
        n = len(halted[0].tokens)
        rest = model.engine.generate([replace(rows[0].after(halted[0].tokens), n_tokens=20)])[0].tokens
        assert np.array_equal(rest, whole[0].tokens[n : n + 20])
    model.engine.release(*range(1, 1 + n_rows))


def test_a_halt_is_for_what_was_launched_before(model):
    if model.engine.halt is None:
        pytest.skip("CUDA graphs know no end")
    row = Row(model.prefix(40), 30, 0, Sampling(seed=1, temperature=0.7))
    whole = model.engine.generate([row])[0]
    model.engine.halt()
    assert np.array_equal(model.engine.generate([row])[0].tokens, whole.tokens)


@pytest.mark.parametrize("n_behind", [630, 100], ids=["history slides", "history grows"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_chain_that_is_halted_goes_on_where_it_was(model, n_behind, goes_on):
    """Whatever was launched behind the piece that was halted."""
    if model.head.end is not None or model.way != "fused":
        pytest.skip("only coarse has windows, and an only row is the fused kernel's")
    model.poison()
    head_ids = np.random.randint(0, 768, (5, 257)).astype(np.int32)
    if n_behind < 630:
        head_ids[:] = head_ids[0]
    books = model.head.first_id + model.head.size * (np.arange(n_behind) % 2) + np.random.randint(0, 1024, n_behind)
    prefix = np.concatenate([head_ids[0], books]).astype(np.int32)[:, None]
    chain = Chain(head_ids[1:], np.array([[60, 630]] * 4, np.int32))
    row = Row(prefix, 5 * 60, 0, Sampling(seed=9, temperature=0.7), 3, chain)
    whole = by_windows(model.engine.generate, [replace(row, stream=4)])[0].tokens
    left, said = row, np.zeros(0, np.int32)
    while left.n_tokens:
        finish = model.engine.start_alone(left, 60, lambda: goes_on)
        timer = threading.Timer(np.random.uniform(0, 0.015), model.engine.halt)
        timer.start()
        new = finish()[0].tokens
        timer.join()
        assert len(new) and (len(said) or np.array_equal(new, whole[: len(new)]))
        said, left = np.concatenate([said, new]), left.after(new)
    # Where the next window's prefix was launched behind what was halted, the window is prefilled anew: keys round differently, and a
    # near-tie may fall the other way.
    is_prefilled_anew = goes_on and n_behind == 630
    assert len(said) == len(whole) and (is_prefilled_anew or np.array_equal(said, whole))
    model.engine.release(3, 4)
    assert model.engine.n_owned_slots == 0


def test_full_block(model):
    model.poison()
    row = Row(model.prefix(1000), 25, 0, Sampling(temperature=1.0, seed=3))
    generation = model.engine.generate([row])[0]
    assert len(generation.tokens) == 25 or generation.ended
    with pytest.raises(ValueError, match="1 to 1024 positions"):
        model.engine.generate([Row(model.prefix(1000), 26, 0, Sampling())])


def test_rows_of_different_lengths_end_on_their_own(model):
    rows = [Row(model.prefix(30 + i), n, 0, Sampling(seed=i, temperature=0.7)) for i, n in enumerate((1, 20, 7, 0, 3))]
    for row, generation in zip(rows, model.engine.generate(rows), strict=True):
        assert len(generation.tokens) == row.n_tokens or generation.ended
        alone = model.engine.generate([row])[0]
        assert len(alone.tokens) == len(generation.tokens) and alone.ended == generation.ended


def test_end_of_speech_stops_all_steps(model):
    if model.head.end is None:
        pytest.skip("coarse never ends by itself")
    # Of random weights an end can be less likely than 1e-12.
    rows = [Row(model.prefix(50), 700, 0, Sampling(seed=i, temperature=0.7, min_eos_p=1e-30)) for i in range(2)]
    for generation in model.engine.generate(rows):
        assert generation.ended and len(generation.tokens) == 0
