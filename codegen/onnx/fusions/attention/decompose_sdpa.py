"""Attentions in standard ONNX operators, decomposed so that nothing is copied to be multiplied.

torch.onnx repeats keys and values for every head of their group and multiplies the keys by half of the scale: both pass
over the whole cache for each new token. Here the heads of a group are rows of one matmul with the keys they share, and
the queries take the scale. A row that attends to nothing is zero, as torch has it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.codegen.sdpa_call import SDPACall, before_repeat
from qcompile.ir.aten_ops import SDPA
from qcompile.ir.program import Program

aten = torch.ops.aten


def decompose_attentions(program: Program) -> int:
    """Decompose every attention with a mask of booleans or none, in place; returns how many."""
    count = 0
    for node in list(program.graph.find_nodes(op="call_function", target=SDPA)):
        call = SDPACall.of(node)
        query, key, value, mask = call.query, call.key, call.value, call.attn_mask
        is_4d = all(len(part.meta["val"].shape) == 4 for part in (query, key, value))
        is_bool = mask is None or (mask.meta["val"].dtype is torch.bool and len(mask.meta["val"].shape) == 4)
        if not is_4d or not is_bool or call.dropout_p or call.is_causal:
            continue
        shared = before_repeat(key), before_repeat(value)
        if shared[0].meta["val"].shape[1] != shared[1].meta["val"].shape[1]:
            shared = key, value
        node.replace_all_uses_with(_decompose(program, node, query, *shared, mask, call.score_scale))
        program.graph.erase_node(node)
        count += 1
    program.cleanup()
    return count


def _decompose(
    program: Program, before: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None, scale: float
) -> fx.Node:
    """Queries [B, H, S, D] over keys [B, G, T, D] and values [B, G, T, V]; mask: [B or 1, H or 1, S, T].

    The two matmuls are one call each: tracing would make each of them several, with copies.
    """
    keys_transposed = program.insert(aten.transpose.int, (key, -1, -2), before=before)
    rows = program.inline(_scale_and_group, [query, key, scale], before=before)
    scores = program.insert(aten.matmul.default, (rows, keys_transposed), before=before)
    weights = program.inline(_softmax, [scores, query, mask], before=before)
    grouped = program.insert(aten.matmul.default, (weights, value), before=before)
    return program.inline(_ungroup, [grouped, query, mask], before=before)


def _scale_and_group(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled queries, those of a group's heads one after another: [B, G, H / G * S, D]."""
    return (query * scale).reshape(query.shape[0], key.shape[1], -1, query.shape[3])


def _softmax(scores: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax of scores [B, G, H / G * S, T]."""
    if mask is None:
        return scores.softmax(-1)
    by_head = scores.reshape(*query.shape[:3], scores.shape[3])
    masked = by_head + torch.where(mask, 0.0, torch.finfo(torch.float32).min)  # finite: a row may attend to nothing
    return masked.softmax(-1).reshape(scores.shape)


def _ungroup(grouped: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, S, V] of weighted values [B, G, H / G * S, V]."""
    out = grouped.reshape(*query.shape[:3], grouped.shape[3])
    return out if mask is None else out * mask.any(-1, keepdim=True)
