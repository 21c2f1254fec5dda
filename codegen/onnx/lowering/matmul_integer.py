"""Products in int8 in nodes that a runtime has: u8 activations times u8 or s8 weights, as the processor likes it.

Symmetric activations are moved by 128; those with a zero point z are u8 by themselves. ONNX Runtime multiplies u8 x s8
by 8-bit dot products where a processor has them (VNNI, AMX), 2.5 times as fast as u8 x u8. Where it has none (AVX2,
AVX-512 of before), u8 x s8 are added two by two in 16 bits, too few for pairs of large ones: wrong without a word. So a
file asks the processor: it holds one such product of constants with its true result (`exactness`), and each product is
an `If` on whether they agree. ONNX Runtime computes that when it opens the file and keeps the one branch (constant
folding); elsewhere the same file is right as well. What ONNX Runtime writes after opening it is for this processor
only. A portable file has u8 x u8.

Weights are s8; u8 is made of them inside the branch that wants it, so that the other processors never hold both. Those
that want it hold it once for each product: a weight that several read, or that stands in both ways of a file, twice.

Where all of x has one z, the operators take it. They take none for each row, where
(q - z) @ w = (q - 128) @ w + (128 - z) sum(w), with the sums in the file; 128, because z is often near it and the
second part small. x has at least one row: of none, ONNX Runtime's minimum and maximum for each row have another shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompile.codegen.onnx.lowering.node_builder import DOMAIN, Steps

BOOL = TensorProto.BOOL
_TINY = 1e-30  # a smaller range is zero, and a step of zero would make 0 / 0 of it


@dataclass(frozen=True)
class IntegerWeight:
    """Names of values, and a size.

    Attributes:
        k: K. codes: [K, N], s8; of a portable file u8, around 128. scale: [N].
        sums: scales times sums over K ("": activations are symmetric).
    """

    k: int
    codes: str
    scale: str
    sums: str = ""


def exactness(constant: Callable[[np.ndarray], str]) -> list[onnx.NodeProto]:
    """Nodes, the last of which makes whether this processor's sums of u8 times s8 are true."""
    do, k = Steps("processor"), 64
    largest = constant(np.full((4, k), 255, np.uint8)), constant(np.full((k, 16), 127, np.int8))
    true = constant(np.array(k * 255 * 127, np.int32))
    agree = do("agree", "Equal", do("sums", "MatMulInteger", *largest), true)
    least = do("least", "ReduceMin", do("counts", "Cast", agree, to=TensorProto.INT32), keepdims=0)
    do("exact", "Cast", least, to=BOOL)
    return do.nodes


EXACT = "/".join((DOMAIN, "processor", "exact"))


