"""A tape on which an ONNX graph reads like NumPy: `g.Add(x, g.MatMul(y, w))`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
INT8_BLOCK = 32  # inputs that share one scale

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32
Operand = ir.Value | np.ndarray | int | float | Sequence[int] | None
Shape = Sequence[int | str]  # a string names a size that varies


class Graph:
    """Records one model. An attribute is an operator; lists and numbers among its operands become int64 constants.

    weights: the stage's tensors by Hugging Face name. int8: write `linear` weights in 8 bits.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], int8: bool = False) -> None:
        self.weights, self.int8 = weights, int8
        self._tape = Tape()
        self._constants: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        def record(*operands: Operand, domain: str = "", n_outputs: int = 1, **attributes: Any) -> Any:
            inputs = [self._operand(x) for x in operands]
            outputs = self._tape.op_multi_out(operator, inputs, attributes, domain=domain, num_outputs=n_outputs)
            return outputs[0] if n_outputs == 1 else outputs

        return record

    def input(self, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
        self._inputs.append(ir.val(name, dtype, shape))
        return self._inputs[-1]

    def output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: Shape) -> None:
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        self._outputs.append(value)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A named initializer; the same name twice is the same tensor. A transpose is copied only on saving."""
        if name not in self._constants:
            self._constants[name] = self._tape.initializer(ir.tensor(array, name=name))
        return self._constants[name]

    def weight(self, name: str) -> ir.Value:
        return self.constant(name, self.weights[name])

    def linear(self, x: ir.Value, name: str, rows: np.ndarray | slice = slice(None)) -> ir.Value:
        """x @ weight.T (+ bias), weight [out, in] being `<name>.weight`, only its `rows` if given.

        In the file the matrix lies transposed, [in, out], as `<name>.weight.T`; with int8 as `<name>.weight.int8`.
        """
        weight = self.weights[f"{name}.weight"][rows]
        y = (
            self._int8_product(x, name, weight)
            if self.int8
            else self.MatMul(x, self.constant(f"{name}.weight.T", weight.T))
        )
        return self.Add(y, self.weight(f"{name}.bias")) if f"{name}.bias" in self.weights else y

    def layer_norm(self, x: ir.Value, name: str) -> ir.Value:
        bias = [self.weight(f"{name}.bias")] if f"{name}.bias" in self.weights else []
        return self.LayerNormalization(x, self.weight(f"{name}.weight"), *bias, epsilon=1e-5)

    def model(self, name: str) -> ir.Model:
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=OPSETS,
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION)

    def _operand(self, x: Operand) -> ir.Value | None:
        if x is None or isinstance(x, ir.Value):
            return x
        array = np.asarray(
            x, x.dtype if isinstance(x, np.ndarray) else np.float32 if isinstance(x, float) else np.int64
        )
        return self.constant(f"{array.dtype}{array.tolist()}".replace(" ", ""), array)

    def _int8_product(self, x: ir.Value, name: str, weight: np.ndarray) -> ir.Value:
        packed, scales = quantize_int8(weight)
        return self.MatMulNBits(
            x,
            self.constant(f"{name}.weight.int8", packed),
            self.constant(f"{name}.weight.scale", scales),
            domain="com.microsoft",
            K=weight.shape[1],
            N=weight.shape[0],
            bits=8,
            block_size=INT8_BLOCK,
            accuracy_level=4,  # 4: int8 activations too, the fast kernels
        )


def quantize_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight [out, in] -> bytes [out, blocks, 32] and scales [out, blocks]: value = (byte - 128) * scale, symmetric."""
    n_out, n_in = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -n_in % INT8_BLOCK))).reshape(n_out, -1, INT8_BLOCK)
    scales = np.abs(padded).max(-1) / 127
    steps = np.rint(padded / np.maximum(scales, np.finfo(np.float32).tiny)[..., None])
    return (steps + 128).astype(np.uint8), scales.astype(np.float32)
