"""The kernels' sources, compiled for an H100 by NVRTC, which needs no GPU. What they compute is tests/test_cuda.py's, on one."""

from __future__ import annotations

import ctypes
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from barkstream.engines import Head, kernels  # noqa: E402
from barkstream.engines.kernels import attention, fused, lstm, wide  # noqa: E402
from barkstream.engines.kernels.fused import Bits  # noqa: E402
from barkstream.sampling import COARSE, SEMANTIC  # noqa: E402
from barkstream.tokens import GPTSize  # noqa: E402

SEMANTIC_HEAD, COARSE_HEAD = Head(SEMANTIC, 0, 1, 10_001, 10_000), Head(COARSE, 10_000, 2, 1_024, None)


def bark(n_layers, n_heads, n_ids):
    return GPTSize(n_layers, n_heads, 64 * n_heads, 1024, n_ids, 10_048)


WIDTHS = BF16, KV8, INT8 = Bits(), Bits(kv=8), Bits(8, 8)
LARGE, SMALL, NANO = (bark(*shape, n_ids=12_096) for shape in ((24, 16), (12, 12), (8, 5)))


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    """Nothing is kept from earlier, nor for later."""
    try:
        kernels._nvrtc()
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(kernels, "CACHE", tmp_path / "kept")
    kernels._image.cache_clear()
    yield
    kernels._image.cache_clear()


@pytest.mark.timeout(300)
def test_every_decode_kernel_compiles(tmp_path):
    """Both kernels at all numbers of rows and widths of numbers; the end of speech, and sizes whose slices don't come out even."""
    wanted = [fused.source(LARGE, COARSE_HEAD, bits, n) for bits in WIDTHS for n in fused.ROW_COUNTS]
    wanted += [wide.source(LARGE, COARSE_HEAD, bits, n) for bits in WIDTHS for n in wide.ROW_COUNTS]
    for size, head in ((LARGE, SEMANTIC_HEAD), (SMALL, COARSE_HEAD), (NANO, COARSE_HEAD)):
        wanted += [module.source(size, head, bits, 8) for module in (fused, wide) for bits in WIDTHS]
    kernels.compile_all(wanted, fused.ARCHITECTURE)
    kept = [path.read_bytes() for path in (tmp_path / "kept").iterdir()]
    assert len(kept) == len(wanted)
    assert all(image.startswith(b"\x7fELF") and b".text.decode" in image for image in kept)


def test_what_racecheck_runs_on_compiles_to_other_code(monkeypatch):
    """tests/sanitize.py, which wants a GPU."""
    ring = str(Path(__file__).parent / "kernels/ring.cu"), dict(HANDED_ON=1, MISTAKE=0)
    sources = [ring, *(module.source(NANO, COARSE_HEAD, BF16, 8) for module in (fused, wide))]
    as_they_are = [kernels.compile_source(file, fused.ARCHITECTURE, **constants) for file, constants in sources]
    monkeypatch.setenv(kernels.UNDER_RACECHECK, "1")
    for before, (file, constants) in zip(as_they_are, sources, strict=True):
        assert kernels.compile_source(file, fused.ARCHITECTURE, **constants) != before


def test_compute_sanitizer_is_run_on_every_kernel():
    from sanitize import CASES, TOOLS

    for tool in TOOLS:
        named = ", ".join(name for name, case in CASES.items() if tool in case.tools and case.is_clean)
        assert not [path.name for path in kernels.HERE.glob("*.cu") if path.name not in named]


def test_nothing_spills_at_up_to_32_rows():
    """A reload waits in line behind other warps' polls: it is what made decode.cu slow at first (docs/performance.md)."""
    wanted = [fused.source(LARGE, COARSE_HEAD, bits, n) for bits in WIDTHS for n in (1, 4)]
    wanted += [wide.source(LARGE, COARSE_HEAD, bits, n) for bits in WIDTHS for n in (16, 24, 32)]
    with ThreadPoolExecutor(2) as pool:
        for (file, constants), log in zip(wanted, pool.map(compiler_log, wanted), strict=True):
            spilt = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
            assert spilt and set(spilt) == {("0", "0")}, (file, constants)