def inexact(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy as a processor whose sums of u8 times s8 are not true runs it; None: it is the same for all."""
    found = copy.deepcopy(model)
    for node in found.graph.node:
        if node.output[0] == EXACT:
            node.CopyFrom(helper.make_node("Constant", [], [EXACT], value=helper.make_tensor("no", BOOL, [], [False])))
            return found
    return None


@dataclass(frozen=True)
class Int8Product:
    """Writes one product. do: where to. constant: the name of a constant. portable: by operators of the standard."""

    do: Steps
    constant: Callable[[np.ndarray], str]
    portable: bool

    def multiply(self, x: str, weight: IntegerWeight, per_row: bool) -> None:
        """x [.., K] rounded in steps of its own, one for each row or for all, times a weight: [.., N]."""
        if not per_row:
            self._in_one_step(x, weight)
        elif weight.sums:
            self._from_zero_points(x, weight)
        else:
            self._in_steps(x, weight)

    def _in_one_step(self, x: str, weight: IntegerWeight) -> None:
        do = self.do
        if weight.sums:
            codes = do("codes", "DynamicQuantizeLinear", x)
            step, zero = do.also("step"), do.also("zero")
        else:
            low, high = do("least", "ReduceMin", x, keepdims=0), do("greatest", "ReduceMax", x, keepdims=0)
            step, zero = self._step(self._size(low, high), 127), self._u8(128)
            codes = do("codes", "QuantizeLinear", x, step, zero)
        self._product(codes, step, zero, weight)

    def _in_steps(self, x: str, weight: IntegerWeight) -> None:
        """A step for each row; multiplied by after, as the operators take one for all rows."""
        do = self.do
        step = self._step(self._size(*self._extremes(x)), 127)
        product = self._product(self._codes(x, step, weight.k), self._float(1), self._u8(128), weight)
        do("y", "Mul", product, step)

    def _from_zero_points(self, x: str, weight: IntegerWeight) -> None:
        """A step and a zero point for each row: q = round(x / s) + z, z = round(-min(x, 0) / s)."""
        do, none = self.do, self._float(0)
        least, greatest = self._extremes(x)
        low, high = do("low", "Min", least, none), do("high", "Max", greatest, none)
        step = self._step(do("range", "Sub", high, low), 255)
        minus_z = do("minus_z", "Round", do("depth", "Div", low, step))
        zero = do("zero", "Cast", do("z", "Neg", minus_z), to=TensorProto.UINT8)
        product = self._product(self._codes(x, step, weight.k, zero), self._float(1), self._u8(128), weight)
        rest = do("rest", "Mul", do("behind", "Add", minus_z, self._float(128)), weight.sums)
        do("y", "Mul", do("sum", "Add", product, rest), step)

    def _extremes(self, x: str) -> tuple[str, str]:
        """The least and the greatest of each row."""
        return self.do("least", "ReduceMin", x, self._last()), self.do("greatest", "ReduceMax", x, self._last())

    def _size(self, low: str, high: str) -> str:
        """The largest |x|, of the extremes: reading x twice is faster than writing |x|."""
        return self.do("size", "Max", high, self.do("depth", "Neg", low))

    def _codes(self, x: str, step: str, k: int, zero: str = "") -> str:
        """round(x / step) + zero, both [.., 1], or + 128: the operator's blocks are whole rows.

        Runtimes that read the standard may not have the blocks: a portable file divides, and rounds in steps of one.
        """
        do = self.do
        if not self.portable:
            zeros = do("zeros", "Expand", zero or self._u8(128), do("steps_shape", "Shape", step))
            return do("codes", "QuantizeLinear", x, step, zeros, axis=-1, block_size=k)
        units = do("units", "Div", x, step)
        if not zero:
            return do("codes", "QuantizeLinear", units, self._float(1), self._u8(128))
        levels = do("levels", "Add", do("whole", "Round", units), do("z_of_row", "Cast", zero, to=TensorProto.FLOAT))
        return do("codes", "QuantizeLinear", levels, self._float(1), self._u8(0))

    def _step(self, size: str, levels: int) -> str:
        share = self.do("share", "Mul", size, self._float(1 / levels))
        return self.do("step", "Max", share, self._float(_TINY / levels))

    def _product(self, codes: str, step: str, zero: str, weight: IntegerWeight) -> str:
        """(codes - zero) @ weight, times the step and the weight's scales."""
        do, middle = self.do, self._u8(128)
        if self.portable:
            integers = do("integers", "MatMulInteger", codes, weight.codes, zero, middle)
            scales = do("scales", "Mul", weight.scale, step)
            return do("product", "Mul", do("numbers", "Cast", integers, to=TensorProto.FLOAT), scales)
        names = dict(then_branch="s8", else_branch="u8")
        branches = {side: self._branch(kind, codes, step, zero, weight) for side, kind in names.items()}
        return do("product", "If", EXACT, **branches)

    def _branch(self, kind: str, codes: str, step: str, zero: str, weight: IntegerWeight) -> onnx.GraphProto:
        do = Steps(f"{self.do.name}/{kind}")
        inputs = [codes, weight.codes, step, weight.scale, zero]
        if kind == "u8":  # negative codes wrap, and so does the sum
            wrapped = do("wrapped", "Cast", weight.codes, to=TensorProto.UINT8)
            inputs[1] = do("unsigned_codes", "Add", wrapped, self._u8(128))
            inputs.append(self._u8(128))
        out = do("product", "MatMulIntegerToFloat", *inputs, domain="com.microsoft")
        return helper.make_graph(do.nodes, kind, [], [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)])

    def _last(self) -> str:
        return self._whole(-1)

    def _whole(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def _float(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def _u8(self, value: int) -> str:
        return self.constant(np.array(value, np.uint8))
