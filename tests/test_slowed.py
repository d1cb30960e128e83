"""Kernels slowed to another GPU's steps compile, and wait where they should. How near they come is measured on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "perf"))

from slowed_gpu import WAITS, Delays, with_wait, write_kernels  # noqa: E402
from test_kernels import BF16, COARSE_HEAD, LARGE, compiler  # noqa: E402, F401

from barkstream.engines import kernels  # noqa: E402
from barkstream.engines.kernels import fused, wide  # noqa: E402


@pytest.fixture
def delays():
    return Delays(position=9.5, kernel={"semantic": {1: 1e3, 32: 1e4}, "coarse": {1: -5e3, 8: 2e3, 16: 4e3}})


def test_slowed_kernels_compile_to_other_code(tmp_path, delays, monkeypatch):
    sources = [module.source(LARGE, COARSE_HEAD, BF16, n) for module, n in ((fused, 1), (wide, 16))]
    as_they_are = [kernels.compile_source(file, fused.ARCHITECTURE, **constants) for file, constants in sources]
    write_kernels(kernels.HERE, tmp_path / "slowed", delays)
    monkeypatch.setattr(kernels, "HERE", tmp_path / "slowed")
    for before, (file, constants) in zip(as_they_are, sources, strict=True):
        assert kernels.compile_source(file, fused.ARCHITECTURE, **constants) != before


def test_a_kernel_between_two_measured_ones_waits_for_as_long_as_lies_between(delays):
    assert delays.at("coarse", 12) == 3e3
    assert delays.at("coarse", 64) == 4e3
    delays.add({("coarse", 8): 0.001, ("coarse", 16): -0.001})  # ms
    assert delays.kernel["coarse"] == {1: -5e3, 8: 3e3, 16: 3e3}


def test_a_kernel_that_has_changed_is_not_slowed_in_the_wrong_place(delays):
    source = (kernels.HERE / "wide.cu").read_text()
    slowed = with_wait(source, *WAITS["wide.cu"], delays)
    assert slowed.count("last_longer(") == 2
    with pytest.raises(RuntimeError, match="2 lines"):
        with_wait(source + source, *WAITS["wide.cu"], delays)
    with pytest.raises(RuntimeError, match="0 lines"):
        with_wait(source.replace("publish_numbered(a.drawn", "publish(a.drawn"), *WAITS["wide.cu"], delays)
