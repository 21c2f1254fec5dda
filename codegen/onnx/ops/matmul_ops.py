"""Quantized linears of ONNX Runtime as torch operators, with their meaning, and typed views of their calls.

Each operator has a reference in plain torch, which is what the rewritten graph computes before it is translated
(translate.py writes the ONNX nodes).

    nbits_linear      MatMulNBits: weight codes in blocks along K, each with a scale and a zero point
    int8_linear       activations quantized dynamically (per token or per tensor), MatMulInteger, scales
    dual_linear       a weight with two-level scales: int4 in groups and, times integer group scales, int8 in a row
    blocked_linear    DequantizeLinear in blocks and MatMul: standard ONNX operators
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx

import qcompile.ir.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.ir.op_calls import OpCall, Operand
from qcompile.numerics.bit_packing import unpack
from qcompile.numerics.format import Format

ops = torch.ops.qcompile_onnx


def dequantize_blocks(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int) -> Tensor:
    """The weight [N, blocks * block] float32 behind packed blocks; arguments as of `nbits_linear`."""
    n, blocks = scales.shape
    unpacked = unpack(codes.reshape(n, -1), bits, blocks * block).reshape(n, blocks, block).float()
    if zeros is None:
        zero = torch.full_like(scales, 2 ** (bits - 1))
    else:
        zero = zeros if zeros.is_floating_point() else unpack(zeros, bits, blocks).float()
    return ((unpacked - zero[..., None]) * scales[..., None]).reshape(n, -1)


@torch.library.custom_op("qcompile_onnx::nbits_linear", mutates_args=())
def nbits_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, k: int, bits: int, block: int
) -> Tensor:
    """x @ dq(codes).T + bias: MatMulNBits.

    Args:
        x: [.., K] float32.
        codes: [N, blocks, block bits / 8] uint8, packed.
        scales: [N, blocks] float32.
        zeros: uint8 [N, ceil(blocks bits / 8)] packed, or float32 [N, blocks]; None: 2^(bits - 1).
        bias: [N] or None.
        k: K; the last block may be longer than what is left of it.
        bits: of a code.
        block: columns that share a scale.

    Returns:
        [.., N].
    """
    weight = dequantize_blocks(codes, scales, zeros, bits, block)[:, :k]
    return torch.nn.functional.linear(x, weight, bias)


@nbits_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qcompile_onnx::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, sums: Tensor | None, bias: Tensor | None, per_row: bool
) -> Tensor:
    """x, quantized dynamically to int8, times an int8 weight, plus bias.

    Args:
        x: [.., K] float32.
        weight: int8 [K, N]; with standard operators only uint8, shifted by 128 (matmul_integer.py says why).
        scale: [N], of the weight.
        sums: [N], scale times the sums of the weight over K, if x has zero points; None: it has none. The file corrects
            for zero points with these sums; here only whether they are given counts, so that one checks the other.
        bias: [N] or None.
        per_row: whether x has a scale for each row (per token), or one for all (per tensor).
    """
    form = Format("int8", "row" if per_row else "tensor", zero="none" if sums is None else "int")
    codes, x_scale, zero = torch.ops.qcompile.quantize(x, str(form))
    shifted = codes.double() if sums is None else codes.double() - zero
    weight_codes = weight.double() - 128 * (weight.dtype == torch.uint8)
    out = (shifted @ weight_codes).float() * x_scale * scale  # float64 sums of int8 products are exact
    return out if bias is None else out + bias


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("qcompile_onnx::dual_linear", mutates_args=())
def dual_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, k: int, bits: int, block: int,
    row_scale: Tensor, per_row: bool,
) -> Tensor:  # fmt: skip
    """The int8 product with a weight of two-level scales (DGQ, arXiv:2310.04836; QoQ, arXiv:2405.04532).

    Args:
        x, codes, scales, zeros, bias, k, bits, block: as of nbits_linear, which multiplies the same weight by
            activations that are not quantized.
        row_scale: [N]; scales / row_scale are the integer group scales.
        per_row: as of int8_linear.
    """
    weight = dequantize_blocks(codes, (scales / row_scale[:, None]).round(), zeros, bits, block)[:, :k]
    return int8_linear(x, weight.to(torch.int8).t(), row_scale, None, bias, per_row)


@dual_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qcompile_onnx::blocked_linear", mutates_args=())
def blocked_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    """x [.., K] @ dq(codes) + bias, of a weight [K, N] in blocks of rows: the layout of DequantizeLinear.

    Args:
        x: [.., K] float32.
        codes: uint8, the packed stream of [K, N].
        scales: [blocks, N] float32.
        zeros: uint8, the packed stream of [blocks, N].
        bias: [N] or None.
        bits: of a code.
        block: rows that share a scale.
    """
    k, (blocks, n) = x.shape[-1], scales.shape
    unpacked = unpack(codes, bits, k * n).reshape(k, n).float()
    zero = unpack(zeros, bits, blocks * n).reshape(blocks, n).float()
    weight = (unpacked - zero.repeat_interleave(block, 0)[:k]) * scales.repeat_interleave(block, 0)[:k]
    return torch.nn.functional.linear(x, weight.t(), bias)


@blocked_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


class LinearCall(OpCall):
    """x [.., K] times a weight of N rows, plus a bias.

    Attributes:
        row_axes: the arguments that are tensors of the weight -> the axis of each that counts its N rows.
    """

    row_axes: ClassVar[dict[str, int]]

    x: fx.Node
    bias: Operand

    @property
    def options(self) -> tuple[Any, ...]:
        """The arguments that are neither x nor tensors of the weight: linears that are packed must agree on them."""
        tensors = {"x", "bias", *self.row_axes}
        return tuple(value for name, value in vars(self).items() if name not in tensors)

    def with_operands(self, **operands: Operand) -> Self:
        """The same call with other weights or another bias."""
        return replace(self, **operands)


@dataclass(frozen=True)
class NBitsLinearCall(LinearCall):
    """qcompile_onnx::nbits_linear."""

    target: ClassVar[Any] = ops.nbits_linear.default
    row_axes: ClassVar[dict[str, int]] = {"codes": 0, "scales": 0, "zeros": 0}

    x: fx.Node
    codes: fx.Node
    scales: fx.Node
    zeros: Operand
    bias: Operand
    k: int
    bits: int
    block: int


@dataclass(frozen=True)
class DualLinearCall(NBitsLinearCall):
    """qcompile_onnx::dual_linear."""

    target: ClassVar[Any] = ops.dual_linear.default
    row_axes: ClassVar[dict[str, int]] = {"codes": 0, "scales": 0, "zeros": 0, "row_scale": 0}

    row_scale: fx.Node
    per_row: bool

    def without_int8(self) -> NBitsLinearCall:
        """The same product by its 4-bit codes only, with float activations."""
        return NBitsLinearCall(self.x, self.codes, self.scales, self.zeros, self.bias, self.k, self.bits, self.block)


@dataclass(frozen=True)
class Int8LinearCall(LinearCall):
    """qcompile_onnx::int8_linear."""

    target: ClassVar[Any] = ops.int8_linear.default
    row_axes: ClassVar[dict[str, int]] = {"weight": 1, "scale": 0, "sums": 0}

    x: fx.Node
    weight: fx.Node
    scale: fx.Node
    sums: Operand
    bias: Operand
    per_row: bool


@dataclass(frozen=True)
class BlockedLinearCall(OpCall):
    """qcompile_onnx::blocked_linear."""

    target: ClassVar[Any] = ops.blocked_linear.default

    x: fx.Node
    codes: fx.Node
    scales: fx.Node
    zeros: fx.Node
    bias: Operand
    bits: int
    block: int
