"""Which values of a graph are never below zero: they need no sign in their codes.

Read off the operators that give a value, not off data, so that what holds for one batch holds for all.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from qcompile.ir.aten_ops import ALIASES, CASTS, DROPOUTS, JOINS, MOVES, SOFTMAX, SPLITS, aten

_ALWAYS: frozenset[Any] = SOFTMAX | {
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.softplus.default,
    aten.abs.default,
    aten.exp.default,
    aten.square.default,
}
_OF_FIRST: frozenset[Any] = (
    MOVES
    | ALIASES
    | CASTS
    | DROPOUTS
    | SPLITS
    | {
        operator.getitem,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool2d_with_indices.default,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_max_pool2d.default,
        aten.mean.default,
        aten.mean.dim,
        aten.amax.default,
        aten.sqrt.default,
    }
)
_SUMS: frozenset[Any] = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.add_.Tensor, aten.mul_.Tensor})
_CLAMPS: frozenset[Any] = frozenset({aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default})


def is_nonnegative(value: Any, known: dict[Any, bool] | None = None) -> bool:
    """Whether a value of a graph (or a constant in it) is never below zero, as far as its operators say.

    Args:
        value: a node, a constant, or a list of them.
        known: answers found before, of this graph; filled in.
    """
    if isinstance(value, (int, float)):
        return value >= 0
    if isinstance(value, (list, tuple)):
        return all(is_nonnegative(item, known) for item in value)
    if not isinstance(value, fx.Node):
        return False
    known = {} if known is None else known
    if value not in known:
        known[value] = _decide(value, known)
    return known[value]


def _decide(node: fx.Node, known: dict[Any, bool]) -> bool:
    if node.op != "call_function" or not node.args:
        return False
    if node.target in _ALWAYS:
        return True
    if node.target in _CLAMPS:
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        return isinstance(low, (int, float)) and low >= 0
    if node.target in _OF_FIRST or node.target in JOINS:
        return is_nonnegative(node.args[0], known)
    if node.target in _SUMS:
        return is_nonnegative([*node.args, *node.kwargs.values()], known)
    return False
