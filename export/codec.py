"""EnCodec's decoder as an ONNX graph with explicit state, so that chunks decode to the same samples as the whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from barkstream.export.codec_state import state_parts, state_size
from barkstream.export.graph import FLOAT, INT32, Graph
from barkstream.tokens import CodecLayout

END = np.iinfo(np.int64).max


def codec_model(weights: Mapping[str, np.ndarray], layout: CodecLayout) -> ir.Model:
    """Inputs: codes [B, K, n], state [B, N] (zeros start a stream).

    Outputs: audio [B, samples_per_frame * n], next_state [B, N].

    The first chunk of a stream has at least `min_first_chunk` frames, unless it is the whole stream.
    """
    return Decoder(Graph(weights), layout).build()


class Decoder:
    """Hugging Face's `EncodecDecoder`, layer by layer. Activations are [B, C, T]."""

    def __init__(self, g: Graph, layout: CodecLayout) -> None:
        self.g, self.layout = g, layout
        self.parts = {part.name: part for part in state_parts(layout)}
        ends = np.cumsum([part.size for part in self.parts.values()]).tolist()
        self.spans = dict(zip(self.parts, zip([0, *ends[:-1]], ends, strict=True), strict=True))
        self.next: dict[str, ir.Value] = {}

    def build(self) -> ir.Model:
        g, a = self.g, self.layout
        codes = g.input("codes", INT32, ["batch", a.n_codebooks, "frames"])
        self.state = g.input("state", FLOAT, ["batch", state_size(a)])
        self.started = g.Cast(self._carried("started"), to=ir.DataType.BOOL)  # [B, 1]
        self.next["started"] = g.Add(g.Mul(self._carried("started"), 0.0), 1.0)
        x = self._lstm(self._conv(self._embed(codes), "layers.0"))
        layer = 2
        for ratio in a.upsampling_ratios:
            x = self._upsample(g.Elu(x), f"layers.{layer + 1}", ratio)
            for j in range(a.n_residual_layers):
                x = self._residual(x, f"layers.{layer + 2 + j}", a.dilation_growth**j)
            layer += 2 + a.n_residual_layers
        x = self._conv(g.Elu(x), f"layers.{layer + 1}")
        g.output("audio", g.Squeeze(x, [1]), FLOAT, ["batch", "samples"])
        g.output(
            "next_state", g.Concat(*[self.next[name] for name in self.parts], axis=1), FLOAT, ["batch", state_size(a)]
        )
        return g.model("bark_codec")

    def _embed(self, codes: ir.Value) -> ir.Value:
        """[B, K, n] -> [B, codebook_width, n]: the sum over the residual quantizers."""
        g = self.g
        embeds = [
            g.Gather(g.weight(f"quantizer.layers.{k}.codebook.embed"), g.Gather(codes, np.array(k), axis=1))
            for k in range(self.layout.n_codebooks)
        ]
        return g.Transpose(g.Sum(*embeds), perm=[0, 2, 1])

    def _carried(self, name: str) -> ir.Value:
        """A part of the state, flat: [B, size]."""
        start, end = self.spans[name]
        return self.g.Slice(self.state, [start], [end], [1])

    def _with_context(self, x: ir.Value, name: str, start: ir.Value | None = None) -> ir.Value:
        """x after the inputs that came before it; `start` stands for them at a stream's beginning (None: zeros)."""
        g, (channels, n) = self.g, self.parts[name].shape
        context = g.Reshape(self._carried(name), [-1, channels, n])
        if start is not None:
            context = g.Where(g.Unsqueeze(self.started, [2]), context, start)
        joined = g.Concat(context, x, axis=2)
        self.next[name] = g.Reshape(g.Slice(joined, [-n], [END], [2]), [-1, channels * n])
        return joined

    def _reflected(self, x: ir.Value, n: int) -> ir.Value:
        """x[n], ..., x[1]: what reflect padding puts before x. A shorter x counts as followed by zeros."""
        extended = self.g.Pad(self.g.Slice(x, [0], [n + 1], [2]), [0, 0, 0, 0, 0, n])
        return self.g.Slice(extended, [n], [0], [2], [-1])

    def _conv(self, x: ir.Value, name: str, dilation: int = 1) -> ir.Value:
        g, conv = self.g, f"decoder.{name}.conv"
        if name in self.parts:
            x = self._with_context(x, name, start=self._reflected(x, self.parts[name].shape[1]))
        return g.Conv(x, g.weight(f"{conv}.weight"), g.weight(f"{conv}.bias"), dilations=[dilation])

    def _upsample(self, x: ir.Value, name: str, ratio: int) -> ir.Value:
        """Transposed convolution of kernel 2 * ratio: a frame reaches `ratio` samples into the next one's."""
        g, conv = self.g, f"decoder.{name}.conv"
        x = self._with_context(x, name)
        x = g.ConvTranspose(x, g.weight(f"{conv}.weight"), g.weight(f"{conv}.bias"), strides=[ratio])
        return g.Slice(x, [ratio], [-ratio], [2])

    def _residual(self, x: ir.Value, name: str, dilation: int) -> ir.Value:
        g = self.g
        inner = self._conv(g.Elu(x), f"{name}.block.1", dilation)
        inner = self._conv(g.Elu(inner), f"{name}.block.3")
        return g.Add(self._conv(x, f"{name}.shortcut") if self.layout.use_conv_shortcut else x, inner)

    def _lstm(self, x: ir.Value) -> ir.Value:
        g, skip = self.g, x
        n_layers, width = self.parts["layers.1.h"].shape
        h0, c0 = (g.Reshape(self._carried(f"layers.1.{s}"), [-1, n_layers, width]) for s in "hc")
        x, hs, cs = g.Transpose(x, perm=[2, 0, 1]), [], []  # [T, B, C]
        for i in range(n_layers):
            start = [g.Transpose(g.Slice(s, [i], [i + 1], [1]), perm=[1, 0, 2]) for s in (h0, c0)]
            x, h, c = g.LSTM(x, *self._lstm_weights(i), None, *start, hidden_size=width, n_outputs=3)
            x = g.Squeeze(x, [1])
            hs.append(g.Squeeze(h, [0]))
            cs.append(g.Squeeze(c, [0]))
        self.next["layers.1.h"], self.next["layers.1.c"] = g.Concat(*hs, axis=1), g.Concat(*cs, axis=1)
        return g.Add(g.Transpose(x, perm=[1, 2, 0]), skip)

    def _lstm_weights(self, layer: int) -> list[ir.Value]:
        """W, R and B of one layer: PyTorch orders the gates i f g o, ONNX i o f c."""

        def reordered(kind: str) -> np.ndarray:
            i, f, c, o = np.split(self.g.weights[f"decoder.layers.1.lstm.{kind}_l{layer}"], 4)
            return np.concatenate([i, o, f, c])[None]

        arrays = [
            reordered("weight_ih"),
            reordered("weight_hh"),
            np.concatenate([reordered("bias_ih"), reordered("bias_hh")], 1),
        ]
        return [
            self.g.constant(f"decoder.layers.1.lstm.{kind}{layer}", x) for kind, x in zip("WRB", arrays, strict=True)
        ]
