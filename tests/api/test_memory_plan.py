"""What a streamed run says that it needs."""

import pytest
import torch
from torch import nn

from qcompile.analysis.facts import Facts
from qcompile.api import memory_plan
from qcompile.api.memory_plan import MemoryPlan, TooLittleMemory
from qcompile.ir.capture import capture
from qcompile.pipeline.find_recipe import find_recipe


class Pair(nn.Module):
    """Two sites on one input, and a wider one behind them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 512, bias=False), nn.Linear(64, 512, bias=False), nn.Linear(512, 32)

    def forward(self, x):
        return self.c(self.a(x) * self.b(x))


def plan(recipe, batches=2, tokens=8):
    x = torch.randn(2, tokens, 64)
    facts = Facts(capture(Pair().eval(), (x,)))
    return MemoryPlan.of(facts, find_recipe(recipe), [[x]] * batches)


def test_a_sequential_recipe_has_the_hessian_of_the_widest_input():
    found = plan("w4a16-gptq")
    assert found.site == "c.weight" and found.solving > 2 * 8 * 512 * 512


def test_sites_that_are_solved_together_count_together():
    few, many = Pair(), Pair()
    many.a, many.b = nn.Linear(64, 9600, bias=False), nn.Linear(64, 9600, bias=False)
    many.c = nn.Linear(9600, 32)
    x = torch.randn(2, 8, 64)
    costs = [
        memory_plan._solving(facts.program, facts.sites[:2], True)
        for facts in (Facts(capture(model.eval(), (x,))) for model in (few, many))
    ]
    assert costs[1] - costs[0] > 6 * 64 * 2 * (9600 - 512)


def test_only_recipes_that_read_inputs_keep_values():
    assert plan("w4a16").values == 0
    assert plan("w4a16-gptq", batches=4).values == 2 * plan("w4a16-gptq", batches=2).values > 0


def test_values_go_to_files_where_they_do_not_fit():
    whole = plan("w4a16-gptq", batches=64, tokens=512)
    limit = whole.peak - 1
    kept = whole.within(limit)
    assert kept.offloads and kept.peak <= limit and "go to files" in str(kept)
    assert whole.within(whole.peak) is whole and not whole.offloads


def test_a_limit_below_the_largest_site_is_refused_with_its_name():
    with pytest.raises(TooLittleMemory, match=r"c.weight needs .* Fix: memory of at least"):
        plan("w4a16-gptq").within(1000)


def test_without_a_limit_a_run_that_may_not_fit_begins(monkeypatch):
    monkeypatch.setattr(memory_plan, "available_bytes", lambda: 1000)
    assert plan("w4a16-gptq").within(None).offloads
