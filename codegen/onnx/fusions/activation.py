"""Activations as one operator each, however they are spelled: GELU (erf, tanh), x sigmoid(a x).

The part of a graph between a value and what is made of it point by point is computed on a grid and compared.
The bias of a product in front is added by the operator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.fusions.packed_matmul import take_bias
from qcompile.codegen.onnx.fusions.probe import evaluate
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

_POINTWISE = {
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.tanh.default, aten.sigmoid.default, aten.erf.default, aten.gelu.default, aten.silu.default,
    aten.rsub.Scalar, aten.mul.Scalar, aten.add.Scalar,
}  # fmt: skip
_LAST = {aten.mul.Tensor, aten.mul.Scalar, aten.gelu.default, aten.silu.default}
_GRID = torch.linspace(-8, 8, 161, dtype=torch.float64)
_GATE_AT = 1.0  # where x sigmoid(a x) is read to know a


@dataclass(frozen=True)
class Activation:
    """What x becomes: `kind` "none" or "tanh" as torch's gelu has it, or "gate", x sigmoid(slope x)."""

    kind: str
    slope: float = 1.0


def rewrite_activations(program: Program, report: PassReport) -> None:
    """Rewrite in place."""
    count, taken = 0, set[fx.Node]()
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in reversed(order):
        if node.target not in _LAST or node in taken:
            continue
        found = _activation(program, node, order)
        if found is None:
            continue
        source, inner, kind = found
        taken |= inner
        bias = take_bias(program, source, inner) if kind.kind != "gate" else None
        x = source if bias is None else bias[0]
        if kind.kind == "gate":
            new = program.insert(ops.gate.default, (x, kind.slope), before=node)
        else:
            new = program.insert(ops.gelu.default, (x, None if bias is None else bias[1], kind.kind), before=node)
        node.replace_all_uses_with(new)
        count += 1
    program.cleanup()
    report.notes.append(f"{count} activations")


def _activation(
    program: Program, node: fx.Node, order: dict[fx.Node, int]
) -> tuple[fx.Node, set[fx.Node], Activation] | None:
    """What `node` is an activation of, the nodes between and `node`, and which activation."""
    frontier, inner = {node}, set[fx.Node]()
    while True:
        latest = max(frontier, key=lambda n: order[n])
        if latest.target not in _POINTWISE or len(inner) > 16:
            return None
        inner.add(latest)
        before = {n for n in latest.all_input_nodes if not _is_constant(program, n)}
        frontier = (frontier - {latest}) | before
        if len(frontier) != 1:
            if not frontier:
                return None
            continue
        source = next(iter(frontier))
        known = _known(program, node, source)
        if known is not None:
            return source, inner, known


def _is_constant(program: Program, node: fx.Node) -> bool:
    held = program.weight_name(node) is not None or node.op == "get_attr"
    return held and getattr(node.meta.get("val"), "ndim", None) == 0


def _known(program: Program, node: fx.Node, source: fx.Node) -> Activation | None:
    got: Tensor = evaluate(program, node, {source: _GRID})
    for kind in ("none", "tanh"):
        if torch.allclose(got, torch.nn.functional.gelu(_GRID, approximate=kind), atol=1e-6):
            return Activation(kind)
    share = float(evaluate(program, node, {source: torch.tensor(_GATE_AT, dtype=torch.float64)}))
    if not 0 < share < 1:
        return None
    slope = round(math.log(share / (1 - share)), 6)
    fits = torch.allclose(got, _GRID * torch.sigmoid(slope * _GRID), atol=1e-5)
    return Activation("gate", slope) if fits and slope else None
