from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.tape import Tape
from onnx_nodes import graph_of, run

from qcompile.codegen.onnx.lowering.graph_edits import (
    clean_up,
    constant_nodes,
    make_branch,
    move_to_branch,
    replace_node,
    share_outer_values,
)

SCALED = """
    model (float[n] x) => (float[n] y) {
        scale = Mul (a, b)
        doubled = Add (x, x)
        y = Mul (doubled, scale)
    }"""


def scaled() -> ir.Model:
    return graph_of(SCALED, a=np.float32([2, 3]), b=np.float32([5, 5]), unread=np.float32([1]))


def test_a_replaced_node_gives_its_name_to_its_heirs():
    model = scaled()
    node, tape = model.graph[1], Tape()
    replace_node(node, tape, [tape.op("Mul", [node.inputs[0], tape.op("Constant", [], {"value_float": 4.0})])])
    assert [node.op_type for node in model.graph] == ["Mul", "Constant", "Mul", "Mul"]
    assert model.graph[2].outputs[0].name == "doubled" and model.graph[2].name.endswith("/Mul")
    assert run(model, np.float32([1, 1]))[0].tolist() == [40, 60]


def test_constant_nodes_read_initializers_only():
    model = scaled()
    assert [node.outputs[0].name for node in constant_nodes(model.graph)] == ["scale"]


def test_what_reads_constant_nodes_only_is_constant_too():
    text = SCALED.replace("doubled =", "more = Mul (scale, a)\n        doubled =").replace(
        "doubled, scale", "doubled, more"
    )
    model = graph_of(text, a=np.float32([2, 3]), b=np.float32([5, 5]))
    assert [node.outputs[0].name for node in constant_nodes(model.graph)] == ["scale", "more"]


def test_what_the_graph_gives_out_counts_as_read():
    model = scaled()
    model.graph.outputs.append(model.graph.initializers["unread"])
    clean_up(model)
    assert "unread" in model.graph.initializers


def test_two_graphs_of_the_same_values_are_branches_of_one():
    """The second computes something else from the same input and the same constants."""
    model, other = scaled(), scaled()
    node, tape = other.graph[1], Tape()
    two = ir.val("two", const_value=ir.tensor(np.float32(2), name="two"))
    other.graph.register_initializer(two)
    replace_node(node, tape, [tape.op("Pow", [node.inputs[0], two])])
    graph = model.graph
    share_outer_values(other.graph, graph)
    branches = {"then_branch": move_to_branch(other.graph, "other"), "else_branch": move_to_branch(graph, "this")}
    values = [[value.name for node in branch for value in node.outputs] for branch in branches.values()]
    assert values == [["other/doubled", "other/y"], ["this/doubled", "this/y"]]
    tape = Tape()
    is_long = tape.op("Greater", [tape.op("Size", [graph.inputs[0]]), tape.op("Constant", [], {"value_int": 1})])
    y = tape.op("If", [is_long], branches, output=ir.val("y"))
    y.dtype = ir.DataType.FLOAT
    graph.extend(tape.nodes)
    graph.outputs.append(y)
    assert "two" in graph.initializers and graph[0].outputs[0].name == "scale", "made once, outside"
    assert run(model, np.float32([3, 3]))[0].tolist() == [90, 135]
    assert run(model, np.float32([3]))[0].tolist() == [60, 90]


@pytest.mark.parametrize("reads", ["sum", ""])
def test_clean_up_omits_what_nobody_reads(reads):
    """Initializers, and a norm's further outputs: all behind the last that is read."""
    text = f"""
        model (float[m, 8] x) => (float[m, 8] y) {{
            normed, mean, inv, sum = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.1> (x, x, gain)
            y = Add (normed, {reads or "x"})
        }}"""
    model = graph_of(text, gain=np.ones(8, np.float32), unread=np.ones(1, np.float32))
    clean_up(model)
    assert list(model.graph.initializers) == ["gain"]
    outputs = ir.to_proto(model).graph.node[0].output
    assert list(outputs) == (["normed", "", "", "sum"] if reads else ["normed"])
    assert not ir.to_proto(model).graph.value_info
    x = np.float32([[3, -3] * 4])
    normed = 2 * x / np.sqrt(36.1)
    assert np.allclose(run(model, x)[0], normed + (2 * x if reads else x), atol=1e-5)


def test_names_of_branches_do_not_hide_those_around_them():
    """The file would be invalid."""
    model = graph_of(
        "model (float[n] x) => (float[n] y) { val_0 = Neg (x)  flag = Cast <to = 9> (x)  y = Abs (val_0) }"
    )
    graph, tapes = model.graph, [Tape(), Tape()]
    made = [tape.op("Add", [tape.op("Neg", [graph.inputs[0]]), graph[0].outputs[0]]) for tape in tapes]
    branches = [make_branch(name, t, [v], [ir.DataType.FLOAT]) for name, t, v in zip("ab", tapes, made, strict=True)]
    tape, node = Tape(), graph[2]
    flag = tape.op("ReduceMax", [tape.op("Cast", [graph[1].outputs[0]], {"to": ir.DataType.INT32})], {"keepdims": 0})
    choice = tape.op(
        "If",
        [tape.op("Cast", [flag], {"to": ir.DataType.BOOL})],
        dict(then_branch=branches[0], else_branch=branches[1]),
    )
    replace_node(node, tape, [choice])
    clean_up(model)
    outside = {value.name for node in graph for value in node.outputs}
    for branch in branches:
        assert outside.isdisjoint(value.name for node in branch for value in node.outputs)
    assert run(model, np.float32([1, 2]))[0].tolist() == [-2, -4]
