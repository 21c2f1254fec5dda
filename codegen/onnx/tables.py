"""An embedding whose table the logits have in codes reads those codes: one table in the file.

A tied model's logits are the products with its own embedding table. When they were quantized, their codes are a
rounding of that table, and the rows of the embedding can be gathered from them. Passes may part the two: a rotation
folds the last norm's gain g into the logits' weight and turns both tables by R. They are then E R and E diag(g) R, so
one is the other times a matrix [K, K], R^T diag(1/g) R: rows are gathered from the codes and multiplied by the matrix
that comes nearest to the table (least squares), if that is about as near as rounding the table itself would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.operators import blocks_to_numbers
from qcompile.formats import Format
from qcompile.program import Program
from qcompile.rounding import quantize_tensor

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

_STEP = 0.55  # of a step: what rounding may change a number by
_CLIPPED = 0.1  # share of numbers that a searched clip may change by more
_FARTHER = 1.5  # times as far from the table as its own rounding: codes behind a matrix may be
_ROWS = 8192  # of a table that are looked at together in float64


@dataclass(frozen=True)
class Shared:
    """A table that is gathered from codes: its name, the numbers that it now holds, and the matrix behind them."""

    name: str
    numbers: Tensor
    turn: Tensor | None


def share_tables(program: Program) -> list[Shared]:
    """Let embeddings gather from the codes of products that hold a rounding of their table."""
    products = [n for n in program.graph.nodes if n.target in (ops.nbits_linear.default, ops.dual_linear.default)]
    found = []
    for node in list(program.graph.find_nodes(op="call_function", target=aten.embedding.default)):
        name = program.weight_name(node.args[0])
        for product in products if name is not None else []:
            assert name is not None
            if (shared := _from_codes(program, name, product)) is None:
                continue
            _, codes, scales, zeros, _, k, bits, block = product.args[:8]
            args = (node.args[1], codes, scales, zeros, k, bits, block)
            rows = program.insert(ops.gather_nbits.default, args, before=node)
            if shared.turn is not None:
                turn = program.add_weight(f"turn_of_{name}", shared.turn.t().contiguous())
                rows = program.insert(aten.linear.default, (rows, turn), before=node)
            node.replace_all_uses_with(rows)
            program.graph.erase_node(node)
            found.append(shared)
            break
    program.cleanup()
    return found


def _from_codes(program: Program, name: str, product: fx.Node) -> Shared | None:
    """A table [V, K] as the codes of a product give it, alone or times a matrix [K, K]; None if they do not."""
    table = program.weights[name]
    names = [program.weight_name(a) for a in product.args[1:4]]
    codes, scales, zeros = (program.weights[n] if n is not None else None for n in names)
    assert codes is not None and scales is not None
    k, bits, block = product.args[5:8]
    if tuple(table.shape) != (codes.shape[0], k) or (zeros is not None and zeros.is_floating_point()) or bits < 4:
        return None  # GatherBlockQuantized reads codes of 4 and 8 bits, with zero points of the same
    numbers = blocks_to_numbers(codes, scales, zeros, bits, block)[:, :k]
    step = scales.abs().repeat_interleave(block, 1)[:, :k]
    far = (numbers - table).abs() > _STEP * step
    if float(far.float().mean()) <= _CLIPPED:
        return Shared(name, numbers, None)
    if len(table) < 2 * k:
        return None  # some matrix comes near to any table of so few rows
    turn = nearest_turn(numbers, table)
    turned = numbers @ turn
    form = Format.parse(f"int{bits}/group{block}" + ("" if zeros is None else "/zero"))
    rounded = quantize_tensor(table, form).dequantize()
    near = float((turned - table).norm()) <= _FARTHER * float((rounded - table).norm())
    return Shared(name, turned, turn) if near else None


def nearest_turn(numbers: Tensor, table: Tensor) -> Tensor:
    """The matrix A [K, K] with the least |numbers A - table|, both [V, K]; solved in float64."""
    k = numbers.shape[1]
    square, across = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    for rows, wanted in zip(numbers.split(_ROWS), table.split(_ROWS), strict=True):
        wide = rows.double()
        square += wide.t() @ wide
        across += wide.t() @ wanted.double()
    return (torch.linalg.pinv(square, hermitian=True) @ across).float()
