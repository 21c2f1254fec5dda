"""Flattened heads: values [B, H, S, D] as the [B, S, H D] that ONNX Runtime's attentions take and return."""

from __future__ import annotations

import math

import torch
from torch import fx

from qcompile.codegen.onnx.fusions.attention.head_channels import HeadChannels, fixed_sizes
from qcompile.codegen.onnx.fusions.packed_matmul import OutputChannels, linear_call, pack
from qcompile.codegen.onnx.fusions.partial_evaluation import evaluate
from qcompile.ir.aten_ops import RESHAPES, TRANSPOSES, Ops
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

aten = torch.ops.aten

_FLATTENING: Ops = RESHAPES | TRANSPOSES
"""What stands between an attention and its flattened heads: every element stays, once."""


def reshape_to_batch(program: Program, node: fx.Node, before: fx.Node, *sizes: int) -> fx.Node:
    """A value as [B, S, *sizes]; one of a linear may be [B S, N], then the first input is [B, S]."""
    if node.meta["val"].ndim == 3 and len(sizes) == 1:
        return node
    sized = node if node.meta["val"].ndim > 2 else program.inputs[0]
    batch_and_length = [_size(program, sized, axis, before) for axis in (0, 1)]
    return program.insert(aten.reshape.default, (node, [*batch_and_length, *sizes]), before=before)


def _size(program: Program, node: fx.Node, axis: int, before: fx.Node) -> fx.Node | int:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else program.insert(aten.sym_size.int, (node, axis), before=before)


def flatten_heads(program: Program, heads: HeadChannels, before: fx.Node, name: str) -> fx.Node:
    """Queries, keys or values as [B, S, H D], heads and their channels in order.

    Args:
        program: of the value.
        heads: the channels.
        before: where to insert.
        name: prefix of new weights' names.
    """
    source, rows = heads.source, heads.rows
    if linear_call(program, source) is not None:
        if not torch.equal(rows, torch.arange(source.meta["val"].shape[-1])):
            source = pack(program, [OutputChannels(source, rows)], before, name)
        return reshape_to_batch(program, source, before, len(rows))
    shape = source.meta["val"].shape
    if len(shape) == 4 and isinstance(shape[1], int):  # [B, H, S, D]
        source = program.insert(aten.transpose.int, (source, 1, 2), before=before)
    width = math.prod(fixed_sizes(source))
    flat = reshape_to_batch(program, source, before, width)
    if torch.equal(rows, torch.arange(width)):
        return flat
    selected = program.add_weight(f"{name}.rows", rows)
    return program.insert(aten.index_select.default, (flat, 2, selected), before=before)


def find_flattened(program: Program, node: fx.Node, heads: int) -> fx.Node | None:
    """The node behind an attention's output [B, H, S, D] or [B H, S, D] that flattens it to [B, S, H D], if any."""
    shape = [hint(d) for d in node.meta["val"].shape]
    indices = torch.arange(float(math.prod(shape))).reshape(shape)
    want = (indices if len(shape) == 4 else indices.unflatten(0, (-1, heads))).transpose(1, 2).flatten(2)
    inputs = {n: torch.zeros([hint(d) for d in n.meta["val"].shape]) for n in program.inputs}
    last = node
    while len(last.users) == 1:
        last = next(iter(last.users))
        if last.target not in _FLATTENING:
            return None
        if torch.equal(evaluate(program, last, {**inputs, node: indices}), want):
            return last
    return None


def replace_output(program: Program, node: fx.Node, heads: int, out: fx.Node) -> None:
    """Let `out`, [B, S, H D], take the place of an attention's output `node`, [B, H, S, D] or [B H, S, D]."""
    flattened = find_flattened(program, node, heads)
    if flattened is not None:
        flattened.replace_all_uses_with(out)
        while flattened is not node:
            source: fx.Node = flattened.args[0]
            program.graph.erase_node(flattened)
            flattened = source
    else:
        size = node.meta["val"].shape[-1]
        by_head = reshape_to_batch(program, out, node, heads, size)
        unflattened = program.insert(aten.transpose.int, (by_head, 1, 2), before=node)
        if node.meta["val"].ndim == 3:
            unflattened = program.insert(aten.flatten.using_ints, (unflattened, 0, 1), before=node)
        node.replace_all_uses_with(unflattened)
    program.graph.erase_node(node)  # it may have a dropout, which dead code elimination keeps
