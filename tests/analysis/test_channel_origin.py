"""Rows behind channels: computed by the operators of the graph, whatever they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.analysis.channel_origin import ChannelOrigins, FlowStops, one_position
from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture


class Rows(nn.Module):
    """Two linears of six rows, and what is computed of them."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(8, 6), nn.Linear(8, 6), function
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]))

    def forward(self, x):
        return self.function(self.a(x), self.b(x), self.order)


def origins(function, *, elementwise=False):
    program = capture(Rows(function), (torch.randn(2, 3, 8),), dynamic=False)
    walk = ChannelOrigins(program, find_sites(program), elementwise=elementwise)
    return walk, program.outputs[0]


A = list(range(6))
MOVES = {
    "view": (lambda a, b, o: a.view(6, 6), A),
    "heads": (lambda a, b, o: a.view(2, 3, 3, 2).transpose(2, 3).reshape(2, 3, 6), [0, 2, 4, 1, 3, 5]),
    "unflatten": (lambda a, b, o: a.unflatten(-1, (3, 2)).transpose(2, 3).flatten(2), [0, 2, 4, 1, 3, 5]),
    "squeeze": (lambda a, b, o: a.unsqueeze(0).squeeze(), A),
    "slice": (lambda a, b, o: a[..., 1::2], [1, 3, 5]),
    "split": (lambda a, b, o: a.split(2, -1)[1], [2, 3]),
    "chunk": (lambda a, b, o: a.chunk(2, -1)[1], [3, 4, 5]),
    "an index that is a weight": (lambda a, b, o: a[..., o], A[::-1]),
    "repeat_interleave": (lambda a, b, o: a.repeat_interleave(2, -1), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    "cast": (lambda a, b, o: -a.double().to(a.device, torch.float32), A),
    "mT": (lambda a, b, o: a.mT.mT, A),
    "a scalar": (lambda a, b, o: a * 0.5 / 3, A),
    "a factor like it": (lambda a, b, o: a * torch.ones(1).type_as(a) * o[:1].to(a), A),
    "a constant of its shape": (lambda a, b, o: a / torch.full_like(a, 2.0)[:1, :1, :1], A),
    "cat": (lambda a, b, o: torch.cat([a, b], -1), [*A, *range(6, 12)]),
}


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_moves(name, elementwise):
    function, rows = MOVES[name]
    walk, output = origins(function, elementwise=elementwise)
    (found,) = one_position(walk.terms(output))
    assert found.tolist() == rows
    assert [site.name for site, _ in walk.producers] == (["a.weight", "b.weight"] if name == "cat" else ["a.weight"])


def test_transposes():
    walk, output = origins(lambda a, b, o: a[0].t())
    (term,) = walk.terms(output)
    assert term.tolist() == [[row] * 3 for row in A]
    with pytest.raises(FlowStops, match="position"):
        one_position(walk.terms(output))


def test_a_sum_has_two_terms_and_a_join_pads():
    walk, output = origins(lambda a, b, o: torch.cat([a + b, a], -1))
    first, second = one_position(walk.terms(output))
    assert first.tolist() == [*A, *A] and second.tolist() == [*range(6, 12), *[-1] * 6]


def test_factors_of_the_channels_are_linear_and_not_one_function_of_all():
    walk, output = origins(lambda a, b, o: a * torch.arange(6.0))
    assert one_position(walk.terms(output))[0].tolist() == A
    walk, output = origins(lambda a, b, o: a * torch.arange(6.0), elementwise=True)
    with pytest.raises(FlowStops):
        walk.terms(output)


def test_a_divisor_is_no_linear_channel():
    walk, output = origins(lambda a, b, o: o.float() / a)
    with pytest.raises(FlowStops, match="div.Tensor is not linear"):
        walk.terms(output)


@pytest.mark.parametrize(
    "function", [torch.relu, torch.sigmoid, torch.square, lambda a: a**2, torch.nn.functional.gelu]
)
def test_functions_of_every_element_pass_one_reading_only(function):
    walk, output = origins(lambda a, b, o: function(a), elementwise=True)
    assert one_position(walk.terms(output))[0].tolist() == A
    walk, output = origins(lambda a, b, o: function(a))
    with pytest.raises(FlowStops) as stop:
        walk.terms(output)
    assert "not linear in each channel" in stop.value.args[1] and stop.value.args[0] == output.name


def test_a_gate_has_the_rows_of_both():
    walk, output = origins(lambda a, b, o: torch.relu(a) * b, elementwise=True)
    assert [term.tolist() for term in one_position(walk.terms(output))] == [A, list(range(6, 12))]


def test_a_softmax_is_no_function_of_each_element():
    walk, output = origins(lambda a, b, o: torch.softmax(a, -1), elementwise=True)
    with pytest.raises(FlowStops, match="softmax"):
        walk.terms(output)


def test_another_path_of_the_same_rows_is_refused():
    class Twice(Rows):
        def forward(self, x):
            a = self.a(x)
            return a.view(6, 6), torch.sin(a), a[..., 4:].exp()

    program = capture(Twice(None), (torch.randn(2, 3, 8),), dynamic=False)
    walk = ChannelOrigins(program, find_sites(program))
    value = program.outputs[0]
    terms = one_position(walk.terms(value))
    with pytest.raises(FlowStops, match="read on another path"):
        walk.check_consumers(terms, {program.output_node})


def test_what_has_no_linear_behind_it():
    walk, _ = origins(lambda a, b, o: a)
    with pytest.raises(FlowStops, match="does not come from a linear"):
        walk.terms(walk.program.inputs[0])
