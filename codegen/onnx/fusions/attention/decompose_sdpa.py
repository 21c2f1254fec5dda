"""Attentions that stay in operators of the standard, spelled out so that nothing is copied to be multiplied.

What the exporter makes of an attention repeats keys and values for every head of their group and multiplies the keys by
half of the scale: both pass over the whole cache for each new token. Here the heads of a group are rows of one product
with the keys they share, and the queries take the scale. A row that sees nothing is zero, as torch has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program

aten = torch.ops.aten

_VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.clone.default,
}  # fmt: skip


def spell_out(program: Program) -> int:
    """Rewrite every attention under a mask of booleans or none, in place; returns how many."""
    found = 0
    for node in list(program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)):
        query, key, value, mask, dropout, is_causal = [*node.args, *(None, 0.0, False)[len(node.args) - 3 :]]
        four = all(len(part.meta["val"].shape) == 4 for part in (query, key, value))
        if not four or dropout or is_causal or (mask is not None and mask.meta["val"].dtype is not torch.bool):
            continue
        if mask is not None and len(mask.meta["val"].shape) != 4:
            continue
        shared = _shared(key), _shared(value)
        if shared[0].meta["val"].shape[1] != shared[1].meta["val"].shape[1]:
            shared = key, value
        scale = node.kwargs.get("scale") or 1 / math.sqrt(query.meta["val"].shape[-1])
        node.replace_all_uses_with(_attention(program, node, query, *shared, mask, scale))
        program.graph.erase_node(node)
        found += 1
    program.cleanup()
    return found


def _shared(repeated: fx.Node) -> fx.Node:
    """What [B, heads, T, D] repeats, each of its heads as often: [B, groups, T, D]; itself if it repeats nothing."""
    node = repeated
    while node.target in _VIEWS:
        node = node.args[0]
    if node.target is aten.repeat_interleave.self_int and node is repeated and tuple(node.args[2:]) in ((1,), (-3,)):
        return node.args[0]
    if node.target is not aten.expand.default:
        return repeated
    wide, source = node.meta["val"].shape, node.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten.unsqueeze.default or source.args[1] not in (2, -3):
        return repeated
    (groups, _, *rest), heads = wide[1:], repeated.meta["val"].shape[1]
    before = source.args[0]
    assert isinstance(before, fx.Node)
    same = before.meta["val"].shape[1] == groups and tuple(rest) == tuple(repeated.meta["val"].shape[2:])
    return before if len(wide) == 5 and same and heads == groups * wide[2] else repeated


def _attention(
    program: Program, at: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None, scale: float
) -> fx.Node:
    """Queries [B, H, S, D] over keys [B, G, T, D] and values [B, G, T, V]; mask: [B or 1, H or 1, S, T].

    The two products are one call each: tracing would make each of them several, with copies.
    """
    turned = program.insert(aten.transpose.int, (key, -1, -2), before=at)
    rows = program.inline(_rows, [query, key, scale], before=at)
    scores = program.insert(aten.matmul.default, (rows, turned), before=at)
    weights = program.inline(_weights, [scores, query, mask], before=at)
    summed = program.insert(aten.matmul.default, (weights, value), before=at)
    return program.inline(_heads, [summed, query, mask], before=at)


def _rows(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled queries, those of a group's heads one after another: [B, G, H / G * S, D]."""
    return (query * scale).reshape(query.shape[0], key.shape[1], -1, query.shape[3])


def _weights(scores: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax of scores [B, G, H / G * S, T]."""
    if mask is None:
        return scores.softmax(-1)
    by_head = scores.reshape(*query.shape[:3], scores.shape[3])
    seen = by_head + torch.where(mask, 0.0, torch.finfo(torch.float32).min)  # finite: a row may see nothing
    return seen.softmax(-1).reshape(scores.shape)


def _heads(summed: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, S, V] of sums of values [B, G, H / G * S, V]."""
    out = summed.reshape(*query.shape[:3], summed.shape[3])
    return out if mask is None else out * mask.any(-1, keepdim=True)
