"""Linears that read the same value, packed into one: queries, keys and values of an attention, gate and up.

A linear here is `nbits_linear`, `dual_linear`, `int8_linear` or a float linear, with weights of the program. Each row
of its weight (codes, scales, zero points, bias) makes one output channel, so rows may be selected, permuted and packed
with those of another linear of the same format that reads the same value.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.ops.matmul_ops import DualLinearCall, Int8LinearCall, LinearCall, NBitsLinearCall
from qcompile.ir.aten_ops import LINEAR
from qcompile.ir.op_calls import Operand
from qcompile.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class FloatLinearCall(LinearCall):
    """aten::linear with a weight [N, K]."""

    target: ClassVar[Any] = LINEAR
    row_axes: ClassVar[dict[str, int]] = {"weight": 0}

    x: fx.Node
    weight: fx.Node
    bias: Operand = None


_CALLS: dict[Any, type[LinearCall]] = {
    call.target: call for call in (NBitsLinearCall, DualLinearCall, Int8LinearCall, FloatLinearCall)
}


@dataclass(frozen=True)
class OutputChannels:
    """Some output channels of a linear: `rows` of its weight in that order, or all of them if None."""

    linear: fx.Node
    rows: Tensor | None


def linear_call(program: Program, node: fx.Node) -> LinearCall | None:
    """The call of a linear that can be packed, or None: something else, or a weight that is computed."""
    if node.target not in _CALLS:
        return None
    call = _CALLS[node.target].of(node)
    tensors = [getattr(call, name) for name in (*call.row_axes, "bias")]
    return call if all(t is None or program.weight_name(t) is not None for t in tensors) else None


def out_features(node: fx.Node) -> int:
    """N, the number of output channels of a linear."""
    return int(node.meta["val"].shape[-1])


def can_pack(program: Program, nodes: list[fx.Node]) -> bool:
    """Whether nodes are linears that read one value and have weights of one format."""
    calls = [linear_call(program, node) for node in nodes]
    first = calls[0]
    if first is None:
        return False

    def format_of(call: LinearCall) -> list[object]:
        tensors = [getattr(call, name) for name in call.row_axes]
        return [None if t is None else program.weight_of(t).dtype for t in tensors] + list(call.options)

    return all(
        call is not None and call.target is first.target and call.x is first.x and format_of(call) == format_of(first)
        for call in calls
    )


def pack(program: Program, parts: list[OutputChannels], before: fx.Node, name: str) -> fx.Node:
    """Insert one linear that makes the output channels of all parts, one part after another.

    Args:
        program: of the linears.
        parts: of linears that `can_pack` accepts.
        before: where to insert.
        name: prefix of the new weights' names.
    """
    calls = [_CALLS[part.linear.target].of(part.linear) for part in parts]

    def packed(argument: str, axis: int) -> Tensor:
        selected = []
        for part, call in zip(parts, calls, strict=True):
            operand = getattr(call, argument)
            tensor = torch.zeros(out_features(part.linear)) if operand is None else program.weight_of(operand)
            selected.append(tensor if part.rows is None else tensor.index_select(axis, part.rows))
        return torch.cat(selected, axis).contiguous()

    first = calls[0]
    tensors = {
        argument: program.add_weight(f"{name}.{argument}", packed(argument, axis))
        for argument, axis in first.row_axes.items()
        if getattr(first, argument) is not None
    }
    if any(call.bias is not None for call in calls):
        tensors["bias"] = program.add_weight(f"{name}.bias", packed("bias", 0))
    return first.with_operands(**tensors).insert(program, before=before)


def pack_matmuls(program: Program) -> int:
    """Pack all linears that read one value and can be packed, in place; returns how many linears that saves."""
    by_input: dict[tuple[fx.Node, object], list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (call := linear_call(program, node)) is not None:
            by_input.setdefault((call.x, node.target), []).append(node)
    saved = 0
    for nodes in by_input.values():
        if len(nodes) < 2 or not can_pack(program, nodes):
            continue
        parts = [OutputChannels(node, None) for node in nodes]
        packed = pack(program, parts, nodes[0], f"packed_{nodes[0].name}")
        sizes = [out_features(node) for node in nodes]
        pieces = program.insert(aten.split_with_sizes.default, (packed, sizes, -1), after=packed)
        for index, node in enumerate(nodes):
            node.replace_all_uses_with(program.insert(operator.getitem, (pieces, index), after=pieces))
        saved += len(nodes) - 1
    program.cleanup()
    return saved


def split_bias(program: Program, node: fx.Node) -> tuple[fx.Node, Operand] | None:
    """A linear without its bias, and the bias, for an operator that adds one; None where that saves nothing.

    MatMulNBits adds a bias while it multiplies; behind the other products the bias would be an Add of its own.
    """
    call = linear_call(program, node)
    if call is None or isinstance(call, NBitsLinearCall) and not isinstance(call, DualLinearCall):
        return None
    if call.bias is None:
        return node, None
    return call.with_operands(bias=None).insert(program, before=node), call.bias


def take_bias(program: Program, node: fx.Node, users: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """As `split_bias`, of a linear that has a bias and that nothing but `users` reads."""
    if not set(node.users) <= users:
        return None
    parts = split_bias(program, node)
    return None if parts is None or parts[1] is None else (parts[0], parts[1])
