"""GatherBlockQuantized as a torch operator, with its meaning, and a typed view of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.ops.matmul_ops import dequantize_blocks
from qcompile.ir.op_calls import OpCall, Operand

ops = torch.ops.qcompile_onnx


@torch.library.custom_op("qcompile_onnx::gather_nbits", mutates_args=())
def gather_nbits(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, bits: int, block: int
) -> Tensor:
    """Dequantized rows `ids` [..] of a table [V, K]: [.., K].

    Args:
        ids: row indices.
        codes, scales, zeros, k, bits, block: the table, as the weight of nbits_linear, which may read it too.
    """
    chosen = ids.flatten()
    zeros_of_rows = None if zeros is None else zeros[chosen]
    rows = dequantize_blocks(codes[chosen], scales[chosen], zeros_of_rows, bits, block)[:, :k]
    return rows.reshape(*ids.shape, k)


@gather_nbits.register_fake
def _(ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, *_: int) -> Tensor:
    return scales.new_empty((*ids.shape, k))


@dataclass(frozen=True)
class GatherNBitsCall(OpCall):
    """qcompile_onnx::gather_nbits."""

    target: ClassVar[Any] = ops.gather_nbits.default

    ids: fx.Node
    codes: fx.Node
    scales: fx.Node
    zeros: Operand
    k: int
    bits: int
    block: int
