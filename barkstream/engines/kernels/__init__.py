"""CUDA C++ kernels, compiled when an engine starts, for the GPU that is there: NVRTC and the driver through ctypes.

Needs no nvcc and no Python package besides PyTorch: libnvrtc comes with PyTorch's wheels and with every CUDA container,
libcuda with the driver. The sources include no header, so that none has to be found.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import site
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from pathlib import Path

import torch

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "barkstream"  # compiled kernels

# Set in the environment: decode kernels whose shared memory compute-sanitizer can follow, many times slower (tests/sanitize.py).
UNDER_RACECHECK = "BARKSTREAM_UNDER_RACECHECK"

# CUlaunchAttributeID and CUfunction_attribute of cuda.h
COOPERATIVE, CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
DISABLE_TIMING = 2  # CUevent_flags


class _Attribute(ctypes.Structure):
    _fields_ = [("id", c_int), ("pad", c_int), ("value", c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("n_attributes", c_uint),
    ]


class Kernel:
    """One `extern "C" __global__` function of a module."""

    def __init__(
        self,
        function: c_void_p,
        shared_bytes: int,
        cluster: int = 1,
        cooperative: bool = False,
        early_start: bool = False,
    ):
        """shared_bytes: dynamic shared memory a block. cluster: blocks that share it. cooperative: all blocks run at once.
        early_start: may start before the kernel ahead of it in the stream is done (programmatic dependent launch)."""
        self._function, self._shared_bytes, self.cluster = function, shared_bytes, cluster
        chosen: list[tuple[int, tuple[int, ...]]] = [(CLUSTER_DIMENSION, (cluster, 1, 1))] * (cluster > 1)
        chosen += [(COOPERATIVE, (1,))] * cooperative + [(PROGRAMMATIC_STREAM_SERIALIZATION, (1,))] * early_start
        self._attributes = (_Attribute * len(chosen))()
        for attribute, (kind, values) in zip(self._attributes, chosen, strict=True):
            attribute.id = kind
            attribute.value[: len(values)] = values
        if shared_bytes:  # with what the kernel declares it may be more than the 48 KB that need no asking
            check(_cuda().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes))

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        arguments: Sequence[ctypes._SimpleCData | ctypes.Structure],
        stream: int,
    ) -> None:
        """Put the kernel on a stream (torch.cuda.Stream.cuda_stream); asynchronous, and captured if the stream captures."""
        use_context()
        config = self._config(grid, block, stream)
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        check(driver().cuLaunchKernelEx(byref(config), self._function, pointers, None))

    def max_clusters(self, grid: tuple[int, int, int], block: int) -> int:
        """Clusters of this kernel that can run at once on this GPU; 0 if none can."""
        n = c_int()
        status = _cuda().cuOccupancyMaxActiveClusters(byref(n), self._function, byref(self._config(grid, block, 0)))
        return n.value if status == 0 else 0

    def _config(self, grid: tuple[int, int, int], block: int, stream: int) -> _LaunchConfig:
        return _LaunchConfig(
            (c_uint * 3)(*grid),
            (c_uint * 3)(block, 1, 1),
            self._shared_bytes,
            stream,
            self._attributes,
            len(self._attributes),
        )


class Module:
    """Compiled kernels, loaded on the current device for the life of the process."""

    def __init__(self, image: bytes):
        self._handle = c_void_p()
        check(_cuda().cuModuleLoadData(byref(self._handle), c_char_p(image)))

    def kernel(
        self, name: str, shared_bytes: int = 0, cluster: int = 1, cooperative: bool = False, early_start: bool = False
    ) -> Kernel:
        function = c_void_p()
        check(_cuda().cuModuleGetFunction(byref(function), self._handle, name.encode()))
        return Kernel(function, shared_bytes, cluster, cooperative, early_start)


N_PLACES, N_TRIES = 12, 2


def quickest_place(place: torch.Tensor, use: Callable[[torch.Tensor], None], run: Callable[[], object]) -> None:
    """Have a kernel use the one of several copies of a buffer with which it runs quickest.

    Blocks talk to one another through L2, and how soon they hear may depend on where in it the buffer lies (docs/performance.md).
    """
    places, took = [place, *(place.clone() for _ in range(N_PLACES - 1))], []
    for each in places:
        use(each)
        run()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(N_TRIES):
            run()
        stop.record()
        stop.synchronize()
        took.append(start.elapsed_time(stop))
    use(places[took.index(min(took))])


@functools.cache
def build(file: str, architecture: str, **constants: int) -> Module:
    """Compile kernels/<file> for an architecture such as "sm_90a", with -D constants, and load it on the current device."""
    return Module(_image(file, architecture, **constants))


Source = tuple[str, dict[str, int]]  # a kernel's file, and what it is compiled with
MOST_COMPILERS = 8  # at once: each takes some 60 MB


def compile_all(sources: Sequence[Source], architecture: str) -> None:
    """Compile several kernels, each on a CPU of its own, for `build` to find."""
    with ThreadPoolExecutor(max(1, min(len(sources), os.cpu_count() or 1, MOST_COMPILERS))) as pool:
        list(pool.map(lambda source: _image(source[0], architecture, **source[1]), sources))


def compile_source(file: str, architecture: str, **constants: int) -> bytes:
    """Machine code of kernels/<file>. Raises RuntimeError with the compiler's log.

    It is kept in CACHE for the next start, under a name that sources, options and the compiler's version make.
    """
    headers = {path.name: path.read_bytes() for path in sorted(HERE.glob("*.cuh"))}
    options = [
        f"-arch={architecture}",
        "-std=c++17",
        "-default-device",
        *(f"-D{name}={value}" for name, value in constants.items()),
        *(["-DUNDER_RACECHECK=1"] if os.environ.get(UNDER_RACECHECK) else []),
    ]
    major, minor = c_int(), c_int()
    _check_nvrtc(_nvrtc().nvrtcVersion(byref(major), byref(minor)))
    made_of = [
        (HERE / file).read_bytes(),
        *headers.values(),
        *map(str.encode, options),
        bytes([major.value, minor.value]),
    ]
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:32]
    kept = CACHE / f"{Path(file).stem}-{name}.cubin"
    with suppress(OSError):
        return kept.read_bytes()
    image = _compile(file, headers, options)
    with suppress(OSError):  # a folder that nobody may write costs the next start its time
        CACHE.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{os.getpid()}")
        written.write_bytes(image)
        written.replace(kept)
    return image


_image = functools.cache(compile_source)


def _compile(file: str, headers: dict[str, bytes], options: Sequence[str]) -> bytes:
    nvrtc = _nvrtc()
    names = list(headers)
    program = c_void_p()
    _check_nvrtc(
        nvrtc.nvrtcCreateProgram(
            byref(program),
            (HERE / file).read_bytes(),
            file.encode(),
            len(names),
            (c_char_p * len(names))(*headers.values()),
            (c_char_p * len(names))(*map(str.encode, names)),
        )
    )
    status = nvrtc.nvrtcCompileProgram(program, len(options), (c_char_p * len(options))(*map(str.encode, options)))
    if status:
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()
        raise RuntimeError(f"{file} does not compile with {' '.join(options)}:\n{log}")
    image = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(byref(program))
    return image


def _read(get_size: Callable[..., int], get: Callable[..., int], program: c_void_p) -> bytes:
    size = c_size_t()
    _check_nvrtc(get_size(program, byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check_nvrtc(get(program, content))
    return content.raw


_thread = threading.local()


def use_context() -> None:
    """The driver launches in the calling thread's context, and a new thread has none until the runtime gives it PyTorch's."""
    if not getattr(_thread, "has_context", False):
        torch.cuda.mem_get_info()
        _thread.has_context = True


def current_stream() -> int:
    """The handle of the stream that work goes to. PyTorch's own way to it takes 8 us, and 70 in a thread that has slept."""
    use_context()
    return _raw_stream()(torch.cuda.current_device())


