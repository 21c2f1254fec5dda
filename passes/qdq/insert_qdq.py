"""Insert quantize/dequantize around a site's product: the graph that defines what a quantized site computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from qcompile.analysis.sites import Site
from qcompile.ir.aten_ops import LINEAR, aten
from qcompile.ir.node_meta import FLOAT_WEIGHT, SITE, WRITTEN
from qcompile.ir.op_calls import DequantizeCall, QuantizeCall
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import StoredParts
from qcompile.passes.qdq.site_plan import PlannedSite
from qcompile.recipe.pass_context import PassContext

_PART_NAMES = ("codes", "scale", "zero", "group_scale")


def matrix_of(program: Program, site: Site) -> Tensor:
    """A site's weight as rows, [N, K]; of a stack of experts, all of them, [E N, K]."""
    weight = program.weights[site.name]
    if site.kind == "linear":
        return weight
    return (weight if site.rows_first else weight.transpose(1, 2)).flatten(0, 1)


def put_codes(program: Program, planned: PlannedSite, parts: StoredParts, context: PassContext) -> None:
    """Make a site read stored codes (with scale, zero point, group scale) and a quantized input.

    Args:
        program: changed in place.
        planned: the site and its formats.
        parts: of the rows of `matrix_of`; those of a stack get their leading E back.
        context: its report of the site is filled in.
    """
    site = planned.site
    dtype, device = program.weights[site.name].dtype, program.weights[site.name].device
    placed = [None if part is None else part.to(device) for part in parts]  # those of a resumed run are in a file
    site.node.meta[SITE] = site.name
    if site.kind == "experts":
        nodes = _add_parts(program, site.name, [_unstacked(part, site) for part in placed])
        weight = DequantizeCall(*nodes, str(planned.weight), site.K, dtype).insert(program, before=site.node)
        weight = _as_operand(program, weight, site)
    else:
        if context.keep_float_weights:
            site.node.meta[FLOAT_WEIGHT] = program.weights[site.name]
        nodes = _add_parts(program, site.name, placed)
        weight = DequantizeCall(*nodes, str(planned.weight), site.K, dtype).insert(program, before=site.node)
    x = site.input if planned.act is None else _quantized_input(program, site, planned.act)
    site.node.args = (x, weight, *site.node.args[2:])
    if site.name in context.sites:
        stored = sum(part.nbytes for part in parts if part is not None)
        context.sites[site.name].set_quantized(planned.weight, planned.act, stored)


def _unstacked(part: Tensor | None, site: Site) -> Tensor | None:
    return part if part is None or not part.ndim else part.unflatten(0, (-1, site.N))


def _as_operand(program: Program, weight: fx.Node, site: Site) -> fx.Node:
    """The stack [E, N, K] as the product reads it, [E, K, N]."""
    if site.rows_first:
        transpose = site.node.args[1]
        assert isinstance(transpose, fx.Node)
        return program.insert(transpose.target, (weight, *transpose.args[1:]), before=site.node)
    return program.insert(aten.transpose.int, (weight, 1, 2), before=site.node)


def _quantized_input(program: Program, site: Site, act: Format) -> fx.Node:
    codes, scale, zero = _quantized(program, site, act)
    dtype = site.node.meta["val"].dtype
    call = DequantizeCall(codes, scale, zero if act.zero != "none" else None, None, str(act), 0, dtype)
    return call.insert(program, before=site.node)


def _quantized(program: Program, site: Site, act: Format) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Codes, scale and zero point of a site's input: one quantization for all sites that read it."""
    x = site.input
    if x.meta.get(WRITTEN):
        pair = QuantizeCall(x, str(act)).insert(program, before=site.node)
    else:
        for user in x.users:
            if QuantizeCall.matches(user) and QuantizeCall.of(user).format == str(act):
                codes, scale, zero = sorted(user.users, key=_output_index)
                return codes, scale, zero
        pair = QuantizeCall(x, str(act)).insert(program, after=x)
    codes, scale, zero = program.unpack(pair, 3)
    return codes, scale, zero


def _output_index(read: fx.Node) -> int:
    """Which output of its node a getitem reads."""
    index = read.args[1]
    assert isinstance(index, int)
    return index


def _add_parts(
    program: Program, name: str, parts: list[Tensor | None]
) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]:
    """Add the parts as weights "<name>.codes", "<name>.scale", ..; an absent one is None."""
    found: list[fx.Node | None] = []
    for part, tensor in zip(_PART_NAMES, parts, strict=True):
        full = f"{name}.{part}"
        if tensor is None:
            found.append(None)
        elif full in program.weights:  # two sites on one weight share its codes
            found.append(program.node_of(full))
        else:
            found.append(program.add_weight(full, tensor))
    codes, scale, zero, group_scale = found
    assert codes is not None and scale is not None
    return codes, scale, zero, group_scale


def corrected_sites(program: Program) -> Iterator[tuple[fx.Node, Tensor, Tensor]]:
    """The products of quantized sites with the float weight and the dequantized one, [N, K] each."""
    for node in list(program.graph.find_nodes(op="call_function", target=LINEAR)):
        if FLOAT_WEIGHT in node.meta:
            call = DequantizeCall.of(node.args[1])
            arguments = [program.weight_of(a) if isinstance(a, fx.Node) else a for a in call.arguments]
            yield node, node.meta[FLOAT_WEIGHT], torch.ops.qcompile.dequantize(*arguments)


def float_input(product: fx.Node) -> fx.Node:
    """What a quantized product reads, before the quantization of activations."""
    x = product.args[0]
    assert isinstance(x, fx.Node)
    if not DequantizeCall.matches(x):
        return x
    codes = DequantizeCall.of(x).codes  # the first output of a quantize
    pair = codes.args[0]
    assert isinstance(pair, fx.Node)
    return QuantizeCall.of(pair).x
