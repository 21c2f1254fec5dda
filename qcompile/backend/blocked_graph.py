"""A graph as calls of a few graphs: those of its parts, of which equal blocks share one.

Values are kept by place: the graph's inputs, its constants, then what parts give to others or to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backend.block_text import Part, value_of
from qcompile.backend.repeated_blocks import find_parts

Compiled = Callable[[list[Any]], Sequence[Any]]
"""A compiled part: takes a list of its inputs, which it may empty, and gives its results."""


@dataclass(frozen=True)
class PartCall:
    """One call of a part.

    Attributes:
        graph: its place among the graphs.
        inputs: places of the values that it reads.
        outputs: places of the values that it gives.
        dead: places of values that nobody reads behind this call.
    """

    graph: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class BlockedGraph:
    """A graph that was cut.

    Attributes:
        graphs: of the parts; their inputs are all placeholders.
        calls: in order.
        inputs: how many values the caller gives.
        constants: of the graph itself: the values behind the inputs.
        values: fake values by place.
        results: places of the graph's results.
    """

    graphs: list[fx.GraphModule]
    calls: list[PartCall]
    inputs: int
    constants: list[Tensor]
    values: list[Any]
    results: list[int]

    def run(self, parts: Sequence[Compiled], given: Sequence[Any]) -> tuple[Any, ...]:
        """Call compiled parts.

        Args:
            parts: one for each graph.
            given: the graph's inputs.

        Returns:
            The graph's results.
        """
        values = [*given, *self.constants, *[None] * (len(self.values) - self.inputs - len(self.constants))]
        for call in self.calls:
            found = parts[call.graph]([values[place] for place in call.inputs])
            for place, value in zip(call.outputs, found, strict=True):
                values[place] = value
            for place in call.dead:
                values[place] = None
        return tuple(values[place] for place in self.results)


def cut_graph(
    module: fx.GraphModule, *, own_sizes: bool = False, least_saved: int | None = None
) -> BlockedGraph | None:
    """Cut a graph into blocks and what is around them.

    Args:
        module: ATen; its results are a flat list. Not changed.
        own_sizes: see find_parts.
        least_saved: see find_parts.

    Returns:
        The graphs and their calls; None if nothing is repeated, or a result is no tensor.
    """
    output = next(iter(module.graph.find_nodes(op="output"))).args[0]
    results = list(output) if isinstance(output, (list, tuple)) else [output]
    if not all(isinstance(node, fx.Node) and isinstance(value_of(node), Tensor) for node in results):
        return None
    parts = find_parts(module.graph, own_sizes=own_sizes, least_saved=least_saved)
    return None if parts is None else _graph_of(module.graph, parts, results)


def example_layout(value: Tensor, strides: Sequence[Any] | None = None) -> tuple[Any, ...]:
    """Dtype, sizes and strides of a value in the example. Equal for values that compiled code reads alike.

    Args:
        value: fake or real.
        strides: of it; None: its own.
    """
    sizes, steps = _in_example(value.shape), _in_example(value.stride() if strides is None else strides)
    read = [step for size, step in zip(sizes, steps, strict=True) if size != 1]  # others multiply zero
    return value.dtype, sizes, read if 0 not in sizes else []


def _in_example(sizes: Sequence[Any]) -> list[int]:
    return [size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes]


def _graph_of(graph: fx.Graph, parts: Sequence[Part], results: Sequence[fx.Node]) -> BlockedGraph:
    inputs, constants = (list(graph.find_nodes(op=op)) for op in ("placeholder", "get_attr"))
    places = {node: place for place, node in enumerate([*inputs, *constants])}
    read = {node for part in parts for node in part.inputs} | set(results)
    kinds = [index if part.repeats is None else part.repeats for index, part in enumerate(parts)]
    given = {kind: list[int]() for kind in kinds}  # by kind: which of a part's values others read, in any of its blocks
    for kind in given:
        equal = [part for part, other in zip(parts, kinds, strict=True) if other == kind]
        given[kind] = [i for i in range(len(parts[kind].values)) if any(part.values[i] in read for part in equal)]
    for part, kind in zip(parts, kinds, strict=True):
        for index in given[kind]:
            places[part.values[index]] = len(places)
    first_own = len(inputs) + len(constants)
    returned = {places[node] for node in results}
    pending = {place for place in places.values() if place >= first_own and place not in returned}
    calls, order = list[PartCall](), list(given)
    for part, kind in reversed(list(zip(parts, kinds, strict=True))):
        reads = tuple(places[node] for node in part.inputs)
        gives = tuple(places[part.values[index]] for index in given[kind])
        dead = tuple(sorted(pending.intersection((*reads, *gives))))
        pending.difference_update(dead)
        calls.append(PartCall(order.index(kind), reads, gives, dead))
    values = [value_of(node) for node in places]
    tensors = [_constant(node) for node in constants]
    graphs = [_part_graph(parts[kind], given[kind]) for kind in order]
    return BlockedGraph(graphs, calls[::-1], len(inputs), tensors, values, [places[node] for node in results])


def _constant(node: fx.Node) -> Tensor:
    found: Tensor = getattr(node.graph.owning_module, str(node.target))
    return found


def _part_graph(part: Part, given: Sequence[int]) -> fx.GraphModule:
    graph, memo = fx.Graph(), dict[fx.Node, fx.Node]()
    for place, node in enumerate(part.inputs):
        memo[node] = graph.placeholder(f"input_{place}")
        memo[node].meta["val"] = value_of(node)
    for node in part.nodes:
        memo[node] = graph.node_copy(node, lambda source: memo[source])
    graph.output(tuple(memo[part.values[index]] for index in given))
    return fx.GraphModule(torch.nn.Module(), graph)
