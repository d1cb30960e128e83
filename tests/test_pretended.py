"""A pretended GPU takes what a real one was measured to take."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

PERF = Path(__file__).resolve().parents[1] / "perf"
sys.path[:0] = [str(PERF), str(PERF / "pretended")]

from gpu_costs import COSTS, KEYS, PREFIX, prefix_share, together  # noqa: E402
from pretended_engines import CausalEngine, CodecEngine, Gpu  # noqa: E402

from barkstream.engines import Chunk, Head, Row  # noqa: E402
from barkstream.engines.workers import FIRST, LAST, POLICIES  # noqa: E402
from barkstream.sampling import COARSE, Sampling  # noqa: E402

H100 = COSTS["h100"]
HEAD = Head(COARSE, first_id=10_000, n_codebooks=2, size=1024, end=None)


def row(n_ids: int, n_tokens: int = 60, stream: int = 1) -> Row:
    return Row(np.full((n_ids, 1), 10_000, np.int32), n_tokens, 0, Sampling(), stream)


@pytest.fixture
def coarse():
    return CausalEngine(Gpu(H100), "coarse", HEAD)


def test_rows_behind_fewer_positions_have_fewer_keys_to_read(coarse):
    as_measured = [row(KEYS - 30, stream=i) for i in range(4)]
    assert coarse._step_ms(as_measured) == pytest.approx(H100.coarse_step[4])
    half = coarse._step_ms([row(KEYS // 2 - 30, stream=i) for i in range(4)])
    assert half == pytest.approx(H100.coarse_step[4] - 2 * H100.row_keys, abs=1e-3)


def test_a_prefill_takes_what_its_length_does_and_a_row_that_goes_on_has_none(coarse):
    assert coarse._prefill_ms([]) == 0.0
    assert coarse._prefill_ms([row(PREFIX + 1)] * 3) == pytest.approx(H100.coarse_prefill[2])
    assert coarse._prefill_ms([row(257)]) == pytest.approx(2 / 7 * H100.coarse_prefill[0])
    first = row(300)
    begun = coarse._launch([first])
    assert begun.first_s > 0
    rest = first.after(coarse._wait(begun, [first])[0].tokens)
    assert coarse._launch([Row(rest.ids, 60, rest.position, rest.sampling, rest.stream)]).first_s == 0.0


def test_more_than_go_at_once_take_as_long_as_their_parts():
    assert together((1.0, 1.5, 1.8), 0) == 0.0
    assert together((1.0, 1.5, 1.8), 2) == 1.5
    assert together((1.0, 1.5, 1.8), 7) == pytest.approx(2 * 1.8 + 1.0)
    assert (prefix_share(PREFIX), prefix_share(1)) == (1.0, 1 / 7)


def test_a_second_chunk_is_none_that_nothing_stands_before():
    codec, codes = CodecEngine(Gpu(H100)), np.zeros((8, 28), np.int32)
    first = Chunk(codes, np.zeros(9, np.float32))
    ((_, state),) = codec.start([first])()
    assert [POLICIES["codec"].rank(each) for each in (first, Chunk(codes, state))] == [LAST, FIRST]


def test_slower_kernels_take_longer_whatever_they_do():
    slow = H100.times(2)
    assert (slow.step("coarse", 20), slow.prefill("semantic", 5)) == (
        2 * H100.step("coarse", 20),
        2 * H100.prefill("semantic", 5),
    )
    assert slow.fine[3] == 2 * H100.fine[3] and slow.long_fine == 2 * H100.long_fine
