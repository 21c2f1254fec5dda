"""Products of one value with several weights as one product: q, k, v of an attention, gate and up.

A product is `nbits_linear`, `dual_linear`, `int8_linear` or a float linear with weights of the program. Each row of its
weight (codes, scales, zero points, bias) makes one channel, so rows may be chosen, put in another order
and joined with those of another product of the same format that reads the same value.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import qcompile.codegen.onnx.ops.matmul_ops  # noqa: F401  registers torch.ops.qcompile_onnx
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

# operator -> (places of its weights, which axis of each holds the rows, place of the bias)
_WEIGHTS = {
    ops.nbits_linear.default: ((1, 2, 3), (0, 0, 0), 4),
    ops.dual_linear.default: ((1, 2, 3, 8), (0, 0, 0, 0), 4),
    ops.int8_linear.default: ((1, 2, 3), (1, 0, 0), 4),
    aten.linear.default: ((1,), (0,), 2),
}


@dataclass(frozen=True)
class Part:
    """Some channels of a product: all of them in order if rows is None."""

    product: fx.Node
    rows: Tensor | None


def is_product(program: Program, node: fx.Node) -> bool:
    """Whether a node is a product whose weights can be put together with others'."""
    known = _WEIGHTS.get(node.target)
    if known is None:
        return False
    places, _, bias = known
    weights = [node.args[p] for p in places] + list(node.args[bias : bias + 1])
    return all(w is None or program.weight_name(w) is not None for w in weights)


def width(node: fx.Node) -> int:
    """The number of channels that a product makes."""
    return int(node.meta["val"].shape[-1])


def can_join(program: Program, nodes: list[fx.Node]) -> bool:
    """Whether products read one value in one format."""
    first = nodes[0]
    if not all(is_product(program, n) and n.target is first.target and n.args[0] is first.args[0] for n in nodes):
        return False
    places, _, bias = _WEIGHTS[first.target]

    def kinds(node: fx.Node) -> list[object]:
        weights = [program.weights.get(program.weight_name(node.args[p]) or "") for p in places]
        rest = [a for place, a in enumerate(node.args) if place > bias and place not in places]
        return [getattr(w, "dtype", None) for w in weights] + rest

    return all(kinds(n) == kinds(first) for n in nodes)


def join(program: Program, parts: list[Part], before: fx.Node, name: str) -> fx.Node:
    """One product that makes the channels of all parts, one after another."""
    target = parts[0].product.target
    places, axes, bias_at = _WEIGHTS[target]
    args = list(parts[0].product.args)

    def joined(place: int, axis: int) -> Tensor:
        found = []
        for part in parts:
            weight = part.product.args[place] if len(part.product.args) > place else None
            tensor = torch.zeros(width(part.product)) if weight is None else program.weights[weight.meta[WEIGHT]]
            found.append(tensor if part.rows is None else tensor.index_select(axis, part.rows))
        return torch.cat(found, axis).contiguous()

    for place, axis in zip(places, axes, strict=True):
        if args[place] is not None:
            args[place] = program.add_weight(f"{name}.{place}", joined(place, axis))
    if any(len(part.product.args) > bias_at and part.product.args[bias_at] is not None for part in parts):
        args[bias_at : bias_at + 1] = [program.add_weight(f"{name}.bias", joined(bias_at, 0))]
    return program.insert(target, args, before=before)


def join_siblings(program: Program) -> int:
    """Join all products that read one value and can be joined; returns how many products went away."""
    by_input: dict[object, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and is_product(program, node):
            by_input.setdefault((node.args[0], node.target), []).append(node)
    gone = 0
    for nodes in by_input.values():
        if len(nodes) < 2 or not can_join(program, nodes):
            continue
        whole = join(program, [Part(n, None) for n in nodes], nodes[0], f"joined_{nodes[0].name}")
        pieces = program.insert(aten.split_with_sizes.default, (whole, [width(n) for n in nodes], -1), after=whole)
        for index, node in enumerate(nodes):
            node.replace_all_uses_with(program.insert(operator.getitem, (pieces, index), after=pieces))
        gone += len(nodes) - 1
    program.cleanup()
    return gone


def without_bias(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """A product without its bias, and the bias, for an operator that adds one; None where that saves nothing.

    MatMulNBits adds a bias while it multiplies; the other products are followed by a node of its own.
    """
    if node.target is ops.nbits_linear.default or not is_product(program, node):
        return None
    place = _WEIGHTS[node.target][2]
    bias = node.args[place] if len(node.args) > place else None
    if bias is None:
        return node, None
    return program.insert(node.target, [*node.args[:place], None, *node.args[place + 1 :]], before=node), bias


def take_bias(program: Program, node: fx.Node, users: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """As `without_bias`, of a product that has a bias and that nobody but `users` reads."""
    if not set(node.users) <= users:
        return None
    found = without_bias(program, node)
    return None if found is None or found[1] is None else (found[0], found[1])
