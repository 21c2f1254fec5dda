"""Quantize activations before the views that only merge or split their rows.

    quantize(view(x))  ->  view(quantize(x))

A row has the same codes whatever the shape around it, so this changes no bit. What stands before the view, a norm
perhaps, can then be computed with the codes (fuse_row_quant.py), and sites that read x and a view of x share them.
"""

from __future__ import annotations

from typing import cast

from torch import fx

from qcompile.codegen.aten_fallback import replace_quantize
from qcompile.ir.aten_ops import VIEWS, aten
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.op_calls import QuantizeCall
from qcompile.ir.program import Program
from qcompile.numerics.format import Format


def quantize_before_views(program: Program) -> None:
    """Move every quantize with scales of rows, or of groups in them, in place; the old ones lose their readers."""
    for node, call in list(QuantizeCall.find(program)):
        form = Format.parse(call.format)
        x, views = call.x, list[fx.Node]()
        while _has_own_rows(form) and _keeps_rows(x):
            views.append(x)
            x = cast(fx.Node, x.args[0])
        if not views:
            continue
        parts = program.unpack(QuantizeCall(x, call.format).insert(program, after=x), 3)
        if form.zero == "none":
            parts.pop()  # which is empty
        replace_quantize(node, *(_viewed(program, part, views, node) for part in parts))


def _has_own_rows(form: Format) -> bool:
    """Whether the codes of a row depend on that row alone."""
    return form.per != "tensor" and not form.smooth


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a node is a view [.., K] of a value [.., K] that nothing writes to."""
    if node.target not in VIEWS or node.meta.get(WRITTEN):
        return False
    source = cast(fx.Node, node.args[0])
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return bool(before) and bool(after) and before[-1] == after[-1] and not source.meta.get(WRITTEN)


def _viewed(program: Program, part: fx.Node, views: list[fx.Node], node: fx.Node) -> fx.Node:
    """Codes or scales [.., C] as the views show their rows."""
    last = part.meta["val"].shape[-1]
    for view in reversed(views):
        leading = cast(list[fx.Node | int], view.args[1])[:-1]
        part = program.insert(aten.reshape.default, (part, [*leading, last]), before=node)
    return part
