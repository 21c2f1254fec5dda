"""Programs: reading, rewriting, copies and running a part."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

from qcompile.ir.capture import capture
from qcompile.ir.node_meta import WEIGHT

aten = torch.ops.aten


@pytest.fixture
def program():
    return capture(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), (torch.randn(3, 8),))


def calls(program):
    return [n for n in program.graph.nodes if n.op == "call_function"]


def test_weights_inputs_and_outputs(program):
    assert set(program.weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    (x,) = program.inputs
    assert len(program.placeholders) == 5 and program.weight_name(x) is None and WEIGHT not in x.meta
    assert program.outputs == [calls(program)[-1]]
    assert program.weight_of(program.node_of("2.bias")) is program.weights["2.bias"]
    with pytest.raises(KeyError, match="is not the placeholder of a weight"):
        program.weight_of(x)
    with pytest.raises(KeyError, match="no weight '3.bias' in this program; it has 4"):
        program.node_of("3.bias")


def test_the_number_of_inputs_is_checked(program):
    with pytest.raises(ValueError, match=r"takes 1 inputs \(input_?1?\), got 2"):
        program(torch.randn(3, 8), torch.randn(3, 8))


def test_a_copy_shares_tensors_and_no_nodes(program):
    copy, x = program.copy(), torch.randn(5, 8)
    want = program(x)[0]
    first = calls(copy)[0]
    copy.replace(first, copy.insert(aten.neg.default, (first,), after=first))
    copy.weights["2.bias"] = torch.zeros(4)
    assert not torch.allclose(copy(x)[0], want) and torch.equal(program(x)[0], want)
    assert copy.weights["0.weight"] is program.weights["0.weight"]


def test_rewriting_keeps_values_known(program):
    first = calls(program)[0]
    node = program.insert(aten.unsqueeze.default, (first, 0), after=first)
    assert node.meta["val"].shape[0] == 1 and node.meta["val"].shape[2] == 6
    weight = program.add_weight("scale", torch.ones(6, dtype=torch.float64))
    assert weight.meta["val"].dtype == torch.float64 and program.weight_name(weight) == "scale"
    with pytest.raises(ValueError, match="already has a weight 'scale'"):
        program.add_weight("scale", torch.ones(6))
    program.cleanup()
    assert "scale" not in program.weights and node not in program.graph.nodes  # nothing reads them


def test_inlined_functions(program):
    x = torch.randn(5, 8)
    want = torch.softmax(program(x)[0] * 2 + torch.arange(4.0), -1)
    out = program.output_node
    node = program.outputs[0]
    new = program.inline(lambda v, factor: torch.softmax(v * factor + torch.arange(4.0), -1), (node, 2), before=out)
    out.args = ((new,),)
    program.cleanup()
    assert torch.allclose(program(x)[0], want, atol=1e-6)


def test_parts_of_a_node_are_unpacked_in_order(program):
    node = calls(program)[-1]
    split = program.insert(aten.split.Tensor, (node, 2, -1), after=node)
    parts = program.unpack(split, 2)
    order = list(program.graph.nodes)
    assert [order.index(p) - order.index(split) for p in parts] == [1, 2]
    assert [p.args for p in parts] == [(split, 0), (split, 1)] and parts[1].meta["val"].shape[-1] == 2


def test_wide_programs_compute_in_double():
    inputs = example("llama")
    program = capture(build("llama").half(), (), inputs)
    wide = program.widened()
    assert wide(*inputs.values())[0].dtype == torch.float64
    assert program(*inputs.values())[0].dtype == torch.float16
    assert all(t.dtype == torch.float16 for t in program.weights.values() if t.is_floating_point())


def test_watching_stops_behind_the_last_node(program):
    x, found = torch.randn(5, 8), {}
    first, relu, last = calls(program)
    program.watch([relu, first], [x], found.__setitem__)
    assert list(found) == [first, relu] and torch.equal(found[relu], found[first].relu())

    def fail(*args):
        raise AssertionError("computed what nobody watches")

    last.target = fail
    found.clear()
    program.watch([relu], [x], found.__setitem__)
    assert list(found) == [relu]


def test_errors_of_a_run_reach_the_caller(program):
    def fail(*args):
        raise RuntimeError("broken")

    calls(program)[0].target = fail
    with pytest.raises(RuntimeError, match="broken"):
        program.watch(calls(program), [torch.randn(3, 8)], lambda node, value: None)


def test_one_node_is_evaluated_from_given_values(program):
    x = torch.randn(5, 8)
    first, relu, last = calls(program)
    values = {
        program.inputs[0]: x,
        **{n: program.evaluate(n, {}.get) for n in program.placeholders if n.meta.get(WEIGHT)},
    }
    for node in (first, relu, last):
        values[node] = program.evaluate(node, values.__getitem__)
    assert torch.equal(values[last], program(x)[0])
    with pytest.raises(KeyError):
        program.evaluate(program.inputs[0], values.__getitem__)


def test_constants_are_evaluated():
    class Constant(nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0])

    program = capture(Constant(), (torch.randn(3, 2),))
    constants = [n for n in program.graph.nodes if n.op == "get_attr" or n.meta.get(WEIGHT)]
    assert [program.evaluate(n, {}.get).tolist() for n in constants] == [[1.0, 2.0]]
