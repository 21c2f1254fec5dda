"""Matmuls on low-bit codes: MatMulNBits, or in standard operators DequantizeLinear and MatMul.

ONNX Runtime makes one MatMulNBits of the latter two when it opens a file.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.codegen.onnx.lowering.constants import reinterpret
from qcompile.codegen.onnx.lowering.op_inputs import CONTRIB, BlockedLinear, DualLinear, MatMulNBits


def matmul_nbits(tape: Tape, node: ir.Node) -> ir.Value:
    """A DualLinear as MatMulNBits: float activations, at accuracy level 1, which variants.py may raise."""
    dual = DualLinear.of(node)
    inputs = MatMulNBits(dual.x, dual.codes, dual.scales, dual.zero_points, None, dual.bias)
    attributes = {name: node.attributes[name] for name in ("K", "N", "bits", "block_size")} | {"accuracy_level": 1}
    return tape.op("MatMulNBits", inputs.as_list(), attributes, domain=CONTRIB)


def dequantize_matmul(tape: Tape, node: ir.Node) -> ir.Value:
    """A BlockedLinear as x @ DequantizeLinear(codes [K, N]) + bias."""
    linear = BlockedLinear.of(node)
    k, bits, block = (node.attributes[name].as_int() for name in ("K", "bits", "block_size"))
    (blocks, n), dtype = linear.scales.const_value.shape, ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8
    codes, zeros = reinterpret(linear.codes, [k, n], dtype), reinterpret(linear.zero_points, [blocks, n], dtype)
    weight = tape.op("DequantizeLinear", [codes, linear.scales, zeros], {"axis": 0, "block_size": block})
    return with_bias(tape, tape.op("MatMul", [linear.x, weight]), linear.bias)


def with_bias(tape: Tape, y: ir.Value, bias: ir.Value | None) -> ir.Value:
    """Y + bias [N]."""
    return y if bias is None else tape.op("Add", [y, bias])
