"""Certificates: an exact pass must not change what the model computes, and this is where it is checked.

Before and after run on the same inputs. Where the weights are float64 (as `qcompile verify` makes
them) the law must hold to 1e-9; in a narrower storage the folded weights were rounded once, and the
tolerance is that rounding's, which still catches a wrong law: it errs by percents. If they differ,
the first node that differs outside of what the pass changed on purpose is named. What a model draws at random is the
same in all runs.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.ir.repeated_draws import repeated_draws
from qcompile.recipe.report import Certificate

# Storage dtype of the weights -> relative difference of the outputs that rounding can explain.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

_PIECE = 1 << 22  # values compared at once: logits in float64 take more than the weights of a small model


def storage_dtype(program: Program) -> torch.dtype:
    """The narrowest floating dtype among the weights that matter (matrices)."""
    found = {t.dtype for t in program.weights.values() if t.ndim >= 2 and t.dtype in TOLERANCE}
    return max(found, key=lambda d: TOLERANCE[d], default=torch.float32)


def widen(inputs: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Floating-point inputs in `dtype`, others unchanged."""
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def relative_error(after: Sequence[Any], before: Sequence[Any]) -> float:
    """The largest max|a - b| / max|b| over pairs of floating-point outputs.

    NaN and Inf are equal to themselves only, and count for nothing in max|b|.
    """
    worst = 0.0
    for a, b in zip(after, before, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point() or b.numel() == 0:
            continue
        scale = max(_largest(piece) for piece in b.flatten().split(_PIECE))
        pieces = zip(a.flatten().split(_PIECE), b.flatten().split(_PIECE), strict=True)
        worst = max(worst, max(_largest_difference(x.double(), y.double()) for x, y in pieces) / max(scale, 1e-30))
    return worst


def _largest(x: Tensor) -> float:
    """The largest finite |x|."""
    return float(x.abs().nan_to_num(nan=0.0, posinf=0.0).max())


def _largest_difference(x: Tensor, y: Tensor) -> float:
    same = (x == y) | (x.isnan() & y.isnan())
    return float((x - y).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0.0).max())


def certify(
    name: str,
    before: Program,
    after: Program,
    inputs: Sequence[Any],
    *,
    changed: Set[str] = frozenset(),
    before_outputs: Sequence[Any] | None = None,
) -> tuple[Certificate, tuple[Any, ...]]:
    """Compare two programs on one batch.

    Args:
        name: of the pass.
        before: the program that the pass was given.
        after: what it made of it.
        inputs: flat inputs.
        changed: names of nodes whose values the pass changes on purpose.
        before_outputs: outputs of `before` from an earlier call, to save a run.

    Returns:
        The certificate and the outputs of `after`, for the next pass.
    """
    storage = storage_dtype(before)
    dtype = torch.float64 if storage == torch.float64 else torch.float32
    wide_inputs = widen(inputs, dtype)
    if before_outputs is None:
        before_outputs = _run(before.widened(dtype), wide_inputs)
    outputs = _run(after.widened(dtype), wide_inputs)
    error = relative_error(outputs, before_outputs)
    tolerance = TOLERANCE[storage]
    blame = "" if error <= tolerance else first_difference(before, after, wide_inputs, changed, dtype, tolerance)
    label = str(storage).removeprefix("torch.")
    return Certificate(name, error, tolerance, label, blame), outputs


def first_difference(
    before: Program,
    after: Program,
    inputs: Sequence[Any],
    changed: Set[str],
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
) -> str:
    """The first node, in graph order, whose value differs and was not meant to.

    Args:
        before: the program that a pass was given.
        after: what it made of it.
        inputs: flat inputs.
        changed: names of nodes whose values the pass changes on purpose.
        dtype: what both are computed in.
        tolerance: relative difference of a node's values that counts as none.

    Returns:
        Its name, or "the output" if all common nodes agree.
    """
    first, second = before.widened(dtype), after.widened(dtype)
    common = {n.name for n in first.graph.nodes} & {n.name for n in second.graph.nodes} - changed
    reference: dict[str, Tensor] = {}

    def remember(node: Any, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            reference[node.name] = value

    different: list[str] = []

    def compare(node: Any, value: Any) -> None:
        if not different and node.name in reference:
            old = reference[node.name]
            if old.shape != value.shape or relative_error([value], [old]) > tolerance:
                different.append(node.name)

    def calls(program: Program) -> list[Any]:
        return [n for n in program.graph.nodes if n.op == "call_function" and n.name in common]

    for program, see in ((first, remember), (second, compare)):
        with repeated_draws():
            program.watch(calls(program), inputs, see)
    return different[0] if different else "the output"


def _run(program: Program, inputs: Sequence[Any]) -> tuple[Any, ...]:
    with repeated_draws():
        return program(*inputs)