@functools.cache
def _raw_stream() -> Callable[[int], int]:
    """By device. What PyTorch's compiler uses; a PyTorch that has it no more has the other."""
    by_hand = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return by_hand or (lambda device: torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _cuda() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuModuleLoadData.argtypes = [c_void_p, c_char_p]
    library.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    library.cuEventSynchronize.argtypes = [c_void_p]
    return library


@functools.cache
def driver() -> ctypes.PyDLL:
    """For what is quickly done: a call keeps Python for itself, and the next is not held up by another thread."""
    library = ctypes.PyDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p]
    library.cuMemcpyHtoDAsync_v2.argtypes = [c_uint64, c_void_p, c_size_t, c_void_p]
    library.cuMemcpyDtoHAsync_v2.argtypes = [c_void_p, c_uint64, c_size_t, c_void_p]
    library.cuMemcpyDtoDAsync_v2.argtypes = [c_uint64, c_uint64, c_size_t, c_void_p]
    library.cuMemsetD8Async.argtypes = [c_uint64, c_ubyte, c_size_t, c_void_p]
    library.cuGraphInstantiateWithFlags.argtypes = [c_void_p, c_void_p, c_ulonglong]
    library.cuGraphUpload.argtypes = library.cuGraphLaunch.argtypes = [c_void_p, c_void_p]
    library.cuGraphExecDestroy.argtypes = library.cuEventDestroy_v2.argtypes = [c_void_p]
    library.cuEventCreate.argtypes = [c_void_p, c_uint]
    library.cuEventRecord.argtypes = [c_void_p, c_void_p]
    return library


