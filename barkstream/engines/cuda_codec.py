"""EnCodec's decoder on an NVIDIA GPU: a chunk at a time with explicit state, the usual sizes of chunks as CUDA graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barkstream.engines import Chunk, check_chunk
from barkstream.engines.kernels.graphs import capture
from barkstream.engines.kernels.lstm import Lstm
from barkstream.engines.kernels.weights import read_initializers
from barkstream.engines.transfers import Inputs, copy, download, upload
from barkstream.export.codec_state import state_parts, state_size
from barkstream.sampling import Floats, Ints
from barkstream.tokens import CodecLayout

NO_STATE = np.zeros((), np.float32)
MOST_FRAMES = 960  # rows times frames of a graph, each of which takes memory: larger batches go in parts
Decoded = Callable[[], list[tuple[Floats, Floats]]]  # waits for each chunk's samples and next state


class CodecEngine:
    """Decodes chunks of many streams. One thread at a time may use it.

    The state is that of the exported graph (`export/codec_state.py`): a stream may change engines between two chunks.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], layout: CodecLayout, max_batch: int = 8):
        """weights: as `model.onnx` names them."""
        self.layout, self.max_batch = layout, max_batch
        self._decoder = Decoder(weights, layout)
        self._batches: dict[tuple[int, int], _Batch] = {}
        self._most_rows: dict[int, int] = {}  # of the graphs for chunks of so many frames

    @classmethod
    def load(cls, path: Path, layout: CodecLayout, max_batch: int = 8) -> CodecEngine:
        """path: the stage's model.onnx, of which only the weights are read."""
        return cls(read_initializers(path), layout, max_batch)

    def warm_up(self, frames: Sequence[int]) -> None:
        """Capture the graphs of chunks of these many frames, for every size of batch that has no more than MOST_FRAMES."""
        n_rows = 1
        while n_rows <= self.max_batch:
            for n_frames in sorted(set(frames)):
                if n_rows == 1 or n_rows * n_frames <= MOST_FRAMES:
                    self._batches[n_rows, n_frames] = _Batch(self._decoder, n_rows, n_frames)
                    self._most_rows[n_frames] = n_rows
            n_rows *= 2

    def decode(self, chunks: Sequence[Chunk]) -> list[tuple[Floats, Floats]]:
        """(samples [samples_per_frame n], next state [N]) of each chunk.

        Chunks are decoded in pieces of the lengths that there are graphs for, equal pieces together: the state makes that
        exact, and a long chunk takes no more memory than a short one.
        """
        return self.start(chunks)()

    def start(self, chunks: Sequence[Chunk]) -> Decoded:
        """`decode`: launches, and returns what waits for the results. Raises ValueError for a chunk that does not fit."""
        for chunk in chunks:
            check_chunk(chunk, self.layout)
        of_length: dict[int, list[int]] = defaultdict(list)
        for i, chunk in enumerate(chunks):
            of_length[chunk.codes.shape[1]].append(i)
        launched: list[tuple[list[int], Decoded]] = []
        others: list[int] = []
        for n_frames, members in of_length.items():
            sizes = self._sizes(n_frames)
            if most := min(self._most_rows.get(size, 0) for size in sizes):
                for together in _parts(members, most):
                    launched.append((together, self._start_alike([chunks[i] for i in together], sizes)))
            else:
                others += members
        if others:
            launched.append((others, self._start_without_graphs([chunks[i] for i in others])))

        def finish() -> list[tuple[Floats, Floats]]:
            decoded = {i: each for members, wait in launched for i, each in zip(members, wait(), strict=True)}
            return [decoded[i] for i in range(len(chunks))]

        return finish

    def _start_alike(self, chunks: Sequence[Chunk], sizes: Sequence[int]) -> Decoded:
        """Chunks of one length, in pieces of these frames, for which there are graphs: each finds on the GPU what the one before left."""
        n_rows, last = len(chunks), None
        states = [chunk.state for chunk in chunks]
        heard: list[Callable[[], Floats]] = []
        for size, end in zip(sizes, np.cumsum(sizes), strict=True):
            batch = self._batches[_shape(n_rows, size)]
            codes = [chunk.codes[:, end - size : end] for chunk in chunks]
            batch.send(codes, states) if last is None else batch.send_behind(codes, last)
            batch.graph.replay()
            heard.append(download(batch.audio[:n_rows]))  # before the next one, whose memory it is, too
            last = batch
        assert last is not None, "a chunk has a frame"
        next_states = download(last.next_states[:n_rows])
        return lambda: list(zip(np.concatenate([wait() for wait in heard], axis=1), next_states(), strict=True))

    def _start_without_graphs(self, chunks: Sequence[Chunk]) -> Decoded:
        """Chunks some of whose pieces have none."""
        states = list(upload(np.stack([chunk.state for chunk in chunks])))
        # Of each chunk's pieces: what waits for a batch's samples, and which of its rows is the piece's
        heard: list[list[tuple[Callable[[], Floats], int]]] = [[] for _ in chunks]
        left = {i: self._pieces(chunk.codes) for i, chunk in enumerate(chunks)}
        while left := {i: pieces for i, pieces in left.items() if pieces}:
            alike: dict[int, list[int]] = defaultdict(list)
            for i, pieces in left.items():
                alike[pieces[0].shape[1]].append(i)
            for n_frames, members in alike.items():
                for batch in _parts(members, self._most_rows.get(n_frames, self.max_batch)):
                    codes = np.stack([left[i].pop(0) for i in batch])
                    samples, next_states = self._launch(codes, torch.stack([states[i] for i in batch]))
                    for row, i in enumerate(batch):
                        heard[i].append((samples, row))
                        states[i] = next_states[row]
        last = download(torch.stack(states))

        def finish() -> list[tuple[Floats, Floats]]:
            return [
                (np.concatenate([samples()[row] for samples, row in parts]), state)
                for parts, state in zip(heard, last(), strict=True)
            ]

        return finish

    def _pieces(self, codes: Ints) -> list[Ints]:
        """codes [K, n] cut as `_sizes` says."""
        sizes = self._sizes(codes.shape[1])
        return [codes[:, end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]

    def _sizes(self, n: int) -> list[int]:
        """Frames of the longest pieces of a chunk of n for which there are graphs. What is left over is a piece of its own, with all that
        is shorter than the longest graph: without one a piece takes as long as it takes to launch, whatever its length. A stream that
        begins with less than the first convolution sees mirrored is one piece too."""
        lengths = sorted(self._most_rows, reverse=True)
        if not lengths:
            return [n]
        sizes, rest = [lengths[0]] * (n // lengths[0]), n % lengths[0]
        parts, left = [], rest
        for length in lengths:
            parts += [length] * (left // length)
            left %= length
        sizes += [rest] if left else parts
        return [n] if sizes and sizes[0] < min(n, self.layout.kernel_size) else sizes

    def _launch(self, codes: Ints, states: Tensor) -> tuple[Callable[[], Floats], Tensor]:
        """codes [B, K, n], states [B, N] -> what waits for samples [B, samples_per_frame n]; next states [B, N]."""
        n_rows, batch = len(codes), self._batches.get(_shape(*codes.shape[::2]))
        with torch.inference_mode():
            samples, next_states = batch.run(codes, states) if batch else self._decoder(upload(codes), states)
            return download(samples[:n_rows]), next_states[:n_rows].clone()  # a graph's memory is its next run's, too


def _parts(members: list[int], most: int) -> list[list[int]]:
    """At most so many together."""
    return [members[i : i + most] for i in range(0, len(members), most)]


def _shape(n_rows: int, n_frames: int) -> tuple[int, int]:
    """Of the graph for so many chunks of so many frames."""
    return 1 << (n_rows - 1).bit_length(), n_frames


class Decoder(nn.Module):
    """Twin of `export/codec.py`, which see; float32, [B, C, T]."""

    def __init__(self, weights: Mapping[str, np.ndarray], layout: CodecLayout, device: str = "cuda"):
        super().__init__()
        self.layout, self.parts = layout, state_parts(layout)
        self.shapes = {part.name: part.shape for part in self.parts}
        self.weights = {
            name: torch.from_numpy(np.array(x)).to(device)
            for name, x in weights.items()
            if name.startswith(("decoder.", "quantizer."))
        }
        n_layers, width = self.shapes["layers.1.h"]
        lstm_weights = _lstm_weights(self.weights, n_layers)
        fast = device == "cuda" and Lstm.fits(width, n_layers)
        self.lstm = Lstm(lstm_weights) if fast else PlainLstm(lstm_weights, n_layers)

    def forward(self, codes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """codes [B, K, n], state [B, N] -> samples [B, samples_per_frame n], next state [B, N]"""
        a = self.layout
        parts = zip(self.parts, state.split([part.size for part in self.parts], 1), strict=True)
        self.carried = {part.name: piece.reshape(-1, *part.shape) for part, piece in parts}
        self.started = self.carried["started"].bool()[:, :, None]  # [B, 1, 1]
        self.next = {"started": torch.ones_like(self.carried["started"])}
        x = self._lstm(self._conv(self._embed(codes), "layers.0"))
        layer = 2
        for ratio in a.upsampling_ratios:
            x = self._upsample(F.elu(x), f"layers.{layer + 1}", ratio)
            for j in range(a.n_residual_layers):
                x = self._residual(x, f"layers.{layer + 2 + j}", a.dilation_growth**j)
            layer += 2 + a.n_residual_layers
        x = self._conv(F.elu(x), f"layers.{layer + 1}")
        return x[:, 0], torch.cat([self.next[part.name].flatten(1) for part in self.parts], 1)

    def _embed(self, codes: Tensor) -> Tensor:
        tables = [self.weights[f"quantizer.layers.{k}.codebook.embed"] for k in range(self.layout.n_codebooks)]
        embedded = [F.embedding(codes[:, k], table) for k, table in enumerate(tables)]
        return torch.stack(embedded).sum(0).transpose(1, 2)

    def _with_context(self, x: Tensor, name: str, start: Tensor | None = None) -> Tensor:
        """x after the inputs that came before it; `start` stands for them at a stream's beginning (None: zeros)."""
        context = self.carried[name]
        if start is not None:
            context = torch.where(self.started, context, start)
        joined = torch.cat([context, x], 2)
        self.next[name] = joined[:, :, -context.shape[2] :]
        return joined

    def _conv(self, x: Tensor, name: str, dilation: int = 1) -> Tensor:
        if name in self.shapes:
            x = self._with_context(x, name, start=_reflected(x, self.shapes[name][1]))
        weight, bias = (self.weights[f"decoder.{name}.conv.{kind}"] for kind in ("weight", "bias"))
        return F.conv1d(x, weight, bias, dilation=dilation)

    def _upsample(self, x: Tensor, name: str, ratio: int) -> Tensor:
        weight, bias = (self.weights[f"decoder.{name}.conv.{kind}"] for kind in ("weight", "bias"))
        return F.conv_transpose1d(self._with_context(x, name), weight, bias, stride=ratio)[:, :, ratio:-ratio]

    def _residual(self, x: Tensor, name: str, dilation: int) -> Tensor:
        inner = self._conv(F.elu(x), f"{name}.block.1", dilation)
        inner = self._conv(F.elu(inner), f"{name}.block.3")
        return inner + (self._conv(x, f"{name}.shortcut") if self.layout.use_conv_shortcut else x)

    def _lstm(self, x: Tensor) -> Tensor:
        h, c = self.carried["layers.1.h"], self.carried["layers.1.c"]
        y, self.next["layers.1.h"], self.next["layers.1.c"] = self.lstm(x.permute(2, 0, 1), h, c)
        return y.permute(1, 2, 0) + x


class PlainLstm(nn.Module):
    """Twin of kernels/lstm.py for any size and device."""

    def __init__(self, weights: Mapping[str, Tensor], n_layers: int):
        """weights: by nn.LSTM's names."""
        super().__init__()
        device, width = weights["weight_hh_l0"].device, weights["weight_hh_l0"].shape[1]
        self.lstm = nn.LSTM(width, width, n_layers).to(device).requires_grad_(False)
        self.lstm.load_state_dict(weights)
        self.lstm.flatten_parameters()

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Lstm.__call__."""
        start = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        y, (h, c) = self.lstm(x.contiguous(), start)
        return y, h.transpose(0, 1), c.transpose(0, 1)


class _Batch:
    """A graph that decodes n_rows chunks of n_frames, and the memory it works on."""

    def __init__(self, decoder: Decoder, n_rows: int, n_frames: int):
        layout = decoder.layout
        self._inputs = Inputs(
            codes=((n_rows, layout.n_codebooks, n_frames), torch.int32),
            states=((n_rows, state_size(layout)), torch.float32),
        )
        self.codes, self.states = self._inputs["codes"], self._inputs["states"]
        with torch.inference_mode():
            self.graph = capture(lambda: self._decode(decoder))

    def _decode(self, decoder: Decoder) -> None:
        self.audio, self.next_states = decoder(self.codes, self.states)

    def send(self, codes: Sequence[Ints], states: Sequence[Floats]) -> None:
        """What the graph decodes next. Rows beyond those given are zeros."""

        def fill(inputs: dict[str, np.ndarray]) -> None:
            inputs["codes"][len(codes) :], inputs["states"][len(codes) :] = 0, 0.0
            for i, (ids, state) in enumerate(zip(codes, states, strict=True)):
                inputs["codes"][i], inputs["states"][i] = ids, state

        self._inputs.send(fill)

    def send_behind(self, codes: Sequence[Ints], last: _Batch) -> None:
        """The same where the states are those that a batch of as many rows, which was launched last, leaves."""
        self.send(codes, [NO_STATE] * len(codes))
        copy(last.next_states, self.states)

    def run(self, codes: Ints, states: Tensor) -> tuple[Tensor, Tensor]:
        """The same for states that are on the GPU: samples and next states, until the next run."""
        upload(codes, self.codes[: len(codes)])
        self.states[: len(states)].copy_(states)
        self.graph.replay()
        return self.audio, self.next_states


def _reflected(x: Tensor, n: int) -> Tensor:
    """x[n], ..., x[1]: what reflect padding puts before x. A shorter x counts as followed by zeros."""
    return F.pad(x[:, :, : n + 1], (0, n))[:, :, 1 : n + 1].flip(2)


def _lstm_weights(named: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """PyTorch's names and order of gates (i f g o) from ONNX's (i o f c)."""

    def reordered(x: Tensor) -> Tensor:
        i, o, f, c = x.chunk(4)
        return torch.cat([i, f, c, o])

    weights: dict[str, Tensor] = {}
    for layer in range(n_layers):
        w, r, b = (named[f"decoder.layers.1.lstm.{kind}{layer}"][0] for kind in "WRB")
        weights[f"weight_ih_l{layer}"], weights[f"weight_hh_l{layer}"] = reordered(w), reordered(r)
        weights[f"bias_ih_l{layer}"], weights[f"bias_hh_l{layer}"] = map(reordered, b.chunk(2))
    return weights
