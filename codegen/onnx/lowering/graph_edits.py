"""Edits of an ONNX graph that all lowerings share: nodes of a tape in the place of a node, or as a branch of an `If`.

tape = Tape()
y = tape.op("Mul", [x, scale])
replace_node(node, tape, [y])           y takes over the name and the uses of the node's output
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass
from onnx_ir.tape import Tape

# Norms whose further outputs (mean, inverse deviation, the sum) cost time, read or not.
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


def replace_node(node: ir.Node, tape: Tape, outputs: Sequence[ir.Value]) -> None:
    """Put the nodes of a tape in the place of a node, named after it; `outputs` replace its outputs."""
    name_after(tape.nodes, node.name)
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], tape.nodes, node.outputs, outputs)


def name_after(nodes: Iterable[ir.Node], scope: str) -> None:
    """Name new nodes, their values and the nodes of their branches: scope / the node's name or operator."""
    for node in nodes:
        node.name = f"{scope}/{node.name or node.op_type}"
        for index, value in enumerate(node.outputs):
            value.name = node.name if len(node.outputs) == 1 else f"{node.name}/{index}"
        for branch in branches_of(node):
            name_after(branch, f"{node.name}/{branch.name}")


def branches_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs inside a node."""
    return [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]


def make_branch(name: str, tape: Tape, outputs: Sequence[ir.Value], dtypes: Sequence[ir.DataType]) -> ir.Graph:
    """The nodes of a tape as a graph that reads other values from the graph around it."""
    for value, dtype in zip(outputs, dtypes, strict=True):
        value.dtype = dtype
    return ir.Graph([], outputs, nodes=tape.nodes, name=name)


def constant_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes that compute with initializers only, which ONNX Runtime does once, when it opens the file."""
    known = {None, *graph.initializers.values()}
    for node in graph:
        if node.inputs and not branches_of(node) and known.issuperset(node.inputs):
            known.update(node.outputs)
            yield node


def share_outer_values(inner: ir.Graph, outer: ir.Graph) -> None:
    """Let a graph read the inputs, initializers and constants of another, by name, instead of its own copies.

    Its constant nodes are removed; initializers that only it has move to the other.
    """
    values = ir.convenience.create_value_mapping(outer, include_subgraphs=False)
    constants = list(constant_nodes(inner))
    for value in [value for node in constants for value in node.outputs]:
        value.replace_all_uses_with(values[value.name])
    inner.remove(constants, safe=True)
    for value in [*inner.inputs, *inner.initializers.values()]:
        if value.name in values:
            value.replace_all_uses_with(values[value.name])
        else:
            del inner.initializers[value.name]
            outer.register_initializer(value)


def move_to_branch(graph: ir.Graph, name: str) -> ir.Graph:
    """All but the constant nodes of a graph as a branch of its own, which makes its outputs; names are prefixed."""
    outputs, constants = list(graph.outputs), set(constant_nodes(graph))
    nodes = [node for node in graph if node not in constants]
    graph.outputs.clear()
    graph.remove(nodes)
    moved = ir.Graph([], outputs, nodes=nodes, name=name)
    for node in moved.all_nodes():
        node.name = node.name and f"{name}/{node.name}"
        for value in node.outputs:
            value.name = value.name and f"{name}/{value.name}"
    return moved


def clean_up(model: ir.Model) -> None:
    """Unique names; no initializers and no outputs of norms that nobody reads; no types but those of outputs."""
    NameFixPass()(model)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not _is_read(value):
            del graph.initializers[name]
    values = list(graph.initializers.values())
    for node in graph.all_nodes():
        values += [value for value in node.outputs if not value.is_graph_output()]
        for value in node.outputs[1:] if node.op_type in _NORMS else ():
            if not _is_read(value):
                value.name = ""
    for value in values:
        value.type = value.shape = None  # with names of free sizes that only the exporter knew
        value.metadata_props.clear()


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
