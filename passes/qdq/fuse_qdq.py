"""Fuse: linear(dq(q(x)), dq(w), b) becomes one qlinear, a product with a stack of experts one qexperts.

Law:    qlinear(codes, scales, ..) = linear(dq(codes), dq(weight), b), up to the rounding of the
        accumulation (exact in int32 where both sides have one scale for a row).
Keeps:  the output of the Q/DQ graph up to rounding.
Needs:  nothing.
Skips:  nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.ir.aten_ops import LINEAR
from qcompile.ir.node_meta import LOW_RANK, MODULE, SITE
from qcompile.ir.op_calls import DequantizeCall, Operand, QExpertsCall, QLinearCall
from qcompile.ir.program import Program
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class Fuse(PassConfig):
    """Fuse every quantized site."""


@rewrites(Fuse, Stage.FUSE, exact=False, requires=(Quantize,))
def fuse(program: Program, config: Fuse, context: PassContext) -> PassReport:
    """Replace Q/DQ and the product by qlinear or qexperts, in place."""
    report = PassReport("Fuse")
    for node in [n for n in program.graph.nodes if SITE in n.meta and n.op == "call_function"]:
        fused = _linear(program, node) if node.target is LINEAR else _experts(program, node)
        report.done.append(fused.meta[SITE])
    program.cleanup()
    return report


def _linear(program: Program, node: fx.Node) -> fx.Node:
    weight = DequantizeCall.of(node.args[1])
    x, _, *rest = node.all_input_nodes  # activation, weight, and a bias if there is one
    x, x_scale, x_zero, act = _activation(x)
    call = QLinearCall(
        x=x,
        x_scale=x_scale,
        x_zero=x_zero,
        weight=weight.codes,
        scale=weight.scale,
        zero=weight.zero,
        group_scale=weight.group_scale,
        bias=rest[0] if rest else None,
        format=weight.format,
        act=act,
        columns=weight.columns,
        dtype=node.meta["val"].dtype,
    )
    fused = call.insert(program, before=node)
    fused.meta.update({key: node.meta[key] for key in (LOW_RANK, MODULE, SITE) if key in node.meta})
    program.replace(node, fused)
    return fused


def _activation(x: fx.Node) -> tuple[fx.Node, Operand, Operand, str]:
    """The left operand of a product: codes, their scale, zero point and format; x, None, None and "" where float."""
    if not DequantizeCall.matches(x) or not (quantized := DequantizeCall.of(x)).of_activation:
        return x, None, None, ""
    return quantized.codes, quantized.scale, quantized.zero, quantized.format


def _experts(program: Program, node: fx.Node) -> fx.Node:
    """A product with a dequantized stack, transposed to [E, K, N], becomes one qexperts.

    A batched one, x [E, T, K], is a grouped one of its rows [E T, K] where every expert has T.
    """
    x, transposed, *ends = node.all_input_nodes
    x, x_scale, x_zero, act = _activation(x)
    batched = not ends
    if batched:
        x, *ends = program.inline(_rows_and_ends, (x,), before=node)
        x_scale, x_zero = (_rows_of(program, part, node) for part in (x_scale, x_zero))
    stack = DequantizeCall.of(transposed.args[0])
    call = QExpertsCall(
        x=x,
        x_scale=x_scale,
        x_zero=x_zero,
        ends=ends[0],
        weight=stack.codes,
        scale=stack.scale,
        zero=stack.zero,
        group_scale=stack.group_scale,
        format=stack.format,
        act=act,
        columns=stack.columns,
        dtype=node.meta["val"].dtype,
    )
    fused = call.insert(program, before=node)
    fused.meta[SITE] = node.meta[SITE]
    result = fused
    if batched:
        experts = int(node.meta["val"].shape[0])
        result = program.inline(lambda rows: rows.unflatten(0, (experts, -1)), (fused,), before=node)
    program.replace(node, result)
    return fused


def _rows_of(program: Program, part: Operand, node: fx.Node) -> Operand:
    """What a batched product has for each row [E, T, ..] as rows [E T, ..]; a single value stays one."""
    if part is None or not part.meta["val"].ndim:
        return part
    rows: fx.Node = program.inline(lambda of: of.flatten(0, 1), (part,), before=node)
    return rows


def _rows_and_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    counts = torch.ones_like(x[:, :, 0], dtype=torch.int32).sum(1, dtype=torch.int32)  # T of each, T being free
    return x.flatten(0, 1), counts.cumsum(0, dtype=torch.int32)
