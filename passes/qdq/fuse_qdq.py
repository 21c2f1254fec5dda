"""Fuse: linear(dq(q(x)), dq(w), b) becomes one qlinear, a product with a stack of experts one qexperts.

Law:    qlinear(codes, scales, ..) = linear(dq(codes), dq(weight), b), up to the rounding of the
        accumulation (exact in int32 where both sides have one scale for a row).
Keeps:  the output of the Q/DQ graph up to rounding.   Needs: nothing.   Leaves: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.calibration.statistics import Statistics
from qcompile.ir.node_meta import LOW_RANK, SITE
from qcompile.ir.program import Program
from qcompile.recipe.registry import rewrites
from qcompile.recipe.report import PassReport

aten = torch.ops.aten
ops = torch.ops.qcompile


@dataclass(frozen=True)
class Fuse:
    """Fuse every quantized site."""


@rewrites(Fuse, exact=False, after=("Quantize", "LoRC", "CalibratePrefix"), requires=("Quantize",))
def fuse(program: Program, config: Fuse, statistics: Statistics) -> PassReport:
    """Replace Q/DQ and linear by qlinear, in place."""
    report = PassReport("Fuse")
    for node in list(program.graph.find_nodes(op="call_function", target=aten.linear.default)):
        numbers = node.args[1]
        if not isinstance(numbers, torch.fx.Node) or numbers.target is not ops.dequantize.default:
            continue
        codes, scale, zero, group_scale, form, columns, _ = numbers.args
        bias = node.args[2] if len(node.args) > 2 else None
        x, act = node.args[0], ""
        x_scale = x_zero = None
        if isinstance(x, torch.fx.Node) and x.target is ops.dequantize.default and x.args[5] == 0:
            x, x_scale, x_zero, _, act, _, _ = x.args
        fused = program.insert(
            ops.qlinear.default,
            (x, x_scale, x_zero, codes, scale, zero, group_scale, bias, form, act, columns, node.meta["val"].dtype),
            before=node,
        )
        fused.meta[LOW_RANK] = node.meta.get(LOW_RANK)
        fused.meta[SITE] = (program.weight_name(codes) or node.name).removesuffix(".codes")
        program.replace(node, fused)
        report.done.append(fused.meta[SITE])
    for node in [n for n in program.graph.nodes if SITE in n.meta and n.target is not aten.linear.default]:
        if node.target is not ops.qlinear.default:
            _fuse_experts(program, node)
            report.done.append(node.meta[SITE])
    program.cleanup()
    return report


def _fuse_experts(program: Program, node: torch.fx.Node) -> None:
    """A product with a dequantized stack, turned to [E, K, N], becomes one qexperts.

    A batched one, x [E, T, K], is a grouped one of its rows [E T, K] where every expert has T.
    """
    x, numbers, *more = node.all_input_nodes
    batched = not more
    if batched:
        x, *more = program.inline(_rows_and_ends, (x,), before=node)
    codes, scale, zero, group_scale, form, columns, _ = numbers.args[0].args
    dtype = node.meta["val"].dtype
    args = (x, *more, codes, scale, zero, group_scale, form, columns, dtype)
    fused = program.insert(ops.qexperts.default, args, before=node)
    fused.meta[SITE] = node.meta[SITE]
    result = fused
    if batched:
        experts = int(node.meta["val"].shape[0])
        result = program.inline(lambda rows: rows.unflatten(0, (experts, -1)), (fused,), before=node)
    program.replace(node, result)


def _rows_and_ends(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.ones_like(x[:, :, 0], dtype=torch.int32).sum(1, dtype=torch.int32)  # T of each, T being free
    return x.flatten(0, 1), counts.cumsum(0, dtype=torch.int32)
