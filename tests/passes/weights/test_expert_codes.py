"""Every expert of a stack is solved by its own rows, by one rank, and the owner puts them together."""

from __future__ import annotations

import pytest
import torch
from rank_threads import Kept, Together
from torch import nn
from zoo import build, example

from qcompile.calibration import ranks as ranks_module
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.ir.capture import capture
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Quantize
from qcompile.passes.qdq.insert_qdq import matrix_of
from qcompile.passes.qdq.site_plan import planned_sites
from qcompile.passes.weights.choice import Choice, damage
from qcompile.passes.weights.expert_codes import expert_codes
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import PassReport


class Batched(nn.Module):
    """A batched product with a stack of three experts."""

    def __init__(self):
        super().__init__()
        self.first, self.stack = nn.Linear(32, 32), nn.Parameter(torch.randn(3, 32, 8))

    def forward(self, x):
        return torch.bmm(torch.relu(self.first(x)), self.stack)


@pytest.fixture(params=["batched", "grouped"])
def stack(request):
    """A program with stacks of experts, four batches, and what it is called."""
    torch.manual_seed(0)
    if request.param == "batched":
        program = capture(Batched().requires_grad_(False), (torch.randn(3, 20, 32),))
        return program, [[torch.randn(3, 20, 32)] for _ in range(4)]
    program = capture(build("mixtral"), (), example("mixtral"))
    return program, [[torch.randint(3, 128, (2, 8))] for _ in range(4)]


def members_of(program, form):
    """The stacks that are planned first and read one input."""
    config = Quantize(Format.parse(form), None, lm_head=None)
    planned = [p for p in planned_sites(config, PassContext.of(program), PassReport("")) if p.site.kind == "experts"]
    return [p for p in planned if p.site.input is planned[0].site.input]


class Recorded:
    """Rounds to nearest, what the Hessian's diagonal says; notes what it was given."""

    def __init__(self, fell_back=lambda number: False):
        self.given, self.fell_back = [], fell_back

    def __call__(self, weight, hessian, form):
        self.given.append((weight.clone(), hessian.clone()))
        scaled = weight * (1 + hessian.diagonal().float() / (1 + hessian.diagonal().float())) / 2
        return Choice(quantize_tensor(scaled, form), self.fell_back(len(self.given) - 1))


def solve(program, batches, form, choose, finished=None, is_owner=True):
    members = members_of(program, form)
    run = LayerwiseRun(program, batches)
    run.advance(members[0].site.node)
    return members, run, expert_codes(program, run, members, choose, finished, is_owner)


@pytest.mark.parametrize("form", ["int4/group16/zero", "int8/tensor", "int4/group16/zero/dual"])
def test_codes_are_those_of_each_expert_by_its_own_rows(stack, form):
    program, batches = stack
    choose = Recorded(fell_back=lambda number: number == 1)
    members, run, solved = solve(program, batches, form, choose)
    assert len(solved.parts) == len(members)
    damages = []
    number, count = 0, matrix_of(program, members[0].site).shape[0] // members[0].site.N
    assert solved.fell_back == [f"{members[0].site.name}[1]"] and len(choose.given) == count * len(members)
    for planned, parts in zip(members, solved.parts, strict=True):
        site, rows = planned.site, [[] for _ in range(count)]
        for index, x in enumerate(run.values_of(site.input)):
            if site.batched:
                split = list(x)
            else:
                ends = list(run.values_of(site.node.all_input_nodes[2]))[index]
                split = x.split(torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype)).tolist())
            for expert, own in enumerate(split):
                rows[expert].append(own.double())
        codes = []
        for expert, weight in enumerate(matrix_of(program, site).split(site.N)):
            found, hessian = choose.given[number]
            x = torch.cat(rows[expert])
            assert torch.equal(found, weight) and torch.allclose(hessian, x.t() @ x, rtol=1e-4, atol=1e-6)
            choice = Recorded()(weight, hessian, planned.weight)
            codes.append(choice.codes.stored_parts)
            if len(rows[expert]) and x.any():
                damages.append(damage(weight, hessian, choice.codes))
            number += 1
        for part, own in zip(parts, zip(*codes, strict=True), strict=True):
            assert (part is None) == (own[0] is None)
            if part is not None:
                assert torch.equal(part, torch.cat([p if p.ndim else p.reshape(-1, 1) for p in own]))
    for found, measured in zip(solved.damage, zip(*damages, strict=True), strict=True):
        assert found == pytest.approx(sum(measured) / len(measured), rel=1e-3)


def test_stacks_in_files_have_the_same_codes(stack):
    program, batches = stack
    want = solve(program, batches, "int4/group16/zero", Recorded())[2]
    streamed = program.copy()
    streamed.weights = {name: StoredTensor(w, lambda w=w: w.clone()) for name, w in program.weights.items()}
    found = solve(streamed, batches, "int4/group16/zero", Recorded())[2]
    assert_same(found, want)


def assert_same(found, want):
    assert found.fell_back == want.fell_back
    for ours, theirs in zip(found.parts, want.parts, strict=True):
        assert [p is None for p in ours] == [p is None for p in theirs]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_solve_some_experts_each_by_the_rows_of_all(stack, monkeypatch, count):
    program, batches = stack
    want = solve(program, batches, "int4/group16/zero", Recorded())[2]
    group, shared = Together(count), {}
    monkeypatch.setattr(ranks_module, "dist", group)
    chosen = [Recorded() for _ in range(count)]
    copies = [program.copy() for _ in range(count)]

    def work(ranks):
        own, _ = ranks.share(batches)
        kept = Kept(ranks, shared)
        return solve(copies[ranks.rank], own, "int4/group16/zero", chosen[ranks.rank], kept, ranks.rank == 1)[2]

    found = group.run(work)
    assert [result is None for result in found] == [rank != 1 for rank in range(count)], found
    assert_same(found[1], want)
    assert len(shared) == sum(len(choose.given) for choose in chosen), "each expert is solved once"
    sizes = [len(choose.given) for choose in chosen]
    assert max(sizes) - min(sizes) <= len(want.parts)
