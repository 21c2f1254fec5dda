"""Heads in a row: values [B, H, S, D] as the [B, S, H D] that ONNX Runtime's attentions take and give."""

from __future__ import annotations

import math

import torch
from torch import fx

from qcompile.codegen.onnx.fusions.packed_matmul import Part, is_product, join
from qcompile.codegen.onnx.fusions.probe import Heads, channels, evaluate
from qcompile.ir.program import Program, hint

aten = torch.ops.aten

_FORWARD = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.clone.default,
}  # fmt: skip


def laid_out(program: Program, node: fx.Node, before: fx.Node, *inner: int) -> fx.Node:
    """A value as [B, S, *inner]; products may hand over [B S, N], then the first input is [B, S]."""
    if node.meta["val"].ndim == 3 and len(inner) == 1:
        return node
    sized = node if node.meta["val"].ndim > 2 else program.inputs[0]
    sizes = [_size(program, sized, d, before) for d in (0, 1)]
    return program.insert(aten.reshape.default, (node, [*sizes, *inner]), before=before)


def _size(program: Program, node: fx.Node, dim: int, before: fx.Node) -> fx.Node | int:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else program.insert(aten.sym_size.int, (node, dim), before=before)


def flat(program: Program, heads: Heads, before: fx.Node, name: str) -> fx.Node:
    """[B, S, H D] of queries, keys or values in order."""
    source, rows = heads.source, heads.rows
    if is_product(program, source):
        if not torch.equal(rows, torch.arange(source.meta["val"].shape[-1])):
            source = join(program, [Part(source, rows)], before, name)
        return laid_out(program, source, before, len(rows))
    shape = source.meta["val"].shape
    if len(shape) == 4 and isinstance(shape[1], int):  # [B, H, S, D]
        source = program.insert(aten.transpose.int, (source, 1, 2), before=before)
    width = math.prod(channels(source))
    whole = laid_out(program, source, before, width)
    if torch.equal(rows, torch.arange(width)):
        return whole
    chosen = program.add_weight(f"{name}.rows", rows)
    return program.insert(aten.index_select.default, (whole, 2, chosen), before=before)


def flattened(program: Program, node: fx.Node, heads: int) -> fx.Node | None:
    """The node behind an attention's output [B, H, S, D] or [B H, S, D] that lays it out as [B, S, H D]."""
    shape = [hint(d) for d in node.meta["val"].shape]
    numbers = torch.arange(float(math.prod(shape))).reshape(shape)
    want = (numbers if len(shape) == 4 else numbers.unflatten(0, (-1, heads))).transpose(1, 2).flatten(2)
    sizes = {n: torch.zeros([hint(d) for d in n.meta["val"].shape]) for n in program.inputs}
    start = node
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in _FORWARD:
            return None
        if torch.equal(evaluate(program, node, {**sizes, start: numbers}), want):
            return node
    return None


def replace_output(program: Program, node: fx.Node, heads: int, out: fx.Node) -> None:
    """Let `out`, [B, S, H D], stand for an attention's output `node`, [B, H, S, D] or [B H, S, D], and drop that."""
    whole = flattened(program, node, heads)
    if whole is not None:
        whole.replace_all_uses_with(out)
        while whole is not node:
            source: fx.Node = whole.args[0]
            program.graph.erase_node(whole)
            whole = source
    else:
        size = node.meta["val"].shape[-1]
        split = program.insert(aten.transpose.int, (laid_out(program, out, node, heads, size), 1, 2), before=node)
        if node.meta["val"].ndim == 3:
            split = program.insert(aten.flatten.using_ints, (split, 0, 1), before=node)
        node.replace_all_uses_with(split)
    program.graph.erase_node(node)  # it may have a dropout: no clean-up would drop it
