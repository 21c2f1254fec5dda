"""FineQuant: group sizes under a budget that is kept, finer where coarse ones lose most."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.passes import Fuse
from qcompile.passes.weights.finequant import FineQuant, spend
from qcompile.recipe.recipe import Recipe


@given(st.integers(0, 2**20), st.integers(1, 12), st.floats(0, 1))
def test_the_budget_is_kept_and_no_single_size_is_better(seed, matrices, generosity):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 50, (matrices, 4), generator=generator).sort(1).values.tolist()
    errors = torch.rand(matrices, 4, generator=generator).sort(1, descending=True).values.tolist()
    least, most = sum(min(c) for c in costs), sum(max(c) for c in costs)
    budget = least + generosity * (most - least)
    chosen = spend(errors, costs, budget)
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= budget
    total = sum(e[i] for e, i in zip(errors, chosen, strict=True))
    for size in range(4):
        if sum(c[size] for c in costs) <= budget:
            assert total <= sum(e[size] for e in errors) + 1e-12


def test_matrices_with_outliers_get_finer_groups():
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256)).eval()
    with torch.no_grad():
        model[2].weight[torch.rand(256, 256) < 0.01] *= 30
    config = FineQuant(lm_head=None, bits=5.0)
    report = qcompile.quantize(model, Recipe("f", (config, Fuse())), example=torch.randn(4, 256))
    assert model[2].format.group < model[0].format.group
    assert "bits a weight" in report.passes[0].notes[0]
    with pytest.raises(ValueError, match="already take"):
        tight = FineQuant(lm_head=None, bits=4.01)
        fresh = torch.nn.Sequential(torch.nn.Linear(256, 256))
        qcompile.quantize(fresh, Recipe("f", (tight,)), example=torch.randn(4, 256))


def test_bad_configurations():
    with pytest.raises(ValueError, match="has no groups"):
        FineQuant(weight="int4/row")
    with pytest.raises(ValueError, match="group_sizes must be positive"):
        FineQuant(group_sizes=(0,))
    with pytest.raises(ValueError, match="nothing for scales"):
        FineQuant(bits=4.0)
