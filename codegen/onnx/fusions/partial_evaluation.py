"""Evaluates parts of a graph, and tells which inputs a value depends on.

A rotary embedding, a mask or a head layout has many spellings. Rather than match spellings, the fusions run the part
between two nodes on probes (unit vectors, channel indices) and compare what comes out with what an operator computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qcompile.ir.aten_ops import reads_elements
from qcompile.ir.program import Program


class UnknownInputError(ValueError):
    """A value that the given ones do not determine; the text is the name of the input that is not given."""


def evaluate(program: Program, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
    """The value of a node from the values of some others and the weights; only what it depends on is computed.

    Raises:
        UnknownInputError: it needs an input that is not given.
    """
    values: dict[fx.Node, Any] = dict(given)
    stack = [node]
    with torch.no_grad():
        while stack:
            top = stack[-1]
            if top in values:
                stack.pop()
                continue
            missing = [n for n in top.all_input_nodes if n not in values]
            if missing:
                stack.extend(missing)
                continue
            values[top] = _compute(program, top, values)
    return values[node]


def _compute(program: Program, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "placeholder" and program.weight_name(node) is None:
        raise UnknownInputError(node.name)
    return program.evaluate(node, values.__getitem__)


def token_dependent_nodes(program: Program, mask: fx.Node | None) -> set[fx.Node]:
    """Nodes whose values depend on the tokens or the cache, not only on their sizes or on the mask (if given)."""
    dependent: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if program.weight_name(node) is None and node is not mask:
                dependent.add(node)
        elif not _is_size(node) and any(n in dependent and reads_elements(node, n) for n in node.all_input_nodes):
            dependent.add(node)
    return dependent


def inputs_behind(program: Program, node: fx.Node, without: fx.Node) -> set[fx.Node]:
    """The inputs whose values, not only sizes, a node depends on by paths that do not pass `without`."""
    inputs, visited, stack = set[fx.Node](), {without}, [node]
    while stack:
        top = stack.pop()
        if top in visited or _is_size(top):
            continue
        visited.add(top)
        if top.op == "placeholder" and program.weight_name(top) is None:
            inputs.add(top)
        stack.extend(n for n in top.all_input_nodes if reads_elements(top, n))
    return inputs


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))
