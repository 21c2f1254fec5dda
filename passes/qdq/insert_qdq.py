"""Insert plain quantize/dequantize around a site's product: the graph that is the meaning of a quantized site."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.analysis.sites import Site
from qcompile.ir.node_meta import FLOAT_WEIGHT, SITE
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.passes.qdq.site_plan import PlannedSite, SitePlan

ops = torch.ops.qcompile
aten = torch.ops.aten


def corrected_sites(program: Program) -> list[tuple[torch.fx.Node, Tensor, Tensor]]:
    """The products of quantized sites with the float weight and what the codes stand for, [N, K] each."""
    found = []
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        if FLOAT_WEIGHT in node.meta:
            args = [
                program.weights[program.weight_name(a) or ""] if isinstance(a, torch.fx.Node) else a
                for a in node.args[1].args
            ]
            found.append((node, node.meta[FLOAT_WEIGHT], ops.dequantize(*args)))
    return found


def float_input(product: torch.fx.Node) -> torch.fx.Node:
    """What a quantized product reads, before the quantization of activations."""
    x = product.args[0]
    if x.target is ops.dequantize.default:
        x = x.args[0].args[0].args[0]  # dequantize(codes = getitem(quantize(x), 0))
    return x


def matrix_of(program: Program, site: Site) -> Tensor:
    """A site's weight as rows, [N, K]; of a stack of experts, all of them, [E N, K]."""
    weight = program.weights[site.name]
    if site.kind == "linear":
        return weight
    return (weight if site.rows_first else weight.transpose(1, 2)).flatten(0, 1)


def put_codes(program: Program, planned: PlannedSite, tensors: tuple[Tensor | None, ...], plan: SitePlan) -> None:
    """Make a site read stored codes (with scale, zero, group scale) and a quantized input.

    The tensors are of `matrix_of`; those of a stack get their leading E back.
    """
    site, act = planned.site, planned.act
    if site.kind == "experts":
        _put_stack(program, planned, tensors)
        return
    original = program.weights[site.name]
    dtype, weight_dtype = site.node.meta["val"].dtype, original.dtype
    site.node.meta[SITE] = site.name
    if plan.corrected:
        site.node.meta[FLOAT_WEIGHT] = original
    nodes = add_stored(program, site.name, tensors)
    numbers = program.insert(
        ops.dequantize.default, (*nodes, str(planned.weight), site.K, weight_dtype), before=site.node
    )
    x = site.input
    if act is not None:
        codes, scale, zero = quantized_input(program, x, act)
        x = program.insert(
            ops.dequantize.default,
            (codes, scale, zero if act.zero != "none" else None, None, str(act), 0, dtype),
            before=site.node,
        )
    site.node.args = (x, numbers, *site.node.args[2:])


def _put_stack(program: Program, planned: PlannedSite, tensors: tuple[Tensor | None, ...]) -> None:
    site = planned.site
    dtype = program.weights[site.name].dtype
    stacked = tuple(t if t is None or not t.ndim else t.unflatten(0, (-1, site.N)) for t in tensors)
    nodes = add_stored(program, site.name, stacked)
    numbers = program.insert(ops.dequantize.default, (*nodes, str(planned.weight), site.K, dtype), before=site.node)
    if site.rows_first:
        turn = site.node.args[1]
        numbers = program.insert(turn.target, (numbers, *turn.args[1:]), before=site.node)
    else:
        numbers = program.insert(aten.transpose.int, (numbers, 1, 2), before=site.node)
    site.node.args = (site.node.args[0], numbers, *site.node.args[2:])
    site.node.meta[SITE] = site.name


def add_stored(program: Program, name: str, tensors: tuple[Tensor | None, ...]) -> tuple[object, ...]:
    """Add stored codes, scale, zero and group scale as weights "<name>.codes", ..; absent ones are None."""
    found: list[object] = []
    for part, tensor in zip(("codes", "scale", "zero", "group_scale"), tensors, strict=True):
        full = f"{name}.{part}"
        if tensor is None:
            found.append(None)
        elif full in program.weights:  # two sites on one weight share its codes
            found.append(program.node_of(full))
        else:
            found.append(program.add_weight(full, tensor))
    return tuple(found)


def quantized_input(program: Program, x: object, act: Format) -> tuple[object, object, object]:
    """The codes, scale and zero of a value: one quantization for all sites that read it."""
    assert isinstance(x, torch.fx.Node)
    for user in x.users:
        if user.target is ops.quantize.default and user.args[1] == str(act):
            codes, scale, zero = sorted(user.users, key=lambda n: n.args[1])
            return codes, scale, zero
    pair = program.insert(ops.quantize.default, (x, str(act)), after=x)
    codes, scale, zero = program.unpack(pair, 3)
    return codes, scale, zero
