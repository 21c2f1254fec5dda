"""The dialect in plain ATen: what every target falls back to where it has no kernel."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard
from qcompile.numerics.qtensor import dequantize_codes, load_codes

ops = torch.ops.qcompile


def lower_rest(program: Program) -> None:
    """What no kernel took: int8 codes of rows, transforms and numbers of codes, for Inductor to fuse; in place."""
    for node in list(program.graph.nodes):
        if node.target is ops.quantize.default and node.args[1] == "int8/row" and node.users:
            replace_quantize(node, *program.inline(quantize_rows, (node.args[0],), before=node))
        elif node.target is ops.hadamard.default:
            node.replace_all_uses_with(program.inline(hadamard, node.args, before=node))
        elif node.target is ops.dequantize.default:
            codes, scale, zero, group_scale, form, columns, dtype = node.args
            run = functools.partial(dequantize, form=Format.parse(form), columns=columns, dtype=dtype)
            node.replace_all_uses_with(program.inline(run, (codes, scale, zero, group_scale), before=node))


def replace_quantize(node: fx.Node, codes: fx.Node, scale: fx.Node) -> None:
    """Let readers of a symmetric quantize read these."""
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] < 2:
            user.replace_all_uses_with((codes, scale)[user.args[1]])


def product(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, stored: Tensor, scale: Tensor, zero: Tensor | None,
    group_scale: Tensor | None, bias: Tensor | None, *, form: Format, act: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Any format: dequantize both sides and multiply in the model's dtype."""
    if act:
        assert x_scale is not None
        x = dequantize_codes(x, x_scale, x_zero, None, Format.parse(act)).to(dtype)
    weight = dequantize(stored, scale, zero, group_scale, form=form, columns=columns, dtype=dtype)
    return torch.nn.functional.linear(x, weight, bias)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None,
    *, form: Format, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Codes -> numbers; `columns` > 0 says that they are stored packed with K = columns."""
    unpacked = load_codes(codes, form, columns) if columns else codes
    return dequantize_codes(unpacked, scale, zero, group_scale, form).to(dtype)


def hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """x [.., n] -> x diag(signs) H_n / sqrt(n)."""
    return apply_hadamard(x.float(), signs.float()).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scale [.., 1] of each row: the values of qcompile::quantize, in ATen."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale
