"""Products that share their input: one product of their weights, one below the other, computes them all.

q, k and v of an attention, gate and up of an MLP: found by the node that they read. Each output is a slice of the one
result, with the same bits, since every channel is computed by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.ir.aten_ops import aten
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.op_calls import QLinearCall, QuantizeCall
from qcompile.ir.program import Program
from qcompile.numerics.qtensor import StoredParts

_BY_STRIDES = frozenset({aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default})


@dataclass(frozen=True)
class Siblings:
    """Calls of qlinear that differ in their weights only, in graph order; one of them is usual.

    Attributes:
        nodes: the calls.
        calls: their views.
    """

    nodes: tuple[fx.Node, ...]
    calls: tuple[QLinearCall, ...]

    @property
    def first(self) -> QLinearCall:
        """What is common to all: x, formats, K and dtype."""
        return self.calls[0]

    @property
    def channels(self) -> list[int]:
        """N of each."""
        return [int(call.weight.meta["val"].shape[0]) for call in self.calls]

    def replace(self, program: Program, result: fx.Node) -> None:
        """Give each call's readers its channels of the result [.., sum of N]."""
        if len(self.nodes) == 1:
            self.nodes[0].replace_all_uses_with(result)
            return
        start = 0
        for node, n in zip(self.nodes, self.channels, strict=True):
            part = program.insert(aten.slice.Tensor, (result, -1, start, start + n), before=self.nodes[0])
            if not _takes_any_strides(node):
                part = program.insert(
                    aten.clone.default, (part,), {"memory_format": torch.contiguous_format}, before=self.nodes[0]
                )
            node.replace_all_uses_with(part)
            start += n


def _takes_any_strides(node: fx.Node) -> bool:
    """Make every reader of a product one that takes rows of wider ones, in place; False where one cannot.

    A captured `view` is legal for the strides that were traced, also behind other operators that give no new memory:
    there `reshape` says the same. What is handed out, or read by its strides, must stay dense.
    """
    visited, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user.op == "output" or user.target in _BY_STRIDES:
                return False
            if user.target in (aten.view.default, aten._unsafe_view.default):
                user.target = aten.reshape.default
            if user not in visited and _gives_no_new_memory(user):
                visited.add(user)
                todo.append(user)
    return True


def _gives_no_new_memory(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return aliases or node.target is operator.getitem


def share_quantizations(program: Program) -> None:
    """Quantize each activation once, in place: a model whose modules were quantized one by one has a call for each."""
    first: dict[object, fx.Node] = {}
    for node in list(program.graph.nodes):
        key: object = None
        if QuantizeCall.matches(node):
            call = QuantizeCall.of(node)
            key = None if call.x.meta.get(WRITTEN) else call  # which may be another value by then
        elif node.target is operator.getitem and QuantizeCall.matches(node.args[0]):
            key = node.args
        if key is not None and first.setdefault(key, node) is not node:
            node.replace_all_uses_with(first[key])
            program.graph.erase_node(node)


def find_siblings(program: Program) -> list[Siblings]:
    """All calls of qlinear, those that can be one product together; in graph order of the first."""
    groups: dict[object, list[tuple[fx.Node, QLinearCall]]] = {}
    for node, call in QLinearCall.find(program):
        groups.setdefault(_key(program, node, call), []).append((node, call))
    return [Siblings(*zip(*members, strict=True)) for members in groups.values()]


def merged_parts(parts: Sequence[StoredParts]) -> StoredParts:
    """The stored tensors of weights, one below the other: all have one format, with scales of rows or groups."""
    if len(parts) == 1:
        return parts[0]
    codes, scale, zero, group_scale = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scale), _joined(zero), _joined(group_scale)


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _key(program: Program, node: fx.Node, call: QLinearCall) -> object:
    """Equal for calls that can be one; a call that must stay alone is its own key."""
    weights = [part for part in (*call.stored, call.bias) if part is not None]
    if (
        call.x.meta.get(WRITTEN)
        or call.weight_format.per == "tensor"
        or any(program.weight_name(part) is None for part in weights)
    ):
        return node
    has = tuple(part is not None for part in (call.zero, call.group_scale, call.bias))
    return call.x, call.x_scale, call.x_zero, call.format, call.act, call.columns, call.dtype, has
