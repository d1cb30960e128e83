"""EnCodec's LSTM as one kernel launch for all steps: `lstm.cu` and its arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_int, c_void_p

import torch
from torch import Tensor

from barkstream.engines.kernels import Kernel, Source, build, current_stream
from barkstream.engines.kernels.fused import padded

WIDTH, N_LAYERS, N_GATES = 512, 2, 4
ROW_COUNTS = (1, 2, 4, 8)
N_BLOCKS, N_THREADS = WIDTH // 4, WIDTH // 2
N_PACKETS = 2 * 4 * N_LAYERS * N_BLOCKS  # a row: 2 buffers, 4 copies


class _Arguments(ctypes.Structure):
    """`Arguments` of lstm.cu."""

    _pointers = ("weights", "bias", "given", "h", "c", "y", "last_h", "last_c", "packets")
    _counts = ("n_steps", "n_rows", "rows_a_step", "h_stride", "c_stride")
    _fields_ = [(name, c_void_p) for name in _pointers] + [(name, c_int) for name in _counts]


def source(n_rows: int) -> Source:
    """The kernel for so many rows, of ROW_COUNTS."""
    return "lstm.cu", dict(WIDTH=WIDTH, N_ROWS=n_rows)


class Lstm:
    """Twin of a two-layer nn.LSTM of width 512, float32."""

    def __init__(self, weights: Mapping[str, Tensor]):
        """weights: an nn.LSTM's, by its names, on the GPU."""
        layer_0, layer_1 = (weights[f"bias_ih_l{i}"] + weights[f"bias_hh_l{i}"] for i in range(N_LAYERS))
        self._of_input, self._bias_0, self._bias_1 = map(_by_unit, (weights["weight_ih_l0"], layer_0, layer_1))
        recurrent = [weights[name] for name in ("weight_hh_l0", "weight_ih_l1", "weight_hh_l1")]
        self._weights = torch.stack([_by_unit(matrix) for matrix in recurrent])
        major, minor = torch.cuda.get_device_capability()
        self._kernels: dict[int, Kernel] = {}
        for n_rows in ROW_COUNTS:  # 0.1 s each: all of them, for a graph's capture must not meet one that is not there
            file, constants = source(n_rows)
            self._kernels[n_rows] = build(file, f"sm_{major}{minor}", **constants).kernel("lstm", cooperative=True)

    @staticmethod
    def fits(width: int, n_layers: int) -> bool:
        """Whether this GPU, if there is one, and this size allow it: all blocks must run at once."""
        if (width, n_layers) != (WIDTH, N_LAYERS) or not torch.cuda.is_available():
            return False
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.major >= 8 and properties.multi_processor_count >= N_BLOCKS

    def __call__(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, B, width], carried h and c [B, layers, width] -> y [T, B, width], next h and c [B, layers, width]

        T is at least 1. Nothing waits for the GPU.
        """
        n_steps, n_rows, _ = x.shape
        given = torch.addmm(self._bias_0, x.reshape(n_steps * n_rows, WIDTH), self._of_input.t())
        given = given.view(n_steps, n_rows, WIDTH * N_GATES)
        y, last_h, last_c = (x.new_empty(shape) for shape in (x.shape, h.shape, c.shape))
        for first in range(0, n_rows, ROW_COUNTS[-1]):
            part = slice(first, first + ROW_COUNTS[-1])
            self._launch(given[:, part], h[part], c[part], y[:, part], last_h[part], last_c[part])
        return y, last_h, last_c

    def _launch(self, given: Tensor, h: Tensor, c: Tensor, y: Tensor, last_h: Tensor, last_c: Tensor) -> None:
        """Up to 8 rows of what `__call__` has; given [T, rows, width, gates]."""
        assert h.dtype == c.dtype == torch.float32 and h.stride()[1:] == c.stride()[1:] == (WIDTH, 1)
        n_padded = padded(len(h), ROW_COUNTS)
        packets = torch.zeros(n_padded, N_PACKETS, 2, dtype=torch.int64, device="cuda")  # 16 bytes each
        tensors = (self._weights, self._bias_1, given, h, c, y, last_h, last_c, packets)
        pointers = [tensor.data_ptr() for tensor in tensors]
        arguments = _Arguments(*pointers, len(y), len(h), y.stride(0) // WIDTH, h.stride(0), c.stride(0))
        stream = current_stream()
        self._kernels[n_padded].launch((N_BLOCKS, 1, 1), N_THREADS, [arguments], stream)


def _by_unit(x: Tensor) -> Tensor:
    """Rows, gate by gate as PyTorch has them, unit by unit: those of a unit's four gates lie together."""
    return x.unflatten(0, (N_GATES, -1)).transpose(0, 1).flatten(0, 1).contiguous()
