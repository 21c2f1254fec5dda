"""int8 matmuls as nodes that a runtime has: u8 activations times u8 or s8 weights, as the processor likes it.

Symmetric activations are shifted by 128; those with a zero point z are u8 by themselves. ONNX Runtime multiplies
u8 x s8 by 8-bit dot products where a processor has them (VNNI, AMX), 2.5 times as fast as u8 x u8. Where it has none
(AVX2, older AVX-512), u8 x s8 are added two by two in 16 bits, too few for pairs of large ones: wrong without a word.
So a file asks the processor: it holds one such matmul of constants with its true result (`exactness`), and each matmul
is an `If` on whether they agree. ONNX Runtime computes that when it opens the file and keeps the one branch (constant
folding); elsewhere the same file is right as well. What ONNX Runtime writes after opening it is for this processor
only. A file of standard operators has u8 x u8.

Weights are s8 (int8_weight.py); u8 is made of them inside the branch that reads it, so that the other processors never
hold both. Those that read it hold it once for each matmul: a weight that several read, or that both variants of a file
read, twice.

Where all of x has one z, the operators take it. They take none for each row, where
(q - z) @ w = (q - 128) @ w + (128 - z) sum(w), with the sums in the file; 128, because z is often near it and the
second part small. x has at least one row: of none, ONNX Runtime's minimum and maximum for each row have another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.codegen.onnx.lowering.constants import Constants
from qcompile.codegen.onnx.lowering.graph_edits import make_branch, name_after, replace_node
from qcompile.codegen.onnx.lowering.int8_weight import Int8Weight
from qcompile.codegen.onnx.lowering.op_inputs import CONTRIB, DOMAIN

EXACT = f"{DOMAIN}/processor/exact"  # name of the value
_TINY = 1e-30  # a smaller range is zero, and a scale of zero would make 0 / 0 of it


def exactness(constants: Constants) -> Sequence[ir.Node]:
    """Nodes of constants, the last of which makes EXACT: whether this processor's sums of u8 times s8 are true."""
    tape, k = Tape(), 64
    largest = [constants.tensor(np.full((4, k), 255, np.uint8)), constants.tensor(np.full((k, 16), 127, np.int8))]
    true = constants.tensor(np.array(k * 255 * 127, np.int32))
    agree = tape.op("Equal", [tape.op("MatMulInteger", largest), true])
    least = tape.op("ReduceMin", [tape.op("Cast", [agree], {"to": ir.DataType.INT32})], {"keepdims": 0})
    tape.op("Cast", [least], {"to": ir.DataType.BOOL}, name="exact")
    name_after(tape.nodes, f"{DOMAIN}/processor")
    return tape.nodes


def for_inexact_processors(model: ir.Model) -> ir.Model | None:
    """A copy as a processor whose sums of u8 times s8 are not true runs it; None: it is the same for all."""
    copy = model.clone()
    for node in copy.graph:
        if node.outputs[0].name == EXACT:
            tape = Tape()
            no = tape.op("Constant", [], {"value": ir.tensor(np.array(False))})
            replace_node(node, tape, [no])
            return copy
    return None


