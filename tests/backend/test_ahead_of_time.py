"""A compiled graph computes what its program computes, and reads its weights where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.backend.ahead_of_time import compile_ahead


class Shared(nn.Module):
    """Two products of one weight, one of them of a part of its rows, and a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.second.weight = nn.Parameter(torch.randn(4, 16)[:, ::2])

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    program = qcompile.capture(Shared().eval(), (torch.randn(3, 8),))
    graph = compile_ahead(program)
    return program, graph, graph.open()


def test_any_batch_gives_what_the_program_gives(compiled):
    program, _, run = compiled
    for rows in (1, 2, 3, 50):
        x = torch.randn(rows, 8)
        assert torch.allclose(run([x])[0], program(x)[0], rtol=1e-5, atol=1e-6)


def test_the_library_holds_no_weights(compiled):
    program, graph, run = compiled
    assert {file.suffix for file in graph.files} == {".so", ".json"}
    x = torch.randn(2, 8)
    weight, before = program.weights["first.weight"], run([x])[0]
    weight.mul_(2)
    after = run([x])[0]
    assert not torch.equal(before, after) and torch.allclose(after, program(x)[0], rtol=1e-5, atol=1e-6)
    weight.div_(2)


def test_a_weight_between_others_is_stored_on_its_own(compiled):
    program, graph, _ = compiled
    assert not program.weights["second.weight"].is_contiguous()
    assert all(tensor.is_contiguous() for tensor in graph.weights.values())
