"""Products by the quickest of cuBLASLt's algorithms, and attention over all tokens, against PyTorch in float32."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from barkstream.engines import Head  # noqa: E402
from barkstream.engines.kernels import fused, products  # noqa: E402
from barkstream.engines.kernels.attention import Attention  # noqa: E402
from barkstream.engines.kernels.batched import Layers  # noqa: E402
from barkstream.engines.kernels.graphs import capture  # noqa: E402
from barkstream.engines.kernels.weights import GPTWeights  # noqa: E402
from barkstream.sampling import COARSE  # noqa: E402
from barkstream.tokens import GPTSize  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Exact twins, and nothing kept from earlier."""
    torch.backends.cuda.matmul.allow_tf32 = False
    monkeypatch.setattr(products, "CACHE", tmp_path)
    forget()
    yield
    forget()


def normal(*shape, std=1.0):
    return (torch.randn(*shape, device="cuda") * std).bfloat16()


def is_near(got, wanted, bound=0.01):
    return float((got.float() - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("n_rows", [1, 5, 64, 256, 896])
@pytest.mark.parametrize(("n_out", "n_in"), [(3072, 1024), (1024, 4096), (960, 320)])
def test_products_are_pytorchs(n_rows, n_out, n_in):
    x, weight, bias = normal(n_rows, n_in), normal(n_out, n_in, std=n_in**-0.5), normal(n_out)
    plain = x.float() @ weight.float().t()
    assert is_near(products.product(x, weight), plain)
    assert is_near(products.product(x, weight, bias), plain + bias)
    assert is_near(products.gelu_of_product(x, weight), F.gelu(plain))
    assert is_near(products.gelu_of_product(x, weight, bias), F.gelu(plain + bias))
    sums = torch.randn(n_rows, n_out, device="cuda")
    wanted = sums + plain
    products.add_product(sums, x, weight)
    assert is_near(sums, wanted, 1e-5)


def test_a_product_in_a_graph_is_the_same():
    x, weight, sums = normal(256, 1024), normal(1024, 1024), torch.zeros(256, 1024, device="cuda")
    graph = capture(lambda: products.add_product(sums.zero_(), x, weight))
    x.copy_(normal(256, 1024))
    graph.replay()
    again = torch.zeros_like(sums)
    products.add_product(again, x, weight)
    assert torch.equal(sums, again) and is_near(sums, x.float() @ weight.float().t(), 1e-5)


def forget():
    """What a process knows, as a new one would."""
    for kept in (products._plan, products._Choices.of):
        kept.cache_clear()


def chosen(x, weights):
    """The algorithm that a graph has for products with these weights, and the first of them."""
    capture(lambda: [products.product(x, weight) for weight in weights])
    return products._plan(kind_of(x, weights[0]), 0)._chosen, products.product(x, weights[0])


def kind_of(x, weight):
    return products.Kind(len(x), len(weight), weight.shape[1], adds=False, has_bias=False, has_gelu=False)


def test_the_quickest_is_chosen_and_kept_for_the_next_start(tmp_path, monkeypatch):
    x, weights = normal(896, 1024), [normal(3072, 1024) for _ in range(12)]
    took_ms = iter([2.0, 1.98, 1.0, *[1.5] * products.N_OFFERED])  # the second is not worth it
    with monkeypatch.context() as timed:
        timed.setattr(products._Plan, "_took_ms", lambda *_: next(took_ms))
        choice, result = chosen(x, weights)
    assert choice == 2
    (kept,) = tmp_path.glob("products-*.json")
    assert list(json.loads(kept.read_text()).values()) == [2]
    forget()
    monkeypatch.setattr(products._Plan, "_took_ms", None)  # nothing is timed again
    assert (
        torch.equal(products.product(x, weights[0]), result) and products._plan(kind_of(x, weights[0]), 0)._chosen == 2
    )


def test_outside_of_graphs_nothing_is_timed_nor_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(products._Plan, "_took_ms", None)
    x, weight = normal(64, 320), normal(960, 320)
    assert is_near(products.product(x, weight), x.float() @ weight.float().t())
    assert not list(tmp_path.iterdir())


def test_a_file_of_choices_that_is_none_is_made_anew(tmp_path):
    x, weight = normal(64, 320), normal(960, 320)
    chosen(x, [weight])
    (kept,) = tmp_path.glob("products-*.json")
    kept.write_text("{")
    forget()
    assert is_near(chosen(x, [weight])[1], x.float() @ weight.float().t())
    assert len(json.loads(kept.read_text())) == 1


def test_matrices_that_do_not_lie_row_by_row_are_refused():
    with pytest.raises(ValueError, match="row by row"):
        products.product(normal(64, 8).t(), normal(16, 64))


def plain_attention(qkv, n_rows, n_heads, is_causal):
    q, k, v = qkv.float().view(n_rows, -1, 3, n_heads, 64).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / 8
    if is_causal:
        scores += torch.full(scores.shape[2:], float("-inf"), device="cuda").triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(qkv), -1)


@pytest.mark.parametrize("n_tokens", [64, 192, 256, 1024])
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("n_heads", [4, 16])
@pytest.mark.parametrize("std", [1.0, 6.0])  # the latter: nearly all of the weight is on one key
def test_attention_over_windows(n_tokens, n_rows, n_heads, std):
    qkv = normal(n_rows * n_tokens, 3 * 64 * n_heads, std=std)
    assert is_near(Attention(64 * n_heads)(qkv, n_rows), plain_attention(qkv, n_rows, n_heads, False))


@pytest.mark.parametrize("n_tokens", [128, 896])
@pytest.mark.parametrize("n_rows", [1, 4])
@pytest.mark.parametrize("bits", [16, 8])
def test_causal_attention_stores_keys_and_values_as_the_kernel_without_attention(n_tokens, n_rows, bits):
    size, head = GPTSize(2, 4, 256, 1024, 100, 64), Head(COARSE, 0, 2, 32, None)
    caches = [fused.KVCache.zeros(size, 6, bits) for _ in range(2)]
    nothing = torch.zeros(1, device="cuda")
    layers = [Layers(GPTWeights(nothing, nothing, [], nothing), size, head, cache) for cache in caches]
    slots = torch.tensor([5, 0, 3, 1][:n_rows], dtype=torch.int32, device="cuda")
    qkv = normal(n_rows * n_tokens, 3 * 256)
    attended = layers[0].attention(qkv, n_rows, slots, 1)
    layers[1].store(slots, qkv, 1)
    assert is_near(attended, plain_attention(qkv, n_rows, 4, True))
    assert torch.equal(*(cache.values for cache in caches)) and caches[0].values.any()
    assert bits == 16 or torch.equal(*(cache.scales for cache in caches))
