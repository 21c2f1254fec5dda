"""Activation functions as one operator each (Gelu, BiasGelu, FastGelu, QuickGelu), however a model writes them.

The part of a graph between a value and what is computed of it elementwise is evaluated on a grid and compared with
GELU (erf, tanh) and x sigmoid(alpha x). The bias of a linear in front is added by the operator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.fusions.packed_matmul import take_bias
from qcompile.codegen.onnx.fusions.partial_evaluation import evaluate
from qcompile.codegen.onnx.ops.activation_ops import GeluCall, QuickGeluCall
from qcompile.ir.aten_ops import ACTIVATIONS, Ops
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport

aten = torch.ops.aten

_ELEMENTWISE: Ops = ACTIVATIONS | {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.div.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.erf.default,
}
_LAST: Ops = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.gelu.default, aten.silu.default})
"""What an activation may end in: a product, or the activation itself."""

_MAX_NODES = 16  # of the longest spelling, and some more
_GRID = torch.linspace(-8, 8, 161, dtype=torch.float64)
_ALPHA_AT = 1.0  # the x where x sigmoid(alpha x) is evaluated to solve for alpha


@dataclass(frozen=True)
class Activation:
    """What a node computes of a value elementwise.

    Attributes:
        source: the value.
        inner: the nodes between, the last one included.
        approximate: "none" or "tanh" of a GELU, as torch has it; None of x sigmoid(alpha x).
        alpha: of x sigmoid(alpha x).
    """

    source: fx.Node
    inner: frozenset[fx.Node]
    approximate: str | None
    alpha: float = 1.0


def fuse_activations(program: Program, report: PassReport) -> None:
    """Rewrite in place."""
    count, fused = 0, set[fx.Node]()
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in reversed(order):
        if node.target not in _LAST or node in fused:
            continue
        found = _match(program, node, order)
        if found is None:
            continue
        fused |= found.inner
        if found.approximate is None:
            new = QuickGeluCall(found.source, found.alpha).insert(program, before=node)
        else:
            x, bias = take_bias(program, found.source, set(found.inner)) or (found.source, None)
            new = GeluCall(x, bias, found.approximate).insert(program, before=node)
        node.replace_all_uses_with(new)
        count += 1
    program.cleanup()
    report.notes.append(f"{count} activations")


def _match(program: Program, node: fx.Node, order: dict[fx.Node, int]) -> Activation | None:
    """The shortest part of the graph that ends in `node` and is an activation of one value."""
    frontier, inner = {node}, set[fx.Node]()
    while True:
        latest = max(frontier, key=lambda n: order[n])
        if latest.target not in _ELEMENTWISE or len(inner) > _MAX_NODES:
            return None
        inner.add(latest)
        upstream = {n for n in latest.all_input_nodes if not _is_scalar_constant(program, n)}
        frontier = (frontier - {latest}) | upstream
        if len(frontier) != 1:
            if not frontier:
                return None
            continue
        source = next(iter(frontier))
        function = _known_function(program, node, source)
        if function is not None:
            return Activation(source, frozenset(inner), *function)


def _is_scalar_constant(program: Program, node: fx.Node) -> bool:
    is_constant = program.weight_name(node) is not None or node.op == "get_attr"
    return is_constant and getattr(node.meta.get("val"), "ndim", None) == 0


def _known_function(program: Program, node: fx.Node, source: fx.Node) -> tuple[str | None, float] | None:
    """`approximate` and `alpha` of an Activation, or None if `node` is no known function of `source`."""
    got: Tensor = evaluate(program, node, {source: _GRID})
    for approximate in ("none", "tanh"):
        if torch.allclose(got, torch.nn.functional.gelu(_GRID, approximate=approximate), atol=1e-6):
            return approximate, 1.0
    gate = float(evaluate(program, node, {source: torch.tensor(_ALPHA_AT, dtype=torch.float64)}))
    if not 0 < gate < 1:
        return None
    alpha = round(math.log(gate / (1 - gate)), 6)
    fits = torch.allclose(got, _GRID * torch.sigmoid(alpha * _GRID), atol=1e-5)
    return (None, alpha) if fits and alpha else None
