"""A captured model in operators that ONNX Runtime has: norms, attentions with their cache, joined products.

Nothing is matched by name. Norms come from qcompile.norms, attentions from attention.py (recognised by
what they compute), products are joined where they read the same value. What has no operator is left as
it is and named in the report.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from qcompile.codegen.onnx.attention import CachedAttention, Heads, find_attentions
from qcompile.codegen.onnx.probe import channels, evaluate
from qcompile.codegen.onnx.products import Part, can_join, is_product, join, join_siblings
from qcompile.codegen.onnx.tables import Shared, share_tables
from qcompile.norms import Norm, find_norms
from qcompile.program import Program, hint
from qcompile.report import PassReport
from qcompile.rotation_flow import Obstacle

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

_FORWARD = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.clone.default,
}  # fmt: skip


def rewrite(program: Program, positions: int | None) -> tuple[PassReport, list[Shared]]:
    """Rewrite in place.

    Args:
        positions: for a decoder with inputs (ids, attention_mask, caches ..): the length of its rotary tables.

    Returns:
        What became operators and what did not, and the embeddings that gather from codes now.
    """
    report = PassReport("operators of ONNX Runtime")
    if positions is not None:
        tables: dict[bytes, tuple[fx.Node, fx.Node]] = {}
        lengths: list[fx.Node] = []
        for index, attention in enumerate(find_attentions(program, positions)):
            if isinstance(attention, Obstacle):
                report.leave("attention", attention.reason, attention.node)
            elif (reason := _unfit(attention)) is not None:
                report.leave("attention", reason, attention.node.name)
            else:
                report.done.append(attention.node.name)
                _replace_attention(program, attention, tables, lengths, f"attention_{index}")
        report.notes.append(f"{len(report.done)} GroupQueryAttention")
        program.cleanup()
        _lengths_of_the_mask(program)
    joined = join_siblings(program)
    norms = [norm.output.name for i, norm in enumerate(find_norms(program)) if _replace_norm(program, norm, i)]
    program.cleanup()
    shared = share_tables(program)
    report.done += norms
    report.notes.append(f"{len(norms)} RMSNorms, {joined} products joined to another of the same input")
    report.notes += [f"{table.name} is gathered from the codes of the logits" for table in shared]
    return report, shared


def _unfit(attention: CachedAttention) -> str | None:
    """What ONNX Runtime's kernel cannot do, or None."""
    size = attention.past[0].meta["val"].shape[-1]
    if size % 8:
        return f"heads of {size}: GroupQueryAttention takes multiples of 8"
    if attention.rotary is not None and attention.rotary.cos.shape[1] % 8:
        return f"a rotary embedding of {2 * attention.rotary.cos.shape[1]} channels: it takes multiples of 16"
    return None


def _replace_attention(
    program: Program,
    a: CachedAttention,
    tables: dict[bytes, tuple[fx.Node, fx.Node]],
    lengths: list[fx.Node],
    name: str,
) -> None:
    if not lengths:
        mask = program.inputs[1]
        both = program.insert(ops.lengths.default, (mask,), after=program.placeholders[-1])
        lengths += _items(program, both, 2)
    cos = sin = None
    if a.rotary is not None:
        key = a.rotary.cos.numpy().tobytes() + a.rotary.sin.numpy().tobytes()
        if key not in tables:
            tables[key] = (
                program.add_weight(f"cos_cache_{len(tables)}", a.rotary.cos),
                program.add_weight(f"sin_cache_{len(tables)}", a.rotary.sin),
            )
        cos, sin = tables[key]
    three = (a.queries, a.keys, a.values)
    sources = [h.source for h in three]
    key_node = value_node = None
    if all(is_product(program, s) for s in sources) and can_join(program, sources):
        parts = [Part(h.source, h.rows) for h in three]
        query = _laid_out(program, join(program, parts, a.node, name), a.node, sum(len(h.rows) for h in three))
    else:
        query, key_node, value_node = (
            _flat(program, h, a.node, f"{name}.{part}") for h, part in zip(three, "qkv", strict=True)
        )
    interleaved = a.rotary is not None and a.rotary.interleaved
    args = (query, key_node, value_node, *a.past, *lengths, cos, sin, a.heads, a.scale, a.window, interleaved)
    fused = program.insert(ops.group_attention.default, args, before=a.node)
    out, keys, values = _items(program, fused, 3)
    for old, new in zip(a.present, (keys, values), strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user.op == "output")
    node = _flattened(program, a)
    if node is not None:
        node.replace_all_uses_with(out)
        while node is not a.node:
            source: fx.Node = node.args[0]
            program.graph.erase_node(node)
            node = source
    else:
        size = a.past[0].meta["val"].shape[-1]
        split = _laid_out(program, out, a.node, a.heads, size)
        a.node.replace_all_uses_with(program.insert(aten.transpose.int, (split, 1, 2), before=a.node))
    program.graph.erase_node(a.node)  # it has a dropout: no clean-up would drop it


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