@pytest.mark.parametrize("n_rows", lstm.ROW_COUNTS)
def test_the_lstms_weights_stay_in_registers(n_rows):
    """So many that no two blocks share a multiprocessor: its 65,536 registers are two blocks of 256 threads of 128."""
    log = compiler_log(lstm.source(n_rows))
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")]
    (n_registers,) = re.findall(r"Used (\d+) registers", log)
    assert int(n_registers) > 128


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_the_lstm_compiles_for_any_recent_gpu(architecture):
    for n_rows in lstm.ROW_COUNTS:
        file, constants = lstm.source(n_rows)
        assert b".text.lstm" in kernels.compile_source(file, architecture, **constants)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_attention_compiles_for_any_recent_gpu(architecture):
    caches = None, *(fused.kernel_constants(LARGE, COARSE_HEAD, bits) for bits in (BF16, INT8))
    for constants, n_groups in itertools.product(caches, (1, 2)):
        file, defined = attention.source(LARGE.width, n_groups, constants)
        assert b".text.attend_all" in kernels.compile_source(file, architecture, **defined)
        log = compiler_log((file, defined))
        assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")]


def compiler_log(source):
    """What the compiler says of registers and stack."""
    (file, constants), nvrtc, program = source, kernels._nvrtc(), ctypes.c_void_p()
    headers = {path.name.encode(): path.read_bytes() for path in kernels.HERE.glob("*.cuh")}
    options = [f"-arch={fused.ARCHITECTURE}", "-std=c++17", "-default-device", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in constants.items()]

    def strings(values):
        return (ctypes.c_char_p * len(values))(*values)

    content, names, texts = (kernels.HERE / file).read_bytes(), strings(list(headers)), strings(list(headers.values()))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), content, file.encode(), len(headers), texts, names)
    assert nvrtc.nvrtcCompileProgram(program, len(options), strings([option.encode() for option in options])) == 0
    return kernels._read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()


def test_the_other_kernels_compile():
    constants = fused.kernel_constants(LARGE, COARSE_HEAD, BF16)
    batched = kernels.compile_source("batched.cu", "sm_90", **constants)
    fine = kernels.compile_source("fine.cu", "sm_80", WIDTH=1024, BOOK_SIZE=1024)
    for image, names in (
        (batched, ("embed", "layer_norm", "store", "sample", "attend")),
        (fine, ("embed", "layer_norm", "draw")),
    ):
        assert all(f".text.{name}".encode() in image for name in names)


def test_what_does_not_fit_says_why():
    file, constants = fused.source(LARGE, COARSE_HEAD, BF16, 1)
    with pytest.raises(RuntimeError, match=r"(?s)decode.cu does not compile with .*N_LAYERS=23.*static assertion"):
        kernels.compile_source(file, fused.ARCHITECTURE, **{**constants, "N_LAYERS": 23})


def test_a_wide_kernels_memory_fits_a_block():
    for size in (LARGE, SMALL, NANO):
        for bits in WIDTHS:
            for n_rows in wide.ROW_COUNTS:
                constants = wide.source(size, COARSE_HEAD, bits, n_rows)[1]
                assert constants["MOST_KEYS_IN_FLIGHT"] >= constants["KEYS_IN_FLIGHT"] >= 1
                assert constants["STAGES"] - constants["MOST_KEYS_IN_FLIGHT"] >= wide.N_TEAMS


def test_rows_are_dealt_to_whoever_has_least_to_do_and_room():
    random = np.random.default_rng(0)
    for n_rows in (8, 16, 24, 32, 64):
        lengths = random.integers(0, 4, n_rows).tolist()  # with ties
        hands = [[] for _ in range(8)]
        for row in sorted(range(n_rows), key=lambda row: -lengths[row]):
            with_room = [hand for hand in hands if len(hand) < n_rows // 8]
            min(with_room, key=lambda hand: sum(lengths[each] for each in hand)).append(row)
        assert wide.deal_rows(lengths) == sum(hands, [])
