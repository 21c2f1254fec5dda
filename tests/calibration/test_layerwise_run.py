"""LayerwiseRun: every batch up to a node, as one run of the whole graph computes it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from zoo import build, example

from qcompile.analysis.sites import find_sites
from qcompile.api.example_inputs import flat_inputs
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.ir.capture import capture
from qcompile.memory.stored_tensor import StoredTensor


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3", "mixtral"])
def test_a_layerwise_run_computes_what_a_run_computes(name):
    model = build(name)
    program = capture(model, (), example(name))
    batches = [flat_inputs(program, example(name), example(name)) for _ in range(2)]
    run = LayerwiseRun(program, batches)
    for site in find_sites(program):
        run.advance(site.node)
        whole = {}
        program.watch([site.input], batches[1], lambda n, v, whole=whole: whole.setdefault(n, v.clone()))
        values = list(run.values_of(site.input))
        assert len(values) == 2 and torch.equal(values[1], whole[site.input])
        kept = {n for v in run.values for n in v}
        assert all(any(u not in run.done for u in n.users) for n in kept)  # nothing is kept for nobody


def three_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return model, capture(model, (torch.randn(3, 8),))


def test_what_comes_next_may_be_rewritten():
    model, program = three_layers()
    batches = [torch.randn(5, 8), torch.randn(2, 8)]
    run = LayerwiseRun(program, [[x] for x in batches])
    for site in find_sites(program):
        run.advance(site.node)
        program.weights[site.name] = program.weights[site.name] * 2
    run.advance(program.output_node)
    for layer in (model[0], model[2], model[4]):
        layer.weight.data *= 2
    with torch.no_grad():
        for x, value in zip(batches, run.values_of(program.outputs[0]), strict=True):
            assert torch.allclose(value, model(x), atol=1e-5)


def test_each_node_runs_once_for_each_batch_and_what_no_input_reaches_once():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

        def forward(self, x):
            factor = torch.neg(torch.exp(self.scale))
            y = self.a(x) * factor
            return y + torch.sin(factor)

    program = capture(Counted(), (torch.randn(3, 8),))
    counts = {}

    def counted(target, name):
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return target(*args, **kwargs)

        return call

    for node in program.graph.nodes:
        if node.op == "call_function":
            node.target = counted(node.target, node.name)
    run = LayerwiseRun(program, [[torch.randn(2, 8)] for _ in range(3)])
    run.advance(next(n for n in program.graph.nodes if n.name == "sin"))  # of a fixed value of an earlier stretch
    run.advance(program.outputs[0])
    run.advance(program.output_node)
    assert counts == {"linear": 3, "exp": 1, "neg": 1, "mul": 3, "sin": 1, "add": 3}
    assert not run.fixed, "nothing is kept for nobody"


def test_finish_computes_the_rest_with_another_value():
    model, program = three_layers()
    batches = [torch.randn(5, 8), torch.randn(2, 8)]
    run = LayerwiseRun(program, [[x] for x in batches])
    site = find_sites(program)[1]
    run.advance(site.node)
    other = torch.randn(2, 8)
    before = [dict(values) for values in run.values]
    with torch.no_grad():
        assert torch.allclose(run.finish(1, site.node, other)[0], model[3:](other), atol=1e-6)
    assert [list(values) for values in run.values] == [list(values) for values in before]
    run.advance(program.output_node)
    assert len(list(run.values_of(program.outputs[0]))) == 2


def test_finish_reads_what_the_batch_has_beside_the_value():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            y = self.first(x)
            z = torch.tanh(self.second(y) + y)
            return self.third(z) * z + y

    model, batches = Beside(), [torch.randn(2, 8), torch.randn(2, 8)]
    program = capture(model, (torch.randn(3, 8),))
    run = LayerwiseRun(program, [[x] for x in batches])
    site = find_sites(program)[1]
    run.advance(site.node)
    other = torch.randn(2, 8)
    with torch.no_grad():
        y = model.first(batches[1])
        z = torch.tanh(other + y)
        assert torch.allclose(run.finish(1, site.node, other)[0], model.third(z) * z + y, atol=1e-6)


def test_batches_of_another_shape_are_refused():
    _, program = three_layers()
    with pytest.raises(ValueError, match="takes 1 inputs"):
        LayerwiseRun(program, [[torch.randn(2, 8), 3]])


def test_a_value_that_no_input_reaches_is_that_of_every_batch():
    class Waves(nn.Module):
        def forward(self, x):
            return x * torch.arange(4.0).sin()

    program = capture(Waves(), (torch.randn(2, 4),))
    run = LayerwiseRun(program, [[torch.randn(2, 4)], [torch.randn(3, 4)]])
    run.advance(program.outputs[0])
    (waves,) = [node for node in program.graph.nodes if node.target is torch.ops.aten.sin.default]
    found = list(run.values_of(waves))
    assert len(found) == 2 and all(torch.equal(value, torch.arange(4.0).sin()) for value in found)


def test_a_value_that_is_kept_stays_until_it_is_released():
    _, program = three_layers()
    run = LayerwiseRun(program, [[torch.randn(3, 8)], [torch.randn(2, 8)]])
    first, second, third = (site.node for site in find_sites(program))
    run.kept.add(first)
    run.advance(third)
    assert all(first in values and second not in values for values in run.values)
    assert [len(value) for value in run.values_of(first)] == [3, 2]
    run.release(first)
    assert not any(first in values for values in run.values)


def test_a_released_value_that_is_still_to_be_read_stays():
    _, program = three_layers()
    run = LayerwiseRun(program, [[torch.randn(3, 8)]])
    first, second, _ = find_sites(program)
    run.kept.add(second.input)
    run.advance(second.node)
    run.release(second.input)
    run.advance(program.output_node)
    assert [value.shape for value in run.values_of(program.outputs[0])] == [(3, 4)]


def test_weights_in_files_are_read_once_for_all_batches():
    model, program = three_layers()
    reads = Counter()
    for name, weight in list(program.weights.items()):
        program.weights[name] = StoredTensor(weight, lambda name=name, w=weight: (reads.update([name]), w.clone())[1])
    batches = [torch.randn(5, 8), torch.randn(2, 8), torch.randn(1, 8)]
    run = LayerwiseRun(program, [[x] for x in batches])
    for site in find_sites(program):
        run.advance(site.node)
    run.advance(program.output_node)
    with torch.no_grad():
        for x, value in zip(batches, run.values_of(program.outputs[0]), strict=True):
            assert torch.equal(value, model(x))
    assert set(reads.values()) == {1} and len(reads) == len(program.weights)
    assert not run._loaded
