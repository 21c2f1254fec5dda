"""The dialect in plain ATen: what the CPU and GPU targets fall back to where they have no kernel."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, fx

from qcompile.ir.op_calls import DequantizeCall, HadamardCall, QLinearCall, QuantizeCall
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard
from qcompile.numerics.qtensor import dequantize_codes, unpack_codes


def lower_rest(program: Program) -> None:
    """Lower the calls that no kernel took, for Inductor to fuse; in place.

    These are quantize (int8 per token; 4 and 8 bits with zero points per token), hadamard and dequantize; other formats
    of quantize stay calls of the dialect.
    """
    for node in list(program.graph.nodes):
        if QuantizeCall.matches(node) and node.users:
            quantize = QuantizeCall.of(node)
            if quantize.format == "int8/row":
                replace_quantize(node, *program.inline(quantize_int8_rows, (quantize.x,), before=node))
            elif quantize.format in ("int4/row/zero", "int8/row/zero"):
                rows = functools.partial(quantize_rows_with_zero, largest=Format.parse(quantize.format).qmax)
                replace_quantize(node, *program.inline(rows, (quantize.x,), before=node))
        elif HadamardCall.matches(node):
            transform = HadamardCall.of(node)
            node.replace_all_uses_with(program.inline(hadamard, (transform.x, transform.signs), before=node))
        elif DequantizeCall.matches(node):
            call = DequantizeCall.of(node)
            run = functools.partial(dequantize, form=Format.parse(call.format), columns=call.columns, dtype=call.dtype)
            stored = (call.codes, call.scale, call.zero, call.group_scale)
            node.replace_all_uses_with(program.inline(run, stored, before=node))


def replace_quantize(node: fx.Node, *parts: fx.Node) -> None:
    """Let consumers of a quantize read codes, scale and, where there is one, zero point from other nodes instead."""
    for user in list(node.users):
        index = user.args[1] if user.target is operator.getitem else None
        if isinstance(index, int) and index < len(parts):
            user.replace_all_uses_with(parts[index])


def inline_qlinear(program: Program, node: fx.Node, call: QLinearCall) -> fx.Node:
    """Insert `dequantized_linear` of a site before its node; returns the node of the result."""
    run = functools.partial(
        dequantized_linear, form=call.weight_format, act=call.act, columns=call.columns, dtype=call.dtype
    )
    operands = (call.x, call.x_scale, call.x_zero, *call.stored, call.bias)
    result: fx.Node = program.inline(run, operands, before=node)
    return result


def dequantized_linear(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, stored: Tensor, scale: Tensor, zero: Tensor | None,
    group_scale: Tensor | None, bias: Tensor | None, *, form: Format, act: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """qlinear of any format: dequantize both operands, then the matmul in the model's dtype.

    Args:
        x: [.., K], float or codes.
        x_scale: of the codes of x, or None.
        x_zero: of the codes of x, or None.
        stored: codes [N, ..] of the weight, packed.
        scale: of the weight, see QTensor.
        zero: of the weight, or None.
        group_scale: of the weight, or None.
        bias: [N], or None.
        form: format of the weight.
        act: format of x, "" where it is float.
        columns: K.
        dtype: of the result.

    Returns:
        [.., N].
    """
    if act:
        assert x_scale is not None
        x = dequantize_codes(x, x_scale, x_zero, None, Format.parse(act)).to(dtype)
    weight = dequantize(stored, scale, zero, group_scale, form=form, columns=columns, dtype=dtype)
    return torch.nn.functional.linear(x, weight, bias)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None,
    *, form: Format, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Codes -> dequantized values in `dtype`; `columns` > 0 says that they are stored packed with K = columns."""
    unpacked = unpack_codes(codes, form, columns) if columns else codes
    return dequantize_codes(unpacked, scale, zero, group_scale, form).to(dtype)


def hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """x [.., n] -> x diag(signs) H_n / sqrt(n)."""
    return apply_hadamard(x.float(), signs.float()).to(x.dtype)


def quantize_int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., K] -> int8 codes [.., K], float32 per-token scales [.., 1]: the values of qcompile::quantize, in ATen."""
    wide = x.float().contiguous()  # codes and scales are contiguous whatever x is: kernels and views rely on it
    scale = wide.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale


def quantize_rows_with_zero(x: Tensor, *, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., K] -> uint8 codes 0 .. largest, float32 scales and zero points [.., 1]: as qcompile::quantize, in ATen."""
    wide = x.float().contiguous()
    low, high = wide.amin(-1, keepdim=True).clamp_max(0), wide.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low) / largest
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(0, largest)
    return ((wide / scale).round() + zero).clamp(0, largest).to(torch.uint8), scale, zero
