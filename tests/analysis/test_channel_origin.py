"""Rows behind channels: computed by the operators of the graph, whatever they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

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
    "a view of tokens as channels": (lambda a, b, o: a.view(2, 18), A * 3),
    "chunk of the tokens": (lambda a, b, o: a.chunk(3, 1)[2], A),
    "an index that is a constant": (lambda a, b, o: a[..., torch.tensor([5, 0])], [5, 0]),
    "a factor without dimensions": (lambda a, b, o: a * o.sum(), A),
    "a factor for each token": (lambda a, b, o: a * torch.arange(3.0).view(3, 1), A),
    "rows joined": (lambda a, b, o: torch.cat([a, b])[2:], list(range(6, 12))),
    "stack": (lambda a, b, o: torch.stack([a, b], -1).flatten(-2), [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]),
    "stack in front": (lambda a, b, o: torch.stack([a, b])[1], list(range(6, 12))),
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
    "a factor like it": (lambda a, b, o: a * torch.ones(1, dtype=torch.float64).type_as(a) * o[:1].type_as(a), A),
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
    both = len(rows) == 12 and name != "repeat_interleave" or "joined" in name or "front" in name
    assert [site.name for site, _ in walk.producers] == (["a.weight", "b.weight"] if both else ["a.weight"])


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


def test_a_factor_for_each_head_is_another_for_other_channels():
    def scaled(a, b, o):
        return (a.unflatten(-1, (3, 2)) * torch.arange(3.0).view(3, 1)).flatten(-2)

    walk, output = origins(scaled)
    assert one_position(walk.terms(output))[0].tolist() == A
    walk, output = origins(scaled, elementwise=True)
    with pytest.raises(FlowStops, match="factor for each channel"):
        walk.terms(output)


NOT_LINEAR = {
    "a square": lambda a, b, o: a * a,
    "a quotient of itself": lambda a, b, o: a / a,
    "a product of two": lambda a, b, o: a * b,
    "a quotient of two": lambda a, b, o: a / b,
    "a sum with a scalar": lambda a, b, o: a + 1.0,
    "a sum with a constant": lambda a, b, o: a - torch.arange(6.0),
    "a sum with itself": lambda a, b, o: a + a,
    "integers": lambda a, b, o: a.long().float(),
    "a join with a constant": lambda a, b, o: torch.cat([a, torch.zeros(2, 3, 1)], -1),
    "values of an attention": lambda a, b, o: torch.softmax(a @ a.mT, -1) @ b,
    "values of a fused attention": lambda a, b, o: scaled_dot_product_attention(a, a, b),
    "an index that is computed": lambda a, b, o: a[..., o.flip(0)],
    "an index that a linear gives": lambda a, b, o: o[a.long()],
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_in_each_channel(name):
    walk, output = origins(NOT_LINEAR[name])
    with pytest.raises(FlowStops):
        walk.terms(output)


def test_a_sum_repeats_the_narrower_operand():
    walk, output = origins(lambda a, b, o: a - b[..., 1:2])
    assert [term.tolist() for term in one_position(walk.terms(output))] == [A, [7] * 6]
    walk, output = origins(lambda a, b, o: torch.sigmoid(b[..., 1:2]) * a, elementwise=True)
    assert [term.tolist() for term in one_position(walk.terms(output))] == [[1] * 6, list(range(6, 12))]


ATTENTIONS = {
    "two products": lambda a, b, o: torch.softmax(a @ a.mT, -1) @ b,
    "fused": lambda a, b, o: scaled_dot_product_attention(a, a * 2, b),
    "grouped": lambda a, b, o: scaled_dot_product_attention(
        *(y.unflatten(-1, (-1, 2)).transpose(1, 2) for y in (torch.cat([a, a], -1), b, b)), enable_gqa=True
    ).transpose(1, 2).flatten(2),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_has_the_channels_of_its_values(name):
    walk, output = origins(ATTENTIONS[name], elementwise=True)
    (found,) = one_position(walk.terms(output))
    assert found.tolist() == ([0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5] if name == "grouped" else A)
    assert [site.name for site, _ in walk.producers] == ["b.weight"]
    (heads,) = walk.attention_heads()
    assert heads[0].tolist() == ([0, 1] if name == "grouped" else A) and heads.ndim == 2


def test_an_attention_over_channels_is_refused():
    walk, output = origins(lambda a, b, o: torch.softmax(a.mT @ a, -1) @ b.mT, elementwise=True)
    with pytest.raises(FlowStops, match="position to position"):
        walk.terms(output)


def test_the_reciprocal_is_a_function_of_every_element():
    walk, output = origins(lambda a, b, o: o[:1] / a.double().long(), elementwise=True)
    assert one_position(walk.terms(output))[0].tolist() == A


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


OTHER_PATHS = {
    "a view of all": (lambda a: (a.view(6, 6), a.flatten()), True),
    "a function": (lambda a: (a.view(6, 6), a.sin()), True),
    "the output": (lambda a: (a.view(6, 6), a), True),
    "a slice": (lambda a: (a.view(6, 6), a[..., 4:].exp()), True),
    "row zero": (lambda a: (a[..., :1], a[..., 0].exp()), True),
    "another slice": (lambda a: (a[..., :4], a[..., 4:].exp()), False),
    "other rows by an index": (lambda a: (a[..., :4], a[..., torch.tensor([5, 4])].exp()), False),
    "its rows by an index": (lambda a: (a[..., :4], a[..., torch.tensor([3, 5])].exp()), True),
    "its dtype": (lambda a: (a.view(6, 6), torch.ones(3, dtype=torch.long).type_as(a)), False),
    "the other half": (lambda a: a.chunk(2, -1), False),
    "the other half of another split": (lambda a: (a.chunk(2, -1)[0], a.chunk(2, -1)[1].exp()), False),
    "the same half of another split": (lambda a: (a.chunk(2, -1)[0], a.chunk(2, -1)[0].exp()), True),
    "other tokens": (lambda a: (lambda x, y: (x * 2, y.exp()))(*a[:, :2].chunk(2, 1)), True),
}


@pytest.mark.parametrize("name", OTHER_PATHS)
def test_another_path_of_the_same_rows_is_refused(name):
    function, refused = OTHER_PATHS[name]

    class Twice(Rows):
        def forward(self, x):
            first, second = function(self.a(x))
            return first * 3.0, second

    program = capture(Twice(None), (torch.randn(2, 3, 8),), dynamic=False)
    walk = ChannelOrigins(program, find_sites(program))
    value = program.outputs[0]
    terms = one_position(walk.terms(value))
    if not refused:
        walk.check_consumers(terms, {program.output_node})
        return
    with pytest.raises(FlowStops, match="read on another path"):
        walk.check_consumers(terms, {program.output_node} if name != "the output" else set())


def test_what_has_no_linear_behind_it():
    walk, _ = origins(lambda a, b, o: a)
    with pytest.raises(FlowStops, match="does not come from a linear"):
        walk.terms(walk.program.inputs[0])


def test_experts_are_no_rows():
    class Experts(Rows):
        def __init__(self):
            super().__init__(None)
            self.stack = nn.Parameter(torch.randn(2, 8, 6))

        def forward(self, x):
            return (x @ self.stack) * 2

    program = capture(Experts(), (torch.randn(2, 3, 8),), dynamic=False)
    with pytest.raises(FlowStops, match="does not come from a linear"):
        ChannelOrigins(program, find_sites(program)).terms(program.outputs[0])
