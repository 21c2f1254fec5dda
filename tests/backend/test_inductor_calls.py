"""A graph whose block is compiled once gives what the whole graph gives; where it may not be cut, it is whole."""

from __future__ import annotations

import threading

import pytest
import torch
from layer_stacks import Layer, Stack, captured
from torch import fx
from torch._guards import TracingContext

from qcompile.backend import dynamo, inductor_calls, repeated_blocks
from qcompile.backend.blocked_graph import BlockedGraph, PartCall
from qcompile.backend.inductor import GRAPHS
from qcompile.backend.inductor_calls import compile_in_blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(repeated_blocks, "LEAST_SAVED", 1)


FLOAT = {"verify": False, "rules": [{"match": "*", "keep": True}]}
"""Options under which no last bit decides a code."""


class Spy:
    """In place of Inductor: runs graphs as they are, and may report strides."""

    def __init__(self, strides=None):
        self.graphs, self.static, self.strides = [], [], strides

    def __call__(self, graph, examples, patches, static):
        assert len(examples) == len(list(graph.graph.find_nodes(op="placeholder")))
        self.graphs.append(graph)
        self.static.append(static)
        if self.strides is not None and len(self.graphs) == 2:
            TracingContext.get().output_strides.extend(self.strides)
        return graph


def stack(layers=6):
    torch.manual_seed(0)
    return Stack([Layer() for _ in range(layers)]).requires_grad_(False)


def compiled(program, one):
    examples = [node.meta["val"] for node in program.placeholders]
    weights = [i for i, node in enumerate(program.placeholders) if node not in program.inputs]
    return compile_in_blocks(program.graph_module, examples, {}, weights, one)


def test_each_kind_of_part_is_compiled_once_with_its_weights_as_static_inputs():
    program, one = captured(stack()), Spy()
    call = compiled(program, one)
    assert len(one.graphs) == 3
    inputs = torch.randn(5, 8), torch.randn(8)
    assert torch.equal(call(*program.bind(inputs))[0], program(*inputs)[0])
    block = [node.meta["val"] for node in one.graphs[1].graph.find_nodes(op="placeholder")]
    moving = [tuple(value.shape)[1:] for i, value in enumerate(block) if i not in one.static[1]]
    assert sorted(moving) == [(), (8,), (12,)]  # the shared vector, x, what the product gave


@pytest.mark.parametrize("strides,whole", [("equal", False), ("other", True), ("none", False)])
def test_other_strides_than_the_readers_expect_compile_the_whole(strides, whole):
    program = captured(stack())
    given = [(8, 1), (12, 1)] if strides == "equal" else [(1, 3), (1, 3)] if strides == "other" else [None, None]
    one = Spy(given)
    call = compiled(program, one)
    assert (one.graphs[-1] is program.graph_module) == whole
    inputs = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(call(*program.bind(inputs))[0], program(*inputs)[0])


def test_a_graph_on_a_gpu_is_whole():
    program, one = captured(stack()), Spy()
    with program.fake_mode:
        there = [torch.empty_like(node.meta["val"], device="cuda") for node in program.placeholders]
    compile_in_blocks(program.graph_module, there, {}, [], one)
    assert one.graphs == [program.graph_module]


@pytest.mark.parametrize("options,whole", [({}, False), ({"compile_blocks": False}, True),
                                           ({"inductor": {GRAPHS: True}}, True)])  # fmt: skip
def test_the_option_and_cuda_graphs_compile_the_whole(options, whole, monkeypatch):
    seen = list[fx.GraphModule]()
    monkeypatch.setattr(dynamo, "needs_gpu", lambda inputs: None)
    monkeypatch.setattr(dynamo, "compile_graph", lambda graph, *_: seen.append(graph) or graph)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(stack(), backend="qcompile", options=options)(torch.randn(64, 8), torch.randn(8))
    assert len(seen) == (1 if whole else 3)


@pytest.mark.parametrize("rows,dynamic,whole", [(63, False, True), (64, False, False), (3, True, False)])
def test_a_graph_of_few_rows_is_whole(rows, dynamic, whole, monkeypatch):
    seen = list[fx.GraphModule]()
    monkeypatch.setattr(dynamo, "compile_graph", lambda graph, *_: seen.append(graph) or graph)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(stack(), backend="qcompile", dynamic=dynamic)(torch.randn(rows, 8), torch.randn(8))
    assert len(seen) == (1 if whole else 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_the_whole(dtype):
    """To the last bit; in bfloat16 a value that all blocks read is rounded, where the whole may not round it."""
    model, calls = stack(8).to(dtype), []
    for blocks in (True, False):
        torch._dynamo.reset()
        options = {**FLOAT, "compile_blocks": blocks}
        calls.append(torch.compile(model, backend="qcompile", dynamic=True, options=options))
        with torch.no_grad():
            calls[-1](torch.randn(3, 8, dtype=dtype), torch.randn(8, dtype=dtype))
    for rows in (3, 40):
        inputs = torch.randn(rows, 8, dtype=dtype), torch.randn(8, dtype=dtype)
        with torch.no_grad():
            got, want = (call(*inputs)[0] for call in calls)
        assert torch.equal(got, want) or (dtype == torch.bfloat16 and torch.allclose(got, want, rtol=2e-2, atol=2e-2))


@pytest.mark.slow
def test_weights_that_change_are_seen_and_threads_do_not_disturb_each_other():
    model = stack(8)
    torch._dynamo.reset()
    call = torch.compile(model, backend="qcompile", options=FLOAT)
    inputs = [(torch.randn(64, 8), torch.randn(8)) for _ in range(8)]
    with torch.no_grad():
        call(*inputs[0])
        model.layers[5].down.weight.mul_(3)
        want = [model(*one)[0] for one in inputs]
        assert torch.allclose(call(*inputs[0])[0], want[0], rtol=1e-5, atol=1e-6)

    def work(index):
        with torch.no_grad():
            found[index] = [call(*inputs[index])[0] for _ in range(20)]

    found = {}
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in found.items():
        assert all(torch.allclose(one, want[index], rtol=1e-5, atol=1e-6) for one in results)
    assert len(found) == 8


@pytest.mark.parametrize("shapes,large", [([(64, 8)], True), ([(63, 8)], False), ([(2, 32, 8), (0,)], True),
                                          ([(64, 8), (1, 8)], False), ([(1, 4, 0, 8), (80, 8)], True)])  # fmt: skip
def test_a_graph_for_few_rows_is_whole_and_an_empty_cache_has_no_rows(shapes, large):
    """A block that is called three times and gives values of these shapes to the next."""
    n = len(shapes)
    calls = [
        PartCall(0, tuple(range(i * n, (i + 1) * n)), tuple(range((i + 1) * n, (i + 2) * n)), ()) for i in range(3)
    ]
    values = [torch.empty(shape) for _ in range(4) for shape in shapes]
    blocked = BlockedGraph([], calls, n, [], values, list(range(3 * n, 4 * n)))
    assert inductor_calls._has_large_m(blocked) == large
