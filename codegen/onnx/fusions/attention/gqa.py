"""Attentions with a cache, rewritten to GroupQueryAttention."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.head_layout import flat, laid_out, replace_output
from qcompile.codegen.onnx.fusions.attention.match_gqa import CachedAttention, find_attentions
from qcompile.codegen.onnx.fusions.packed_matmul import Part, can_join, is_product, join
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

_FUSED = ops.group_attention.default


def rewrite_cached(program: Program, positions: int, report: PassReport) -> None:
    """Rewrite what match_gqa.py finds, in place; the report names what stays and why."""
    shared = _Shared(program)
    for index, attention in enumerate(find_attentions(program, positions)):
        if isinstance(attention, Obstacle):
            report.skip("attention", attention.reason, attention.node)
        elif (reason := _unfit(attention)) is not None:
            report.skip("attention", reason, attention.node.name)
        else:
            report.done.append(attention.node.name)
            _replace(program, attention, shared, f"attention_{index}")
    report.notes.append(f"{len(report.done)} GroupQueryAttention")
    program.cleanup()
    _lengths_of_the_mask(program)


def _unfit(attention: CachedAttention) -> str | None:
    """What ONNX Runtime's kernel cannot do, or None."""
    size = attention.past[0].meta["val"].shape[-1]
    if size % 8:
        return f"heads of {size}: GroupQueryAttention takes multiples of 8"
    if attention.rotary is not None and attention.rotary.cos.shape[1] % 8:
        return f"a rotary embedding of {2 * attention.rotary.cos.shape[1]} channels: it takes multiples of 16"
    return None


class _Shared:
    """Values that all attentions read, made when the first asks."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.known: dict[bytes, fx.Node] = {}
        self.lengths: list[fx.Node] = []

    def table(self, name: str, numbers: Tensor) -> fx.Node:
        """A weight; equal ones are one."""
        key = name.encode() + numbers.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.program.add_weight(f"{name}_{len(self.known)}", numbers)
        return self.known[key]

    def of_the_mask(self) -> list[fx.Node]:
        """Its `lengths`."""
        if not self.lengths:
            both = self.program.insert(
                ops.lengths.default, (self.program.inputs[1],), after=self.program.placeholders[-1]
            )
            self.lengths += self.program.unpack(both, 2)
        return self.lengths

    def bias(self, numbers: Tensor, before: fx.Node) -> fx.Node:
        """[H, positions] as what is added to the scores, [1, H, S, P + S]."""
        key = b"added" + numbers.numpy().tobytes()
        if key not in self.known:
            ids, mask = self.program.inputs[:2]
            nodes = [self.table("places", numbers), ids, mask]
            self.known[key] = self.program.inline(_bias_of_places, nodes, before=before)
        return self.known[key]


def _bias_of_places(table: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """table [H, positions] of the places, ids [B, S], mask [B, P + S] -> [1, H, S, P + S]."""
    return table[None, :, None, : mask.shape[1]].expand(1, -1, ids.shape[1], -1).contiguous()


def _replace(program: Program, a: CachedAttention, shared: _Shared, name: str) -> None:
    cos = sin = None
    if a.rotary is not None:
        cos, sin = shared.table("cos_cache", a.rotary.cos), shared.table("sin_cache", a.rotary.sin)
    three = (a.queries, a.keys, a.values)
    sources = [h.source for h in three]
    key_node = value_node = None
    if all(is_product(program, s) for s in sources) and can_join(program, sources):
        parts = [Part(h.source, h.rows) for h in three]
        query = laid_out(program, join(program, parts, a.node, name), a.node, sum(len(h.rows) for h in three))
    else:
        query, key_node, value_node = (
            flat(program, h, a.node, f"{name}.{part}") for h, part in zip(three, "qkv", strict=True)
        )
    lengths = shared.of_the_mask()
    bias = None if a.bias is None else shared.bias(a.bias, a.node)
    interleaved = a.rotary is not None and a.rotary.interleaved
    args = (query, key_node, value_node, *a.past, *lengths, cos, sin, a.heads, a.scale, a.window, interleaved, a.cap)
    fused = program.insert(_FUSED, (*args, bias), before=a.node)
    out, keys, values = program.unpack(fused, 3)
    for old, new in zip(a.present, (keys, values), strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user.op == "output")
    replace_output(program, a.node, a.heads, out)


def _lengths_of_the_mask(program: Program) -> None:
    """The length of a cache, where something else than an attention asks for it, as mask less new tokens.

    A runtime may hand over a longer buffer to extend in place; the mask has the length of the text.
    """
    ids, mask, *caches = program.inputs
    asked = [
        user
        for cache in caches
        for user in cache.users
        if user.target is aten.sym_size.int and user.args[1] == 2 and user.users
    ]
    if asked:
        start = program.placeholders[-1]
        total = program.insert(aten.sym_size.int, (mask, 1), after=start)
        new = program.insert(aten.sym_size.int, (ids, 1), after=total)
        past = program.insert(operator.sub, (total, new), after=new)
        for node in asked:
            node.replace_all_uses_with(past)
    program.cleanup()
