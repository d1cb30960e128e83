"""CUDA graphs: kernels that one launch sets off."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_void_p

import torch

from barkstream.engines.kernels import check, current_stream, driver, use_context
from barkstream.engines.kernels.products import choose_algorithms


class Graph:
    """Work that was captured. PyTorch's `replay` lets go of Python, and another thread then keeps it for a while; this does not."""

    def __init__(self, captured: torch.cuda.CUDAGraph):
        """captured: with keep_graph."""
        self._captured = captured  # its memory is the work's
        self._launchable = c_void_p()
        use_context()
        check(driver().cuGraphInstantiateWithFlags(byref(self._launchable), captured.raw_cuda_graph(), 0))
        check(driver().cuGraphUpload(self._launchable, current_stream()))

    def replay(self) -> None:
        """On the current stream. Asynchronous."""
        check(driver().cuGraphLaunch(self._launchable, current_stream()))

    def __del__(self) -> None:
        driver().cuGraphExecDestroy(self._launchable)


def capture(work: Callable[[], None]) -> Graph:
    """The work as a CUDA graph; it runs once before, so that libraries initialise outside of it, and its products are chosen.

    All graphs on a GPU share the memory they work in, for they run one after another: what a graph leaves there is to be copied before
    the next one is launched.
    """
    device = torch.cuda.current_device()
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        choose_algorithms(work)
    torch.cuda.current_stream().wait_stream(stream)
    pool = graph_pool(device).pool()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with _no_collection(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return Graph(graph)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage is collected before, not during: graphs that a collection destroys, those of an engine that is no more, may end a
    capture with an error."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def graph_pool(device: int) -> torch.cuda.CUDAGraph:
    """A graph that keeps the memory which all share: PyTorch gives a pool up with its last graph, for good."""
    graph = torch.cuda.CUDAGraph()
    with _no_collection(), torch.cuda.graph(graph, stream=side_stream(device), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
    return graph


@functools.cache
def side_stream(device: int) -> torch.cuda.Stream:
    """Where graphs are captured. One for all: cuBLAS keeps 32 MB of workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)
