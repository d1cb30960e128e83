"""Kernels slowed to another GPU's steps compile, and wait where they should. How near they come is measured on a GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
PERF = Path(__file__).resolve().parents[1] / "perf"
sys.path.insert(0, str(PERF))

import slowed_gpu  # noqa: E402
from slowed_gpu import COMPARED, PROFILES, WAITS, Delays, found, slow_down, with_wait, write_kernels  # noqa: E402
from test_kernels import BF16, COARSE_HEAD, LARGE, compiler  # noqa: E402, F401

from barkstream.engines import kernels  # noqa: E402
from barkstream.engines.kernels import fused, wide  # noqa: E402


@pytest.fixture
def delays():
    measured = {
        ("semantic", 1): 1e3,
        ("semantic", 32): 1e4,
        ("coarse", 1): -5e3,
        ("coarse", 8): 2e3,
        ("coarse", 16): 4e3,
    }
    return Delays(position=9.5, kernel=measured)


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
    longer = delays.corrected({("coarse", 8): 0.001, ("coarse", 16): -0.001})  # ms
    assert longer.at("coarse", 12) == 3e3
    assert longer.at("coarse", 8) == 3e3


def test_what_is_compared_was_measured_on_an_h100():
    """In all three profiles: the files that the docs name."""
    for path in (PERF / "results").glob("2026-11-27-h100-large-e3d04fb-decode-*.json"):
        like = json.loads(path.read_text())
        assert PROFILES[like["bits"], like["kv_bits"]]
        steps = [found(like["lines"], which) for which in COMPARED]
        assert all(0.2 < ms < 1.3 for ms in steps)
    with pytest.raises(SystemExit, match="decode_bench.py's result for --model large"):
        found(like["lines"][:3], ("coarse", 32))


@pytest.fixture
def faster_gpu(monkeypatch, tmp_path):
    """The files' H100, and a pretended GPU whose steps take nine tenths: slowed, as long as they should times what is returned here."""
    like = json.loads((PERF / "results" / "2026-11-27-h100-large-e3d04fb-decode-16-16.json").read_text())
    original, misses_by = kernels.HERE, {"factor": 1.0}

    def measure(bits, bandwidth):
        factor = 0.9 if original == kernels.HERE else misses_by["factor"]
        return {which: factor * found(like["lines"], which) for which in COMPARED}

    monkeypatch.setattr(slowed_gpu, "FOLDER", tmp_path / "slowed")
    monkeypatch.setattr(slowed_gpu, "measure", measure)
    monkeypatch.setattr(slowed_gpu.decode_bench, "copy_bandwidth_tb_s", lambda: 4.2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a faster GPU")
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.delenv(slowed_gpu.SLOWED, raising=False)
    yield like, misses_by
    os.environ.pop(slowed_gpu.SLOWED, None)
    os.environ.pop(slowed_gpu.SLOWED_SAYS, None)


def test_servers_take_slowed_kernels_from_then_on(faster_gpu, capsys):
    like, _ = faster_gpu
    here = kernels.HERE
    slow_down(like)
    assert here == kernels.HERE, "this process's own are as they were"
    assert os.environ["PYTHONPATH"] == f"{PERF / 'slowed'}{os.pathsep}before"
    folder = Path(os.environ[slowed_gpu.SLOWED])
    assert "last_longer(shared.rows)" in (folder / "wide.cu").read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in here.iterdir() if ".cu" in path.suffix}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(COMPARED)


def test_steps_that_do_not_come_near_are_not_run(faster_gpu):
    like, misses_by = faster_gpu
    misses_by["factor"] = 1.06
    with pytest.raises(SystemExit, match="is this GPU the faster one"):
        slow_down(like)
    assert slowed_gpu.SLOWED not in os.environ


def test_the_profile_is_the_one_that_was_measured(faster_gpu, monkeypatch, capsys):
    file = PERF / "results" / "2026-11-27-h100-large-e3d04fb-decode-16-16.json"
    words = ["slowed_gpu.py", "--like", str(file), "--", "--streams", "4", "--profile=cuda-int8", "--", "--rate", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        slowed_gpu.main()
    assert "no --profile: Bark large in the profile that --like was measured in" in capsys.readouterr().err


def test_a_kernel_that_has_changed_is_not_slowed_in_the_wrong_place(delays):
    source = (kernels.HERE / "wide.cu").read_text()
    slowed = with_wait(source, *WAITS["wide.cu"], delays)
    assert slowed.count("last_longer(") == 2
    with pytest.raises(RuntimeError, match="2 lines"):
        with_wait(source + source, *WAITS["wide.cu"], delays)
    with pytest.raises(RuntimeError, match="0 lines"):
        with_wait(source.replace("publish_numbered(a.drawn", "publish(a.drawn"), *WAITS["wide.cu"], delays)
