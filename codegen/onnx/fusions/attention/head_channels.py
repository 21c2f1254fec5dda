"""Which channels of which value are the heads of an attention's queries, keys or values.

Channel indices are sent through the graph; what comes out is the layout of the heads, however the model writes it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.fusions.partial_evaluation import evaluate
from qcompile.ir.aten_ops import CASTS, EXPANDS, JOINS, RESHAPES, SLICES, SPLITS, TRANSPOSES, Ops, reads_elements
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

aten = torch.ops.aten

LAYOUTS: Ops = RESHAPES | TRANSPOSES | EXPANDS | CASTS
"""Moves, repeats or casts elements, and drops none: heads behind them are still whole."""

_CHANNELWISE: Ops = (
    LAYOUTS
    | SLICES
    | SPLITS
    | JOINS
    | {
        aten.neg.default,
        aten.mul.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.index_select.default,
        operator.getitem,
    }
)
"""What a rotary embedding consists of: linear in the channels of one position."""


@dataclass(frozen=True)
class HeadChannels:
    """Queries, keys or values as channels of a value.

    Attributes:
        source: the value, usually what a linear returns.
        rows: [H D] indices: channel d of head h is channel rows[h D + d] of `source` (row of the linear's weight).
        factor: what the channels are multiplied by.
    """

    source: fx.Node
    rows: Tensor
    factor: float


def find_head_channels(
    program: Program,
    node: fx.Node,
    source: fx.Node,
    given: Mapping[fx.Node, Any],
    batch: int,
    all_positions: bool = False,
) -> HeadChannels | None:
    """The channels of `source` that are the heads of `node`, [B, H, S, D] or [B H, S, D]; None if it is more than that.

    Args:
        program: both nodes are of it.
        node: queries, keys or values.
        source: upstream of `node`.
        given: values of the inputs.
        batch: B.
        all_positions: compare all positions, and the last dimension of `source` are its channels; else the first
            position only, where a rotary embedding rotates by zero, and all fixed dimensions are channels.
    """
    shape = source.meta["val"].shape
    indices = torch.arange(1.0, (shape[-1] if all_positions else math.prod(fixed_sizes(source))) + 1)

    def at(value: Tensor) -> Tensor:
        full = value.expand([hint(d) for d in shape]) if all_positions else fill_channels(source, value)
        heads = split_batch(evaluate(program, node, {**given, source: full}), batch)
        return heads[0] if all_positions else heads[0, :, :1]

    ones = at(torch.ones_like(indices))
    factor = float(ones.flatten()[0])
    if factor == 0 or not bool((ones == factor).all()):
        return None
    found = at(indices) / factor
    if not torch.allclose(found, found.round(), atol=1e-3) or not bool((found == found[:, :1]).all()):
        return None
    return HeadChannels(source, found[:, 0].round().long().flatten() - 1, factor)


def channel_source(node: fx.Node, tokens: set[fx.Node]) -> fx.Node:
    """The first value upstream that alone determines `node`, through layouts and position-wise factors.

    Between lie only operations that are linear in the channels of one position: a rotary embedding's
    products with tables (which have a dimension of positions), sums of such, and layouts.

    Args:
        node: queries, keys or values.
        tokens: nodes that depend on the tokens; see token_dependent_nodes.
    """
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    frontier, single = {node}, node
    while True:
        latest = max(frontier, key=lambda n: order[n])
        operands = [n for n in latest.all_input_nodes if reads_elements(latest, n)]
        upstream = [n for n in operands if n in tokens]
        tables = [n for n in operands if n not in tokens]
        if not upstream or latest.target not in _CHANNELWISE or not all(map(_is_size_or_position_table, tables)):
            return single
        if latest.target is aten.mul.Tensor and len(upstream) == 2:  # a gate: not linear
            return single
        frontier = (frontier - {latest}) | set(upstream)
        if len(frontier) == 1:
            single = next(iter(frontier))


def _is_size_or_position_table(node: fx.Node) -> bool:
    """Sizes, scalars, and tables with a row for each position."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.ndim == 0 or any(not isinstance(d, int) for d in value.shape)


def before_layouts(node: fx.Node) -> fx.Node:
    """The value that `node` is another layout of."""
    while node.op == "call_function" and node.target in LAYOUTS:
        node = node.args[0]
    return node


def fixed_sizes(node: fx.Node) -> list[int]:
    """The sizes of a value that are not dynamic: heads and channels, not batch and tokens."""
    return [d for d in node.meta["val"].shape if isinstance(d, int)]


def fill_channels(node: fx.Node, channels: Tensor) -> Tensor:
    """A value of the traced shape of `node` whose fixed dimensions hold `channels`, in row-major order."""
    shape = node.meta["val"].shape
    rows = channels.reshape([d if isinstance(d, int) else 1 for d in shape])
    return rows.expand([hint(d) for d in shape]).contiguous()


def split_batch(value: Tensor, batch: int) -> Tensor:
    """[B H, ..] as [B, H, ..]; a value [B, H, ..] of four dimensions as it is."""
    return value.unflatten(0, (batch, -1)) if value.ndim == 3 else value