class Event:
    """Where the current stream is now. PyTorch's takes 13 us to make and record, and 90 in a thread that has slept."""

    def __init__(self) -> None:
        self._handle = c_void_p()
        stream = current_stream()
        check(driver().cuEventCreate(byref(self._handle), DISABLE_TIMING))
        check(driver().cuEventRecord(self._handle, stream))

    def wait(self) -> None:
        """Until the stream has come as far. Other threads go on meanwhile."""
        check(_cuda().cuEventSynchronize(self._handle))

    def __del__(self) -> None:
        driver().cuEventDestroy_v2(self._handle)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    for path in _nvrtc_candidates():
        try:
            for builtins in sorted(
                Path(path).parent.glob("libnvrtc-builtins.so.*")
            ):  # which libnvrtc looks for by its bare name
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise RuntimeError(
        "no libnvrtc.so: install PyTorch with CUDA, or NVIDIA's nvidia-cuda-nvrtc package, or the CUDA toolkit"
    )


def _nvrtc_candidates() -> list[str | Path]:
    """Where libnvrtc may lie: PyTorch's wheels, the toolkit, the loader's own path."""
    folders = [Path(folder) for folder in dict.fromkeys([*site.getsitepackages(), *sys.path]) if folder]
    patterns = ("nvidia/cu*/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*")
    wheels = [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
    toolkit = sorted(Path("/usr/local").glob("cuda*/**/libnvrtc.so.*"))
    found = [path for path in [*wheels, *toolkit] if "builtins" not in path.name and ".alt" not in path.name]
    return [*found, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


def check(status: int) -> None:
    if status:
        name = c_char_p()
        _cuda().cuGetErrorString(status, byref(name))
        raise RuntimeError(f"CUDA driver error {status}: {(name.value or b'unknown').decode()}")


def _check_nvrtc(status: int) -> None:
    if status:
        _nvrtc().nvrtcGetErrorString.restype = c_char_p
        raise RuntimeError(f"NVRTC: {_nvrtc().nvrtcGetErrorString(status).decode()}")


__all__ = [
    "Event",
    "Kernel",
    "Module",
    "Source",
    "build",
    "c_int",
    "c_uint",
    "c_uint64",
    "c_void_p",
    "compile_all",
    "compile_source",
    "current_stream",
    "quickest_place",
]