@dataclass(frozen=True)
class Int8Matmul:
    """Writes int8 matmuls to a tape.

    Attributes:
        exact: whether u8 times s8 is exact (`exactness`); None: operators of the ONNX standard only.
    """

    tape: Tape
    constants: Constants
    exact: ir.Value | None

    def multiply(self, x: ir.Value, weight: Int8Weight, per_row: bool) -> ir.Value:
        """x [.., K], quantized with a scale for each row or one for all, times a weight: [.., N]."""
        if not per_row:
            return self._per_tensor(x, weight)
        return self._symmetric_rows(x, weight) if weight.sums is None else self._rows_with_zero_points(x, weight)

    def _per_tensor(self, x: ir.Value, weight: Int8Weight) -> ir.Value:
        if weight.sums is not None:
            codes, scale, zero = self.tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        else:
            low = self.tape.op("ReduceMin", [x], {"keepdims": 0})
            high = self.tape.op("ReduceMax", [x], {"keepdims": 0})
            scale, zero = self._scale(self._largest(low, high), 127), self.constants.uint8(128)
            codes = self.tape.op("QuantizeLinear", [x, scale, zero])
        return self._product(codes, scale, zero, weight)

    def _symmetric_rows(self, x: ir.Value, weight: Int8Weight) -> ir.Value:
        """Multiplied by the scales of the rows after, as the operators take one scale for all rows."""
        scale = self._scale(self._largest(*self._extremes(x)), 127)
        product = self._product_of_codes(self._quantize(x, scale, None, weight.k), weight)
        return self.tape.op("Mul", [product, scale])

    def _rows_with_zero_points(self, x: ir.Value, weight: Int8Weight) -> ir.Value:
        """q = round(x / s) + z, z = round(-min(x, 0) / s)."""
        op, none = self.tape.op, self.constants.float32(0)
        least, greatest = self._extremes(x)
        low, high = op("Min", [least, none]), op("Max", [greatest, none])
        scale = self._scale(op("Sub", [high, low]), 255)
        minus_z = op("Round", [op("Div", [low, scale])])
        zero = op("Cast", [op("Neg", [minus_z])], {"to": ir.DataType.UINT8})
        product = self._product_of_codes(self._quantize(x, scale, zero, weight.k), weight)
        correction = op("Mul", [op("Add", [minus_z, self.constants.float32(128)]), weight.sums])
        return op("Mul", [op("Add", [product, correction]), scale])

    def _extremes(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The least and the greatest of each row."""
        last = self.constants.int64(-1)
        return self.tape.op("ReduceMin", [x, last]), self.tape.op("ReduceMax", [x, last])

    def _largest(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """The largest |x|, of the extremes: reading x twice is faster than writing |x|."""
        return self.tape.op("Max", [high, self.tape.op("Neg", [low])])

    def _scale(self, size: ir.Value, levels: int) -> ir.Value:
        share = self.tape.op("Mul", [size, self.constants.float32(1 / levels)])
        return self.tape.op("Max", [share, self.constants.float32(_TINY / levels)])

    def _quantize(self, x: ir.Value, scale: ir.Value, zero: ir.Value | None, k: int) -> ir.Value:
        """round(x / scale) + zero, both [.., 1], or + 128: the operator's blocks are whole rows.

        Runtimes that know only the standard may not have blocks: there x is divided, and rounded with a scale of 1.
        """
        op, constants = self.tape.op, self.constants
        if self.exact is not None:
            shape = op("Shape", [scale])
            zeros = op("Expand", [constants.uint8(128) if zero is None else zero, shape])
            return op("QuantizeLinear", [x, scale, zeros], {"axis": -1, "block_size": k})
        units, one = op("Div", [x, scale]), constants.float32(1)
        if zero is None:
            return op("QuantizeLinear", [units, one, constants.uint8(128)])
        levels = op("Add", [op("Round", [units]), op("Cast", [zero], {"to": ir.DataType.FLOAT})])
        return op("QuantizeLinear", [levels, one, constants.uint8(0)])

    def _product_of_codes(self, codes: ir.Value, weight: Int8Weight) -> ir.Value:
        """(codes - 128) @ weight, times the weight's scales."""
        return self._product(codes, self.constants.float32(1), self.constants.uint8(128), weight)

    def _product(self, codes: ir.Value, scale: ir.Value, zero: ir.Value, weight: Int8Weight) -> ir.Value:
        """(codes - zero) @ weight, times the scale and the weight's scales."""
        op = self.tape.op
        if self.exact is None:
            integers = op("MatMulInteger", [codes, weight.codes, zero, self.constants.uint8(128)])
            scales = op("Mul", [weight.scale, scale])
            return op("Mul", [op("Cast", [integers], {"to": ir.DataType.FLOAT}), scales])
        inputs = [codes, weight.codes, scale, weight.scale, zero]
        return op("If", [self.exact], {"then_branch": self._s8(inputs), "else_branch": self._u8(inputs)})

    def _s8(self, inputs: list[ir.Value]) -> ir.Graph:
        tape = Tape()
        out = tape.op("MatMulIntegerToFloat", inputs, domain=CONTRIB)
        return make_branch("s8", tape, [out], [ir.DataType.FLOAT])

    def _u8(self, inputs: list[ir.Value]) -> ir.Graph:
        """Negative codes wrap, and so does the sum."""
        tape, middle = Tape(), self.constants.uint8(128)
        codes, weight, *scales_and_zero = inputs
        unsigned = tape.op("Add", [tape.op("Cast", [weight], {"to": ir.DataType.UINT8}), middle], name="unsigned")
        out = tape.op("MatMulIntegerToFloat", [codes, unsigned, *scales_and_zero, middle], domain=CONTRIB)
        return make_branch("u8", tape, [out], [ir.DataType.FLOAT])
