"""The fine GPT on an NVIDIA GPU: a window's six passes and the draws between them, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from barkstream.engines import Window
from barkstream.engines.kernels import build, current_stream
from barkstream.engines.kernels.attention import Attention
from barkstream.engines.kernels.batched import NORM_ROWS
from barkstream.engines.kernels.graphs import capture
from barkstream.engines.kernels.products import add_product, gelu_of_product, product
from barkstream.engines.kernels.weights import read_onnx
from barkstream.engines.transfers import Inputs, download
from barkstream.sampling import Ints
from barkstream.tokens import FineLayout

FRAME_STEP = 64  # windows are padded to a multiple of this many frames, so that few graphs serve all lengths
GRAPH_FRAMES = 4096  # rows times frames: more than this keep the GPU busy without a graph
FREE_FRAMES = 1024  # rows times frames: up to here windows of any length go together (docs/performance.md)
SHORT_FRAMES = 2048  # rows times frames: up to here there are graphs between powers of two, too
THREADS = 256  # of a block in fine.cu
SHORT_WINDOW = 512  # frames: attention of longer ones is faster by cuDNN's kernel, PyTorch's choice, than by ours


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # [out, in] bf16, the weight of the layer norm before it folded in
    bias: Tensor | None  # [out] bf16, the bias of that layer norm

    def __call__(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear


class FineEngine:
    """Fills windows of frames. One thread at a time may use it."""

    def __init__(self, weights: Mapping[str, np.ndarray | Tensor], layout: FineLayout, max_batch: int = 8):
        """weights: by Hugging Face name, `x.weight` [out, in] or, as `model.onnx` has them, `x.weight.T` [in, out].

        Raises ValueError for what the kernels don't do: biases in linear layers, 8-bit weights.
        """
        self.layout, self.max_batch = layout, max_batch
        named = _Named(weights)
        self._tables = torch.stack(
            [named.tensor(f"input_embeds_layers.{k}.weight") for k in range(layout.n_codebooks)]
        ).to(torch.bfloat16)
        self._positions = named.tensor("position_embeds_layer.weight").contiguous()
        self._layers = [named.layer(f"layers.{i}") for i in range(layout.size.n_layers)]
        heads = [named.head(k, layout) for k in range(layout.n_given, layout.n_codebooks)]
        self._heads, self._head_biases = [h for h, _ in heads], [b for _, b in heads]
        major, minor = torch.cuda.get_device_capability()
        module = build("fine.cu", f"sm_{major}{minor}", WIDTH=layout.size.width, BOOK_SIZE=layout.codebook_size)
        self._kernels = {name: module.kernel(name) for name in ("embed", "layer_norm", "draw")}
        self._attention = Attention(layout.size.width) if layout.size.head_width == 64 else None
        self._batches: dict[tuple[int, int, bool], _Batch] = {}

    @classmethod
    def load(cls, path: Path, layout: FineLayout, max_batch: int = 8) -> FineEngine:
        """path: the stage's model.onnx, of which only the weights are read."""
        return cls(read_onnx(path), layout, max_batch)

    def warm_up(self, frames: Sequence[int]) -> None:
        """Capture the graphs of windows of these many frames, for every size of batch."""
        for n_frames in sorted({_padded(n) for n in frames}):
            for n_rows in sorted({_rows(n, n_frames) for n in range(1, self.max_batch + 1)}):
                codes = np.zeros((self.layout.n_codebooks, min(n_frames, self.layout.size.block_size)), np.int32)
                uniforms = np.full((len(codes) - self.layout.n_given, codes.shape[1]), 0.5, np.float32)
                self.fill([Window(codes, 0, uniforms, 1.0)] * n_rows)

    def fill(self, windows: Sequence[Window]) -> list[Ints]:
        """Each window's codes [K, T] with the codebooks given.. of frames fill_from.. drawn anew, as `FineGPT.fill`."""
        return self.start(windows)()

    def start(self, windows: Sequence[Window]) -> Callable[[], list[Ints]]:
        """`fill`: launches, and returns what waits for the results. Raises ValueError for a window that does not fit."""
        for window in windows:
            window.check(self.layout)
        groups = batches([_padded(window.n_frames) for window in windows], self.max_batch)
        launched = [(members, self._start([windows[i] for i in members], n)) for n, members in groups]

        def finish() -> list[Ints]:
            filled = {
                i: codes[:, : windows[i].n_frames]
                for members, wait in launched
                for i, codes in zip(members, wait(), strict=False)  # rows beyond them fill the batch up
            }
            return [filled[i] for i in range(len(windows))]

        return finish

    def _start(self, windows: list[Window], n_frames: int) -> Callable[[], Ints]:
        n_frames = min(n_frames, self.layout.size.block_size)
        shape = _rows(len(windows), n_frames), n_frames, all(window.n_frames == n_frames for window in windows)
        if shape not in self._batches:
            self._batches[shape] = self._new_batch(*shape)
        return self._batches[shape].start(windows)

    def _new_batch(self, n_rows: int, n_frames: int, are_whole: bool) -> _Batch:
        batch = _Batch(self.layout, n_rows, n_frames, are_whole)
        if n_rows * n_frames <= GRAPH_FRAMES:
            batch.work = capture(lambda: self._passes(batch)).replay
        else:
            batch.work = lambda: self._passes(batch)
        return batch

    # --- the network ---------------------------------------------------------------------------------------------------

    def _passes(self, batch: _Batch) -> None:
        """One pass a codebook, over the summed embeddings of codebooks 0..k."""
        layout = self.layout
        for k in range(layout.n_given, layout.n_codebooks):
            i = k - layout.n_given
            logits = torch.mm(self._forward(batch, k), self._heads[i].t(), out_dtype=torch.float32)
            limits = (batch.temperatures, batch.fill_from, batch.n_valid)
            counts = (layout.n_codebooks, layout.n_given, batch.n_frames, k)
            self._launch(
                "draw", batch.n_tokens, logits, self._head_biases[i], batch.uniforms, *limits, *counts, batch.codes
            )

    def _forward(self, batch: _Batch, k: int) -> Tensor:
        """Normed activations [B T, width] bf16 behind the last layer."""
        layout, n = self.layout, batch.n_tokens
        x = torch.empty(n, layout.size.width, dtype=torch.float32, device="cuda")
        normed = torch.empty_like(x, dtype=torch.bfloat16)
        counts = (layout.n_codebooks, layout.size.n_input_ids, batch.n_frames, k)
        self._launch("embed", n, batch.codes, self._tables, self._positions, *counts, x, normed)
        for layer in self._layers:
            add_product(x, self._attend(batch, layer.qkv(normed)), layer.out.weight)
            self._norm(x, normed)
            add_product(x, gelu_of_product(normed, layer.up.weight, layer.up.bias), layer.down.weight)
            self._norm(x, normed)
        return normed

    def _norm(self, x: Tensor, normed: Tensor) -> None:
        self._launch("layer_norm", -(-len(x) // NORM_ROWS), x, normed, len(x), block=32 * NORM_ROWS)

    def _attend(self, batch: _Batch, qkv: Tensor) -> Tensor:
        size = self.layout.size
        is_short = batch.n_frames <= SHORT_WINDOW and Attention.fits(batch.n_frames)
        if self._attention and batch.mask is None and is_short:
            return self._attention(qkv, batch.n_rows)
        q, k, v = qkv.view(batch.n_rows, batch.n_frames, 3, size.n_heads, size.head_width).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask)
        return attended.transpose(1, 2).reshape(batch.n_tokens, size.width)

    def _launch(self, name: str, n_blocks: int, *arguments: Tensor | int, block: int = THREADS) -> None:
        passed = [c_void_p(a.data_ptr()) if isinstance(a, Tensor) else c_int(a) for a in arguments]
        self._kernels[name].launch((n_blocks, 1, 1), block, passed, current_stream())


class _Batch:
    """The memory that windows of one shape are filled in, and how: a graph's replay, or the work itself."""

    def __init__(self, layout: FineLayout, n_rows: int, n_frames: int, are_whole: bool):
        """are_whole: every window has n_frames frames. Attention is faster without a mask."""
        self.layout, self.n_rows, self.n_frames, self.n_tokens = layout, n_rows, n_frames, n_rows * n_frames
        self._inputs = Inputs(
            codes=((n_rows, layout.n_codebooks, n_frames), torch.int32),
            uniforms=((n_rows, layout.n_codebooks - layout.n_given, n_frames), torch.float32),
            temperatures=((n_rows,), torch.float32),
            fill_from=((n_rows,), torch.int32),
            n_valid=((n_rows,), torch.int32),
            **({} if are_whole else {"mask": ((n_rows, 1, 1, n_frames), torch.bool)}),
        )
        self.codes, self.uniforms = self._inputs["codes"], self._inputs["uniforms"]
        self.temperatures = self._inputs["temperatures"]
        self.fill_from, self.n_valid = self._inputs["fill_from"], self._inputs["n_valid"]
        self.mask = None if are_whole else self._inputs["mask"]
        self.work: Callable[[], None] = lambda: None
        self._inputs.send(partial(self._fill, []))

    def start(self, windows: Sequence[Window]) -> Callable[[], Ints]:
        """What is returned waits for filled codes [B, K, T], padding included."""
        self._inputs.send(partial(self._fill, windows))
        self.work()
        return download(self.codes)

    def _fill(self, windows: Sequence[Window], inputs: dict[str, np.ndarray]) -> None:
        """Rows without a window have one frame that is known, and none to fill."""
        codes, uniforms, n_valid = inputs["codes"], inputs["uniforms"], inputs["n_valid"]
        n_valid[:], inputs["fill_from"][:], inputs["temperatures"][:] = 1, self.n_frames, 1.0
        for i, window in enumerate(windows):
            n = n_valid[i] = window.n_frames
            codes[i, :, :n], uniforms[i, :, :n] = window.codes, window.uniforms
            codes[i, :, n:], uniforms[i, :, n:] = self.layout.unknown, 0.0
            inputs["fill_from"][i], inputs["temperatures"][i] = window.fill_from, window.temperature
        codes[len(windows) :], uniforms[len(windows) :] = self.layout.unknown, 0.0
        if "mask" in inputs:
            inputs["mask"][:] = (np.arange(self.n_frames) < n_valid[:, None])[:, None, None]


class _Named:
    """Weights by name, on their way to the GPU."""

    def __init__(self, weights: Mapping[str, np.ndarray | Tensor]):
        if any(name.endswith((".int8", "_proj.bias")) for name in weights):
            raise ValueError(
                "the cuda engine takes float32 artifacts (`make export PRECISION=`) of checkpoints without biases"
            )
        self._weights = weights

    def tensor(self, name: str) -> Tensor:
        weight = self._weights[name]
        return (weight if isinstance(weight, Tensor) else torch.from_numpy(np.array(weight))).to("cuda", torch.float32)

    def matrix(self, name: str) -> Tensor:
        """[out, in]"""
        if f"{name}.weight" in self._weights:
            return self.tensor(f"{name}.weight")
        return self.tensor(f"{name}.weight.T").t()

    def linear(self, name: str, norm: str | None = None) -> Linear:
        weight = self.matrix(name)
        if norm is None:
            return Linear(weight.to(torch.bfloat16).contiguous(), None)
        bias = (weight @ self.tensor(f"{norm}.bias")).to(torch.bfloat16)
        return Linear((weight * self.tensor(f"{norm}.weight")).to(torch.bfloat16).contiguous(), bias)

    def layer(self, name: str) -> Layer:
        return Layer(
            qkv=self.linear(f"{name}.attn.att_proj", f"{name}.layernorm_1"),
            out=self.linear(f"{name}.attn.out_proj"),
            up=self.linear(f"{name}.mlp.in_proj", f"{name}.layernorm_2"),
            down=self.linear(f"{name}.mlp.out_proj"),
        )

    def head(self, k: int, layout: FineLayout) -> tuple[Tensor, Tensor]:
        """Codebook k's head [codebook_size, width] bf16 with the final norm folded in, and its bias [codebook_size]."""
        last = max(int(name.split(".")[1]) for name in self._weights if name.startswith("lm_heads."))
        weight = self.matrix(f"lm_heads.{last + 1 - layout.n_codebooks + k}")[: layout.codebook_size]
        bias = weight @ self.tensor("layernorm_final.bias")
        return (weight * self.tensor("layernorm_final.weight")).to(torch.bfloat16).contiguous(), bias.contiguous()


def batches(n_frames: Sequence[int], max_batch: int) -> list[tuple[int, list[int]]]:
    """Which windows go together: (frames that each is padded to, their indices).

    A small batch is bound by the launches of its kernels, not by its size: windows of any length go together up to
    FREE_FRAMES. Beyond, only those of the same length, for padding costs what frames cost.
    """
    found: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(n_frames)), key=lambda i: -n_frames[i]):
        if found:
            longest, members = found[-1]
            n_rows = _rows(len(members) + 1, longest)
            if n_rows <= max_batch and (n_frames[i] == longest or n_rows * longest <= FREE_FRAMES):
                members.append(i)
                continue
        found.append((n_frames[i], [i]))
    return found


def _rows(n: int, n_frames: int) -> int:
    """Rows of the graph that fills so many windows of so many frames: a power of two, or, if they are short, 3 or 6."""
    power = 1 << (n - 1).bit_length()
    between = power * 3 // 4
    return between if power > 2 and n <= between and between * n_frames <= SHORT_FRAMES else power


def _padded(n_frames: int) -> int:
    return -(-n_frames // FRAME_STEP) * FRAME_STEP
