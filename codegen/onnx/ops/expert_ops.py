"""Grouped matmuls of mixture-of-experts layers as torch operators, with their meaning, and typed views of their calls.

Rows x [T, K] are sorted by expert; those of expert e end at ends[e]. The last end is T: every row has its expert. (With
the experts sharded over devices rows may have none.) In the file every expert takes its rows (Slice), multiplies them,
and the results are concatenated.

    experts_linear      float weights: MatMul
    experts_nbits       weight codes: MatMulNBits
    experts_blocked     weight codes: DequantizeLinear and MatMul, standard ONNX operators
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.ops.matmul_ops import blocked_linear, dequantize_blocks
from qcompile.ir.op_calls import OpCall

ops = torch.ops.qcompile_onnx


@torch.library.custom_op("qcompile_onnx::experts_linear", mutates_args=())
def experts_linear(x: Tensor, ends: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Rows of each expert e times weights[e].

    Args:
        x: [T, K], sorted by expert.
        ends: [E], one past the last row of each expert, ascending.
        weights: E tensors [K, N].

    Returns:
        [T, N].
    """
    return torch.cat([rows @ weight for rows, weight in zip(_rows_by_expert(x, ends), weights, strict=True)])


@experts_linear.register_fake
def _(x: Tensor, ends: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty((x.shape[0], weights[0].shape[1]))


@torch.library.custom_op("qcompile_onnx::experts_nbits", mutates_args=())
def experts_nbits(
    x: Tensor, ends: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor],
    k: int, bits: int, block: int,
) -> Tensor:  # fmt: skip
    """As experts_linear with quantized weights, each as of nbits_linear; zeros: one for each expert, or empty."""
    products = []
    for e, rows in enumerate(_rows_by_expert(x, ends)):
        weight = dequantize_blocks(codes[e], scales[e], zeros[e] if zeros else None, bits, block)[:, :k]
        products.append(rows @ weight.t())
    return torch.cat(products)


@experts_nbits.register_fake
def _(x: Tensor, ends: Tensor, codes: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty((x.shape[0], codes[0].shape[0]))


@torch.library.custom_op("qcompile_onnx::experts_blocked", mutates_args=())
def experts_blocked(
    x: Tensor, ends: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor], k: int,
    bits: int, block: int,
) -> Tensor:  # fmt: skip
    """As experts_linear with quantized weights, each as of blocked_linear."""
    products = [
        blocked_linear(rows, codes[e], scales[e], zeros[e], None, bits, block)
        for e, rows in enumerate(_rows_by_expert(x, ends))
    ]
    return torch.cat(products)


@experts_blocked.register_fake
def _(x: Tensor, ends: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty((x.shape[0], scales[0].shape[1]))


def _rows_by_expert(x: Tensor, ends: Tensor) -> list[Tensor]:
    last = ends.tolist()
    return [x[start:end] for start, end in zip([0, *last], last, strict=False)]


@dataclass(frozen=True)
class ExpertsLinearCall(OpCall):
    """qcompile_onnx::experts_linear."""

    target: ClassVar[Any] = ops.experts_linear.default

    x: fx.Node
    ends: fx.Node
    weights: list[fx.Node]


@dataclass(frozen=True)
class ExpertsNBitsCall(OpCall):
    """qcompile_onnx::experts_nbits."""

    target: ClassVar[Any] = ops.experts_nbits.default

    x: fx.Node
    ends: fx.Node
    codes: list[fx.Node]
    scales: list[fx.Node]
    zeros: list[fx.Node]
    k: int
    bits: int
    block: int


@dataclass(frozen=True)
class ExpertsBlockedCall(ExpertsNBitsCall):
    """qcompile_onnx::experts_blocked."""

    target: ClassVar[Any] = ops.experts_blocked.default
