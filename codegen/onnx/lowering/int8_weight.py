"""int8 weights of matmuls: stored in the file, or computed from 4-bit codes by nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.codegen.onnx.lowering.constants import Constants, reinterpret
from qcompile.codegen.onnx.lowering.op_inputs import DualLinear, Int8Linear


@dataclass(frozen=True)
class Int8Weight:
    """An int8 weight.

    Attributes:
        k: K.
        codes: [K, N], int8; with standard operators uint8, the same plus 128.
        scale: float32 [N].
        sums: float32 [N], scale times the sums of the codes over K; None where activations are symmetric.
    """

    k: int
    codes: ir.Value
    scale: ir.Value
    sums: ir.Value | None = None

    @classmethod
    def stored(cls, node: ir.Node) -> Int8Weight:
        """The weight of an Int8Linear."""
        linear = Int8Linear.of(node)
        return cls(linear.weight.const_value.shape[0], linear.weight, linear.scale, linear.sums)

    @classmethod
    def computed(cls, tape: Tape, constants: Constants, node: ir.Node) -> Int8Weight:
        """s1 (q - z) [K, N] of a DualLinear, from its 4-bit codes [N, blocks, block_size / 2].

        By as few nodes as there can be: ONNX Runtime keeps all values until the last weight of a model is made.
        """
        dual, op, whole = DualLinear.of(node), tape.op, constants.int64
        n, k, bits, block = (node.attributes[name].as_int() for name in ("N", "K", "bits", "block_size"))
        blocks, s8 = -(-k // block), {"to": ir.DataType.INT8}
        q = op("Cast", [reinterpret(dual.codes, [n, blocks, block], ir.DataType.UINT4)], s8)
        if dual.zero_points is None:
            z = constants.tensor(np.array(2 ** (bits - 1), np.int8))
        else:
            padded = op("Cast", [reinterpret(dual.zero_points, [n, blocks + blocks % 2], ir.DataType.UINT4)], s8)
            z = op("Unsqueeze", [op("Slice", [padded, whole(0), whole(blocks), whole(1)]), whole(-1)])
        ratio = op("Div", [dual.scales, op("Unsqueeze", [dual.row_scale, whole(-1)])])
        s1 = op("Unsqueeze", [op("Cast", [op("Round", [ratio])], s8), whole(-1)])
        product = op("Mul", [op("Sub", [q, z], name="levels"), s1])
        columns = op("Transpose", [op("Reshape", [product, whole(n, blocks * block)])], {"perm": [1, 0]})
        if blocks * block > k:
            columns = op("Slice", [columns, whole(0), whole(k), whole(0)])
        return cls(k, columns, dual.row_scale)
