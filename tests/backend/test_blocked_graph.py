"""Parts of a graph: what they take and give, and how long values live."""

from __future__ import annotations

import torch
from layer_stacks import Layer, Stack, captured, cut, run_parts

from qcompile.backend.blocked_graph import cut_graph, example_layout
from qcompile.ir.node_meta import WEIGHT


def test_values_are_freed_behind_their_last_reader():
    program = captured(Stack([Layer() for _ in range(6)]))
    blocked = cut(program)
    own = set(range(blocked.inputs + len(blocked.constants), len(blocked.values))) - set(blocked.results)
    dead = [place for call in blocked.calls for place in call.dead]
    assert sorted(dead) == sorted(own)
    for index, call in enumerate(blocked.calls):
        later = {place for other in blocked.calls[index + 1 :] for place in other.inputs}
        assert not later & set(call.dead)


def test_parts_take_placeholders_only():
    program = captured(Stack([Layer() for _ in range(6)]))
    for graph in cut(program).graphs:
        assert not list(graph.graph.find_nodes(op="get_attr"))
        assert not any(WEIGHT in node.meta for node in graph.graph.find_nodes(op="placeholder"))


def test_constants_of_the_graph_are_values_of_their_own():
    class Constant(Stack):
        def forward(self, x, scale):
            return super().forward(x + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), scale)

    program = captured(Constant([Layer() for _ in range(6)]))
    for node in program.placeholders:  # as a constant of the graph, in place of a weight
        if "lifted" in str(node.meta.get(WEIGHT)) or "constant" in str(node.meta.get(WEIGHT)):
            tensor = program.weights.pop(node.meta[WEIGHT])
            program.graph_module.register_buffer("constant", tensor)
            with program.graph.inserting_before(node):
                read = program.graph.get_attr("constant")
            node.replace_all_uses_with(read)
            program.graph.erase_node(node)
    blocked = cut(program)
    assert len(blocked.constants) == 1
    inputs = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(run_parts(program, blocked, *inputs)[0], program(*inputs)[0])


def test_a_graph_whose_results_are_no_tensors_is_not_cut():
    program = captured(Stack([Layer() for _ in range(6)]))
    program.output_node.args = ((*program.output_node.args[0], None),)
    assert cut_graph(program.graph_module, least_saved=1) is None


def test_layouts_are_equal_where_code_reads_alike():
    wide = torch.empty(2, 1, 3)
    assert example_layout(wide) == example_layout(wide.as_strided((2, 1, 3), (3, 99, 1)))  # of one element: never moved
    assert example_layout(wide) == example_layout(wide, (3, 7, 1)) != example_layout(wide, (1, 3, 2))
    assert example_layout(wide) != example_layout(wide.double())
    assert example_layout(torch.empty(0, 3)) == example_layout(torch.empty(0, 3), (1, 1))
