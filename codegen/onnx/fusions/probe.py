"""What parts of a graph compute, found by computing them.

A rotary embedding, a mask or a head layout can be spelled in many ways. Rather than match spellings,
the part between two nodes is run on probes (unit vectors, channel numbers) and what comes out is
compared with what an operator computes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program, hint

aten = torch.ops.aten

_LAYOUTS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.clone.default, aten.flatten.using_ints,
    aten.unflatten.int, aten._to_copy.default, aten.to.dtype, aten.contiguous.default,
}  # fmt: skip
SHAPE_ONLY = {aten.new_ones.default, aten.new_zeros.default, aten.ones_like.default, aten.zeros_like.default}
_CHANNELWISE = _LAYOUTS | {
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.select.int,
    aten.cat.default, aten.stack.default, aten.neg.default, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor,
    aten.index_select.default, operator.getitem,
}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values: channel `rows[h D + d]` of `source`, times `factor`."""

    source: fx.Node
    rows: Tensor
    factor: float


class Unknown(ValueError):
    """A value that the given ones do not determine."""


def evaluate(program: Program, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
    """The value of a node from some others' and the weights.

    Raises:
        Unknown: it needs an input that is not given.
    """
    values: dict[fx.Node, Any] = dict(given)
    stack = [node]
    with torch.no_grad():
        while stack:
            top = stack[-1]
            if top in values:
                stack.pop()
                continue
            missing = [n for n in top.all_input_nodes if n not in values]
            if missing:
                stack.extend(missing)
                continue
            values[top] = _compute(program, top, values)
    return values[node]


def _compute(program: Program, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        name = program.weight_name(node)
        if name is None:
            raise Unknown(node.name)
        return program.weights[name]
    if node.op == "get_attr":
        return getattr(program.graph_module, str(node.target))
    args = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    return node.target(*args, **kwargs)


def token_values(program: Program, mask: fx.Node | None) -> set[fx.Node]:
    """Nodes whose numbers depend on the tokens or the cache, not only on their count or on the mask (if given)."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if program.weight_name(node) is None and node is not mask:
                found.add(node)
        elif isinstance(node.meta.get("val"), (torch.SymInt, int)) or node.target in SHAPE_ONLY:
            continue
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def origin(node: fx.Node, tokens: set[fx.Node]) -> fx.Node:
    """The last value that all of `node` is made of, going back through layouts and position-wise factors.

    Between lie only operations that are linear in the channels of one position: a rotary embedding's
    products with tables (which have a dimension of positions), sums of such, and layouts.
    """
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    frontier, single = {node}, node
    while True:
        latest = max(frontier, key=lambda n: order[n])
        before = [n for n in latest.all_input_nodes if n in tokens]
        tables = [n for n in latest.all_input_nodes if n not in tokens]
        if not before or latest.target not in _CHANNELWISE or not all(map(_of_positions, tables)):
            return single
        if latest.target is aten.mul.Tensor and len(before) == 2:  # a gate: not linear
            return single
        frontier = (frontier - {latest}) | set(before)
        if len(frontier) == 1:
            single = next(iter(frontier))


def _of_positions(node: fx.Node) -> bool:
    """Sizes, and tables with a row for each position."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.ndim == 0 or any(not isinstance(d, int) for d in value.shape)


def through_layouts(node: fx.Node) -> fx.Node:
    """Back to the value whose layout `node` is."""
    while node.op == "call_function" and node.target in _LAYOUTS:
        node = node.args[0]
    return node


def channels(node: fx.Node) -> list[int]:
    """The fixed sizes of a value: heads and channels, not rows and tokens."""
    return [d for d in node.meta["val"].shape if isinstance(d, int)]


def filled(node: fx.Node, numbers: Tensor) -> Tensor:
    """A value of `node`'s shape in the example whose fixed dimensions hold `numbers`, in row-major order."""
    shape = node.meta["val"].shape
    rows = numbers.reshape([d if isinstance(d, int) else 1 for d in shape])
    return rows.expand([hint(d) for d in shape]).contiguous()


def as_heads(value: Tensor, rows: int) -> Tensor:
    """A value [B, H, ..] as it is, [B H, ..] as [B, H, ..]."""
    return value.unflatten(0, (rows, -1)) if value.ndim == 3 else value


def heads_of(
    program: Program, node: fx.Node, source: fx.Node, given: Mapping[fx.Node, Any], rows: int, everywhere: bool = False
) -> Heads | None:
    """Which channels of `source` are heads and channels of `node` ([B, H, S, D] or [B H, S, D]), if they are that.

    Looked at in the first position; or, `everywhere`, in all, and the last dimension of `source` are its channels.
    """
    shape = source.meta["val"].shape
    numbers = torch.arange(1.0, (shape[-1] if everywhere else math.prod(channels(source))) + 1)

    def at(value: Tensor) -> Tensor:
        full = value.expand([hint(d) for d in shape]) if everywhere else filled(source, value)
        found = as_heads(evaluate(program, node, {**given, source: full}), rows)
        return found[0] if everywhere else found[0, :, :1]

    ones = at(torch.ones_like(numbers))
    factor = float(ones.flatten()[0])
    if factor == 0 or not bool((ones == factor).all()):
        return None
    found = at(numbers) / factor
    if not torch.allclose(found, found.round(), atol=1e-3) or not bool((found == found[:, :1]).all()):
        return None
    return Heads(source, found[:, 0].round().long().flatten() - 1, factor)


def inputs_behind(program: Program, node: fx.Node, without: fx.Node) -> set[fx.Node]:
    """The inputs whose numbers, not only whose sizes, a node is made of; the way through `without` does not count."""
    found, seen, stack = set[fx.Node](), {without}, [node]
    while stack:
        top = stack.pop()
        if top in seen or isinstance(top.meta.get("val"), (torch.SymInt, int)) or top.target in SHAPE_ONLY:
            continue
        seen.add(top)
        if top.op == "placeholder" and program.weight_name(top) is None:
            found.add(top)
        stack.extend(top.all_input_nodes)
    return found
