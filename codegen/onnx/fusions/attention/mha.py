"""Attentions without a cache, rewritten to MultiHeadAttention."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.head_layout import flat, laid_out, replace_output
from qcompile.codegen.onnx.fusions.attention.match_mha import PlainAttention, find_plain_attentions
from qcompile.codegen.onnx.fusions.packed_matmul import without_bias
from qcompile.codegen.onnx.fusions.probe import Heads
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx


def rewrite_plain(program: Program, report: PassReport) -> None:
    """Rewrite what match_mha.py finds, in place; the report names what stays and why."""
    biases: dict[tuple[fx.Node, ...], fx.Node] = {}
    for index, attention in enumerate(find_plain_attentions(program)):
        if isinstance(attention, Obstacle):
            report.skip("attention", attention.reason, attention.node)
        else:
            report.done.append(attention.node.name)
            _replace(program, attention, biases, f"attention_{index}")
    report.notes.append(f"{len(report.done)} MultiHeadAttention")
    program.cleanup()


def _replace(program: Program, a: PlainAttention, known: dict[tuple[fx.Node, ...], fx.Node], name: str) -> None:
    parts, bias = _without_bias(program, a, name)
    three = []
    for index, part in enumerate(parts):
        if isinstance(part, Heads):
            three.append(flat(program, part, a.node, f"{name}.{'qkv'[index]}"))
        else:
            order = (0, 3, 1, 2) if a.turned and index == 1 else (0, 2, 1, 3)
            row = program.insert(aten.permute.default, (part, order), before=a.node)
            width = row.meta["val"].shape[2] * row.meta["val"].shape[3]
            three.append(laid_out(program, row, a.node, width))
    padding = a.padding
    if padding is not None:
        padding = _first(program, known, (padding,), _whole, [padding], a.node)
    added = None
    if a.added:
        sized = [three[0], three[1]]
        added = _first(program, known, a.added, _sum, [*sized, *a.added], a.node)
    args = (*three, bias, padding, added, a.heads, a.scale, a.is_causal)
    out = program.insert(ops.multi_head_attention.default, args, before=a.node)
    replace_output(program, a.node, a.heads, out)


def _first(
    program: Program, known: dict[tuple[fx.Node, ...], fx.Node], key: tuple[fx.Node, ...],
    function: object, args: list[fx.Node], before: fx.Node,
) -> fx.Node:  # fmt: skip
    """What a function makes of nodes, made where the first attention asks for it."""
    if key not in known:
        known[key] = program.inline(function, args, before=before)
    return known[key]


def _whole(padding: Tensor) -> Tensor:
    """[B, T] of any dtype as int32."""
    return (padding != 0).to(torch.int32)


def _sum(query: Tensor, key: Tensor, *parts: Tensor) -> Tensor:
    """What is added to the scores of query [B, S, ..] and key [B, T, ..] as [B or 1, H or 1, S, T] floats."""
    least = torch.finfo(query.dtype).min
    numbers = [torch.where(p, 0.0, least) if p.dtype is torch.bool else p.to(query.dtype) for p in parts]
    total = sum(numbers[1:], numbers[0])
    total = total.reshape([1] * (4 - total.ndim) + list(total.shape))
    return total.expand(-1, -1, query.shape[1], key.shape[1]).clamp_min(least).contiguous()


def _without_bias(program: Program, a: PlainAttention, name: str) -> tuple[list[Heads | fx.Node], fx.Node | None]:
    """Queries, keys and values without the biases of their products, and those as one vector, where that saves some."""
    bare: dict[fx.Node, tuple[fx.Node, fx.Node | None] | None] = {}
    for part in a.parts:
        if isinstance(part, Heads) and part.source not in bare:
            bare[part.source] = without_bias(program, part.source)
    found = [bare.get(part.source) if isinstance(part, Heads) else None for part in a.parts]
    parts, biases = list[Heads | fx.Node](), list[Tensor]()
    for part, both in zip(a.parts, found, strict=True):
        if both is None or not isinstance(part, Heads):
            return list(a.parts), None
        parts.append(Heads(both[0], part.rows, part.factor))
        bias = both[1]
        numbers = torch.zeros(len(part.rows)) if bias is None else program.weights[bias.meta[WEIGHT]][part.rows]
        biases.append(numbers)
    if not any(bool(bias.any()) for bias in biases):
        return list(a.parts), None
    return parts, program.add_weight(f"{name}.bias", torch.cat(biases))