def _items(program: Program, node: fx.Node, count: int) -> list[fx.Node]:
    return [program.insert(operator.getitem, (node, index), after=node) for index in range(count)]


def _laid_out(program: Program, node: fx.Node, before: fx.Node, *inner: int) -> fx.Node:
    """A value as [B, S, *inner]; products may hand over [B S, N]."""
    if node.meta["val"].ndim == 3 and len(inner) == 1:
        return node
    ids = program.inputs[0]
    sizes = [program.insert(aten.sym_size.int, (ids, d), before=before) for d in (0, 1)]
    return program.insert(aten.reshape.default, (node, [*sizes, *inner]), before=before)


def _flat(program: Program, heads: Heads, before: fx.Node, name: str) -> fx.Node:
    """[B, S, H D] of queries, keys or values in order."""
    source, rows = heads.source, heads.rows
    if is_product(program, source):
        if not torch.equal(rows, torch.arange(source.meta["val"].shape[-1])):
            source = join(program, [Part(source, rows)], before, name)
        return _laid_out(program, source, before, len(rows))
    shape = source.meta["val"].shape
    if len(shape) == 4 and isinstance(shape[1], int):  # [B, H, S, D]
        source = program.insert(aten.transpose.int, (source, 1, 2), before=before)
    width = math.prod(channels(source))
    flat = _laid_out(program, source, before, width)
    if torch.equal(rows, torch.arange(width)):
        return flat
    chosen = program.add_weight(f"{name}.rows", rows)
    return program.insert(aten.index_select.default, (flat, 2, chosen), before=before)


def _flattened(program: Program, a: CachedAttention) -> fx.Node | None:
    """The node behind an attention that lays its output [B, H, S, D] out as [B, S, H D]."""
    shape = [hint(d) for d in a.node.meta["val"].shape]
    numbers = torch.arange(float(math.prod(shape))).reshape(shape)
    want = numbers.transpose(1, 2).flatten(2)
    sizes = {n: torch.zeros([hint(d) for d in n.meta["val"].shape]) for n in program.inputs}
    node = a.node
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in _FORWARD:
            return None
        if torch.equal(evaluate(program, node, {**sizes, a.node: numbers}), want):
            return node
    return None


def _replace_norm(program: Program, norm: Norm, index: int) -> bool:
    """An RMSNorm as one operator, with the sum in front of it if there is one."""
    eps = _epsilon(norm)
    if norm.kind != "rms" or eps is None:
        return False
    name = program.weight_name(norm.gain)
    if name is not None and not norm.one_plus:
        gain = norm.gain
    else:
        gain = program.add_weight(f"gain_{index}", norm.gain_value(program).float())
    x = norm.input
    shapes = [n.meta["val"].shape for n in x.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if x.target is aten.add.Tensor and not x.kwargs and len(shapes) == 2 and shapes[0] == shapes[1]:
        both = program.insert(ops.skip_rms_norm.default, (*x.args, gain, eps), after=x)
        out, total = _items(program, both, 2)
        norm.output.replace_all_uses_with(out)
        x.replace_all_uses_with(total, delete_user_cb=lambda user: user is not both)
    else:
        norm.output.replace_all_uses_with(program.insert(ops.rms_norm.default, (x, gain, eps), after=x))
    return True


def _epsilon(norm: Norm) -> float | None:
    """What is added to the mean square."""
    for node in norm.inner:
        if node.target is aten.rms_norm.default:
            return node.args[3] if len(node.args) > 3 else None
        if node.target is aten.rsqrt.default:
            added: float = node.args[0].args[1]
            return added
    return None
