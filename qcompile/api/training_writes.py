"""Which module takes the place of another where a pass made its product one that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qcompile.ir.node_meta import LOW_RANK_STEP
from qcompile.ir.op_calls import (
    FixedPointConvCall,
    FixedPointLinearCall,
    GroupAdapterCall,
    LowRankLinearCall,
    StackAdapterCall,
)
from qcompile.ir.program import Program
from qcompile.modules.adapted_linear import AdaptedLinear
from qcompile.modules.adapted_stack import AdaptedStack
from qcompile.modules.fixed_point_modules import FixedPointConv, FixedPointLinear, FixedPointStart
from qcompile.modules.low_rank_linear import STATE, LowRankLinear, LowRankRule
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.code_convolution import ConvolutionShape
from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.format import Format

Build = Callable[[Program, fx.Node, nn.Module], nn.Module]
"""build(rewritten program, the product that trains, the module that was captured) -> what takes its place."""


def _adapted(program: Program, node: fx.Node, old: nn.Module) -> nn.Module:
    call = GroupAdapterCall.of(node)
    assert isinstance(old, QuantLinear)
    return AdaptedLinear(old, program.weight_of(call.a), program.weight_of(call.b), call.scaling)


def _adapted_stack(program: Program, node: fx.Node, old: nn.Module) -> nn.Module:
    call = StackAdapterCall.of(node)
    assert isinstance(old, QuantStack)
    return AdaptedStack(old, program.weight_of(call.a), program.weight_of(call.b), call.scaling)


def _low_rank(program: Program, node: fx.Node, old: nn.Module) -> nn.Module:
    call = LowRankLinearCall.of(node)
    nodes = {name: getattr(call, "weight" if name == "codes" else name) for name in STATE}
    tensors = {name: None if part is None else program.weight_of(part) for name, part in nodes.items()}
    formats = [Format.parse(text) if text else None for text in (call.format, call.basis_format)]
    scale, stochastic, stream = node.meta[LOW_RANK_STEP]
    rule = LowRankRule(formats[0], formats[1], scale, call.threshold, call.factor, stochastic, stream)
    return LowRankLinear(tensors, program.weight_of(call.low), _parameter(program, call.bias, old), rule)


def _fixed_point(program: Program, node: fx.Node, old: nn.Module) -> nn.Module:
    is_conv = FixedPointConvCall.matches(node)
    call = FixedPointConvCall.of(node) if is_conv else FixedPointLinearCall.of(node)
    weight, bias = (_parameter(program, part, old) for part in (call.weight, call.bias))
    assert weight is not None
    transposed = program.weight_name(call.weight) in program.transposed
    start = FixedPointStart(FixedPointFormat.parse(call.format), program.weight_of(call.act_range), transposed)
    if not isinstance(call, FixedPointConvCall):
        return FixedPointLinear(weight, bias, start)
    shape = ConvolutionShape(tuple(call.stride), tuple(call.padding), tuple(call.dilation), call.groups)
    return FixedPointConv(weight, bias, start, shape)


def _parameter(program: Program, node: fx.Node | None, old: nn.Module) -> nn.Parameter | None:
    """The parameter of a module that fills a placeholder, under whichever of its names."""
    name = program.weight_name(node)
    if name is None:
        return None
    leaves = [path.rpartition(".")[2] for path in (name, *program.aliases.get(name, []))]
    return next(parameter for leaf in leaves if (parameter := old._parameters.get(leaf)) is not None)


BUILDERS: dict[Any, Build] = {
    GroupAdapterCall.target: _adapted,
    StackAdapterCall.target: _adapted_stack,
    LowRankLinearCall.target: _low_rank,
    FixedPointLinearCall.target: _fixed_point,
    FixedPointConvCall.target: _fixed_point,
}
"""Operator -> how to build the module that calls it."""
