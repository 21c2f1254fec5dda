"""A graph that is cut into blocks computes what it computed, and what differs in anything is no equal block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_stacks import Layer, Stack, calls, captured, check, cut, run_parts
from torch import nn

from qcompile.backend.repeated_blocks import find_parts

KINDS = {
    "plain": {},
    "wide": {"wide": 20},
    "constant": {"constant": 0.5},
    "lists": {"pairs": True},
    "skip": {"early": True},
}


@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=2),
    pattern=st.lists(st.integers(0, 1), min_size=1, max_size=6),
    gives=st.sets(st.integers(0, 5)),
    ragged=st.booleans(),
)
@settings.get_profile("models")
def test_any_stack_computes_the_same(kinds, pattern, gives, ragged):
    torch.manual_seed(0)
    program = captured(Stack([Layer(**KINDS[kinds[one]]) for one in pattern], gives, ragged))
    blocked = cut(program)
    if blocked is not None:
        assert calls(blocked)[-1] >= 3
        check(program, blocked)
    # at most one period is lost to the parts around the blocks: the cut stands inside of a layer
    assert blocked is not None or len(pattern) < 5 or len({kinds[one] for one in pattern}) > 1


@pytest.mark.parametrize("layers", [4, 6, 12])
def test_equal_layers_are_one_graph(layers):
    program = captured(Stack([Layer() for _ in range(layers)], gives=(1, 2)))
    blocked = cut(program)
    assert len(blocked.graphs) == 3 and calls(blocked) == [1, 1, layers - 1]
    check(program, blocked)
    assert blocked.calls[1].graph == blocked.calls[2].graph and blocked.calls[1].inputs != blocked.calls[2].inputs


def test_a_value_that_only_one_block_gives_is_a_result_of_all():
    program = captured(Stack([Layer() for _ in range(7)], gives=(4,)))
    blocked = cut(program)
    assert calls(blocked)[-1] == 6
    check(program, blocked)


def test_layers_of_two_kinds_are_one_longer_period():
    program = captured(Stack([Layer(constant=0.5 if i % 2 else 1.0) for i in range(9)]))
    blocked = cut(program)
    assert calls(blocked) == [1, 1, 4]
    check(program, blocked)


@pytest.mark.parametrize("other", [{"constant": 0.5}, {"wide": 20}, {"pairs": True}])
def test_a_layer_that_differs_in_one_thing_is_not_merged(other):
    program = captured(Stack([Layer(**(other if i == 4 else {})) for i in range(9)]))
    blocked = cut(program)
    assert calls(blocked)[-1] in (3, 4) and max(calls(blocked)) < 8
    check(program, blocked)


def test_two_stacks_are_cut_each():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Stack([Layer() for _ in range(5)], ragged=False)
            self.b = Stack([Layer(wide=20) for _ in range(6)], ragged=False)

        def forward(self, x, scale):
            return self.b(torch.tanh(self.a(x, scale)[0]), scale)

    program = captured(Both())
    blocked = cut(program)
    assert calls(blocked)[-2] >= 3 and calls(blocked)[-1] == 5
    check(program, blocked)


def test_a_shared_weight_is_an_input_of_every_block():
    stack = Stack([Layer() for _ in range(6)])
    for layer in stack.layers:
        layer.down.weight = stack.layers[0].down.weight
    program = captured(stack)
    blocked = cut(program)
    assert calls(blocked)[-1] == 5
    check(program, blocked)


def test_a_cut_stands_behind_a_product():
    """There Inductor fuses nothing, so the kernels are those of the whole graph."""
    program = captured(Stack([Layer() for _ in range(6)]))
    parts = find_parts(program.graph, least_saved=1)
    assert all(str(part.values[-1].target) == "aten.linear.default" for part in parts)


@pytest.mark.parametrize("layers,least", [(2, 1), (3, 1), (6, 10_000)])
def test_what_repeats_too_little_is_compiled_as_it_is(layers, least):
    assert cut(captured(Stack([Layer() for _ in range(layers)])), least_saved=least) is None


def test_what_writes_in_place_or_is_random_is_compiled_as_it_is():
    class Changed(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.stack, self.change = Stack([Layer() for _ in range(5)]), change

        def forward(self, x, scale):
            return self.change(self.stack(x, scale)[0])

    assert cut(captured(Changed(torch.tanh))) is not None
    assert cut(captured(Changed(lambda x: x * torch.rand_like(x)))) is None
    program = captured(Changed(torch.tanh))
    node = next(iter(program.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)))
    node.target = torch.ops.aten.tanh_.default
    assert cut(program) is None


class Cached(nn.Module):
    """Layers that each read a buffer with a length of its own."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x, buffers):
        for layer, buffer in zip(self.layers, buffers, strict=True):
            x = torch.tanh(layer(x)) + buffer[: x.shape[0]].sum(0) * buffer.shape[0]
        return x


@pytest.mark.parametrize("lengths,merged", [([9] * 6, True), ([9, 9, 10, 9, 10, 9], False)])
def test_sizes_of_their_own(lengths, merged):
    """Equal where no guard is checked, if the example has them equal; a guard of Dynamo is of one size only."""
    from qcompile.ir.capture import from_exported

    model, dynamic = Cached(6).eval(), torch.export.Dim.DYNAMIC
    given = torch.randn(3, 8), [torch.randn(length, 8) for length in lengths]
    shapes = {"x": {0: dynamic}, "buffers": [{0: dynamic}] * 6}
    exported = torch.export.export(model, given, dynamic_shapes=shapes, strict=False)
    program = from_exported(exported, model)
    assert cut(program) is None
    blocked = cut(program, own_sizes=True)
    assert (blocked is not None) == merged
    if blocked is not None:
        for rows in (3, 5):
            x, buffers = torch.randn(rows, 8), [torch.randn(7 + i, 8) for i in range(6)]
            assert torch.equal(run_parts(program, blocked, x, *buffers)[0], program(x, *buffers)[0])
