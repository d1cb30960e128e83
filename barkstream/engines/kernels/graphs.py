"""CUDA graphs: kernels that one launch sets off."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from barkstream.engines.kernels.products import choose_algorithms


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
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
    graph = torch.cuda.CUDAGraph()
    with _no_collection(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


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
