"""A vmap in a graph of Dynamo or torch.export -> the operators that it comes to.

Both (torch 2.13) write a vmap as calls that open and close a level of batching, with functions of one element between
them. Operators of whole batches come out of it below the dispatcher's autograd, but programs are traced above it. So
each region is traced on its own, below, and takes its own place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_OPEN, _CLOSE = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def expand_vmaps(graph_module: fx.GraphModule, value: str = "val") -> None:
    """Replace every vmap by ATen operators, in place.

    Args:
        graph_module: traced within the fake mode that is active.
        value: the key of a node's fake value in its meta.
    """
    for region in list(_regions(graph_module.graph)):
        _expand(graph_module, region, value)
        graph_module.recompile()


def _regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes of each outermost vmap, those that open and close it included."""
    depth, region = 0, list[fx.Node]()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name == _OPEN
        if depth:
            region.append(node)
        if name == _CLOSE:
            depth -= 1
            if not depth:
                yield region
                region = []


def _expand(graph_module: fx.GraphModule, region: list[fx.Node], value: str) -> None:
    inside = set(region)
    inputs = list(dict.fromkeys(i for node in region for i in node.all_input_nodes if i not in inside))
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    graph, memo = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        memo[node] = graph.placeholder(node.name)
    for node in region:
        memo[node] = graph.node_copy(node, memo.__getitem__)
    graph.output(tuple(memo[node] for node in outputs))
    with torch.no_grad():
        traced = make_fx(fx.GraphModule(graph_module, graph), tracing_mode="real", _allow_non_fake_inputs=True)(
            *[_without_grad(node.meta[value]) for node in inputs]
        )
    for node in traced.graph.nodes:
        node.meta = {value: node.meta.get("val")}
    _insert(graph_module, traced, inputs, outputs, before=region[0])
    for node in reversed(region):
        graph_module.graph.erase_node(node)


def _insert(
    graph_module: fx.GraphModule, traced: fx.GraphModule, inputs: list[fx.Node], outputs: list[fx.Node], before: fx.Node
) -> None:
    memo = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph_module.graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "output":
                for old, new in zip(outputs, node.args[0], strict=True):
                    old.replace_all_uses_with(memo[new])
            elif node.op == "get_attr":
                name = next(n for i in itertools.count() if not hasattr(graph_module, n := f"_vmap_constant_{i}"))
                graph_module.register_buffer(name, getattr(traced, str(node.target)))
                memo[node] = graph_module.graph.get_attr(name)
            elif node.op != "placeholder":
                memo[node] = graph_module.graph.node_copy(node, memo.__getitem__)


def _without_grad(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
