"""An embedding whose table the logits have in codes reads those codes: one table in the file.

A tied model's logits are the products with its own embedding table. When they were quantized, their codes are a
rounding of that table, and the rows of the embedding can be gathered from them. Passes may part the two: a rotation
folds the last norm's gain g into the logits' weight and turns both tables by R. They are then E R and E diag(g) R, so
one is the other times a matrix [K, K], R^T diag(1/g) R: rows are gathered from the codes and multiplied by the matrix
that comes nearest to the table (least squares), if that is about as near as rounding the table itself would be. So are
tables of codes that a search chose by the logits' inputs (GPTQ), not by the table. Every token reads the whole matrix:
behind 4-bit codes it is held in 8 bits. A table of its own would stay in float32, 4 V K bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.ops.matmul_ops import blocks_to_numbers
from qcompile.codegen.onnx.tracing.onnx_linear import to_blocks
from qcompile.ir.program import Program
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

Call = tuple[Callable[..., object], tuple[object, ...]]

_STEP = 0.55  # of a step: what rounding may change a number by
_CLIPPED = 0.1  # share of numbers that a searched clip may change by more
_FARTHER = 1.5  # times as far from the table as its own rounding: codes behind a matrix may be,
_FARTHEST = 4.0  # and any one of their rows
_TINY = 1e-30
_ROWS = 8192  # of a table that are looked at together in float64
_MATRIX = Format.parse("int8/group64")  # its steps are an eighteenth of those of 4 bits


@dataclass(frozen=True)
class Shared:
    """A table that is gathered from codes: its name, the numbers that it now holds, and the matrix behind them.

    turn: the matrix [K, K] turned round, as a linear's weight: numbers = gathered @ turn.T. Codes of it or floats.
    farther: how far behind a matrix they are from the table, as a multiple of its own rounding.
    """

    name: str
    numbers: Tensor
    turn: QTensor | Tensor | None = None
    farther: float = 1.0


def share_tables(program: Program) -> list[Shared]:
    """Let embeddings gather from the codes of products that hold a rounding of their table."""
    products = [n for n in program.graph.nodes if n.target in (ops.nbits_linear.default, ops.dual_linear.default)]
    found: dict[str, Shared] = {}
    turns: dict[str, Call] = {}
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
                if name not in turns:
                    turns[name] = _product(program, f"turn_of_{name}", shared.turn)
                operator, matrix = turns[name]
                rows = program.insert(operator, (rows, *matrix), before=node)
            node.replace_all_uses_with(rows)
            program.graph.erase_node(node)
            found[name] = shared
            break
    program.cleanup()
    return list(found.values())


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
        return Shared(name, numbers)
    form = Format.parse(f"int{bits}/group{block}" + ("" if zeros is None else "/zero"))
    return behind_matrix(name, table, numbers, form)


def _product(program: Program, name: str, turn: QTensor | Tensor) -> Call:
    """The operator that multiplies by a matrix, and its arguments behind the first."""
    if isinstance(turn, Tensor):
        return aten.matmul.default, (program.add_weight(name, turn.t().contiguous()),)
    k, form = turn.codes.shape[1], turn.format
    codes, scales, _ = to_blocks(QuantLinear(k, k, form, None, dict(codes=turn.codes, scale=turn.scale)))
    held = [program.add_weight(f"{name}_{part}", tensor) for part, tensor in (("codes", codes), ("scales", scales))]
    return ops.nbits_linear.default, (*held, None, None, k, form.bits, form.group)


def behind_matrix(name: str, table: Tensor, numbers: Tensor, form: Format) -> Shared | None:
    """A table as numbers times a matrix, if that is about as near as the table rounded to `form`."""
    k = table.shape[1]
    if len(table) < 2 * k:
        return None  # some matrix comes near to any table of so few rows
    part = len(table) // (4 * k)
    if part > 1 and _turned(table[::part], numbers[::part], form) is None:
        return None  # soon: a matrix comes nearer to a part of the rows than to all of them
    if (found := _turned(table, numbers, form)) is None:
        return None
    turn, farther = found
    return Shared(name, _times(numbers, turn), turn, farther)


def _times(numbers: Tensor, turn: QTensor | Tensor) -> Tensor:
    return numbers @ (turn if isinstance(turn, Tensor) else turn.dequantize()).t()


def _turned(table: Tensor, numbers: Tensor, form: Format) -> tuple[QTensor | Tensor, float] | None:
    """The nearest matrix, and how far that is as a multiple of the table's own rounding; None: too far."""
    nearest = nearest_turn(numbers, table).t()
    turn = quantize_tensor(nearest, _MATRIX) if form.bits < _MATRIX.bits else nearest
    away = (_times(numbers, turn) - table).norm(dim=1)
    rounded = (quantize_tensor(table, form).dequantize() - table).norm(dim=1)
    farther = float(away.norm() / rounded.norm())
    outlier = away > _FARTHEST * rounded.clamp_min(rounded.mean())
    return None if not farther <= _FARTHER or bool(outlier.any()) else (turn, farther)


def nearest_turn(numbers: Tensor, table: Tensor) -> Tensor:
    """The matrix A [K, K] with the least |numbers A - table|, both [V, K]; solved in float64.

    Columns that are zero everywhere, or depend on others, leave it undecided: a little damping decides.
    """
    k = numbers.shape[1]
    square, across = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    for rows, wanted in zip(numbers.split(_ROWS), table.split(_ROWS), strict=True):
        wide = rows.double()
        square += wide.t() @ wide
        across += wide.t() @ wanted.double()
    size = square.diagonal().mean().clamp_min(_TINY)
    for damping in (1e-9, 1e-6, 1e-3):
        factor, failed = torch.linalg.cholesky_ex(square + damping * size * torch.eye(k, dtype=torch.float64))
        if not int(failed):
            break
    return torch.cholesky_solve(across, factor).float()
