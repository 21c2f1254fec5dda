"""Products in int8, u8 x u8, in nodes that a runtime has.

Weights and symmetric activations are moved by 128; activations with a zero point z are u8 by themselves. Where all of x
has one z, the operators take it. They take none for each row, where (q - z) @ w = (q - 128) @ w + (128 - z) sum(w),
with the sums in the file; 128, because z is often near it and the second part small. x has at least one row: of none,
ONNX Runtime's minimum and maximum for each row have another shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from qcompile.codegen.onnx.steps import Steps

_TINY = 1e-30  # a smaller range is zero, and a step of zero would make 0 / 0 of it


@dataclass(frozen=True)
class Weight:
    """Names of values: u8 [K, N], scales [N], and scales times sums over K ("" if activations are symmetric)."""

    codes: str
    scale: str
    sums: str = ""


@dataclass(frozen=True)
class Int8Product:
    """Writes one product. do: where to. constant: the name of a constant. portable: by operators of the standard."""

    do: Steps
    constant: Callable[[np.ndarray], str]
    portable: bool

    def multiply(self, x: str, weight: Weight, per_row: bool) -> None:
        """x [.., K] rounded in steps of its own, one for each row or for all, times a weight: [.., N]."""
        if not per_row:
            self._in_one_step(x, weight)
        elif weight.sums:
            self._from_zero_points(x, weight)
        else:
            self._in_steps(x, weight)

    def _in_one_step(self, x: str, weight: Weight) -> None:
        do = self.do
        if weight.sums:
            codes = do("codes", "DynamicQuantizeLinear", x)
            step, zero = do.also("step"), do.also("zero")
        else:
            peak = do("peak", "ReduceMax", do("size", "Abs", x), keepdims=0)
            step, zero = self._step(peak, 127), self._u8(128)
            codes = do("codes", "QuantizeLinear", x, step, zero)
        self._product(codes, step, zero, weight)

    def _in_steps(self, x: str, weight: Weight) -> None:
        """A step for each row: divided by before, multiplied by after, as the operators take one for all rows."""
        do, one = self.do, self._float(1)
        step = self._step(do("peak", "ReduceMax", do("size", "Abs", x), self._last()), 127)
        codes = do("codes", "QuantizeLinear", do("units", "Div", x, step), one, self._u8(128))
        do("y", "Mul", self._product(codes, one, self._u8(128), weight), step)

    def _from_zero_points(self, x: str, weight: Weight) -> None:
        """A step and a zero point for each row: q = round(x / s) + z, z = round(-min(x, 0) / s)."""
        do, one, none = self.do, self._float(1), self._float(0)
        low = do("low", "Min", do("least", "ReduceMin", x, self._last()), none)
        high = do("high", "Max", do("greatest", "ReduceMax", x, self._last()), none)
        step = self._step(do("range", "Sub", high, low), 255)
        minus_z = do("minus_z", "Round", do("depth", "Div", low, step))
        levels = do("levels", "Sub", do("whole", "Round", do("units", "Div", x, step)), minus_z)
        codes = do("codes", "QuantizeLinear", levels, one, self._u8(0))
        product = self._product(codes, one, self._u8(128), weight)
        rest = do("rest", "Mul", do("behind", "Add", minus_z, self._float(128)), weight.sums)
        do("y", "Mul", do("sum", "Add", product, rest), step)

    def _step(self, size: str, levels: int) -> str:
        share = self.do("share", "Mul", size, self._float(1 / levels))
        return self.do("step", "Max", share, self._float(_TINY / levels))

    def _product(self, codes: str, step: str, zero: str, weight: Weight) -> str:
        """(codes - zero) @ (weight - 128), times the step and the weight's scales."""
        do, middle = self.do, self._u8(128)
        if not self.portable:
            inputs = (codes, weight.codes, step, weight.scale, zero, middle)
            return do("product", "MatMulIntegerToFloat", *inputs, domain="com.microsoft")
        integers = do("integers", "MatMulInteger", codes, weight.codes, zero, middle)
        scales = do("scales", "Mul", weight.scale, step)
        return do("product", "Mul", do("numbers", "Cast", integers, to=TensorProto.FLOAT), scales)

    def _last(self) -> str:
        return self.constant(np.array([-1], np.int64))

    def _float(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def _u8(self, value: int) -> str:
        return self.constant(np.array(value, np.uint8))
