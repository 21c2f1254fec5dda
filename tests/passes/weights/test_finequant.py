"""FineQuant: group sizes under a budget that is kept, finer where coarse ones lose most."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse
from qcompile.passes.weights.finequant import FineQuant, relative_error, spend
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule


@given(st.integers(0, 2**20), st.integers(1, 12), st.floats(0, 1))
def test_the_budget_is_kept_and_no_single_size_is_better(seed, matrices, generosity):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 50, (matrices, 4), generator=generator).sort(1).values.tolist()
    errors = torch.rand(matrices, 4, generator=generator).sort(1, descending=True).values.tolist()
    order = torch.randperm(4, generator=generator).tolist()  # of the sizes, as a recipe may name them
    costs, errors = ([[row[i] for i in order] for row in part] for part in (costs, errors))
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


def test_steps_are_taken_by_what_a_byte_of_them_takes_off():
    assert spend([[10, 0], [6, 0], [6, 0]], [[1, 11], [1, 2], [1, 2]], 13) == [0, 1, 1]
    assert spend([[1, 2]], [[1, 2]], 10) == [0], "a finer size that loses more"
    assert spend([[10, 5, 3.9], [10, 5, 4.9]], [[1, 6, 7]] * 2, 12) == [1, 1], "one size for all is better"
    assert spend([[1, 2], [2, 1]], [[1, 2]] * 2, 10) == [0, 1], "each its own"
    assert spend([[2, 1]], [[3, 3]], 10) == [1], "the better of one cost"


def test_errors_are_relative_to_the_matrix():
    weight, form = torch.randn(8, 64), Format("int4", "group", 32, "int")
    small, large = (relative_error(w, form, False) for w in (weight, 1024 * weight))
    assert small == large and small[1] == quantize_tensor(weight, form).nbytes
    assert relative_error(torch.zeros(8, 64), form, False)[0] == 0
    assert relative_error(weight, form, True)[0] != small[0]


def test_errors_are_those_of_the_codes_that_are_made():
    """Two matrices, of which one gets finer groups: which one depends on the clip search."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 8) for _ in range(2))

        def forward(self, x):
            return self.layers[0](x) * self.layers[1](x)

    torch.manual_seed(19)
    weights = [torch.randn(8, 64) for _ in range(2)]
    finer = []
    for clip in (False, True):
        forms = [Format("int4", "group", group, "int") for group in (64, 32)]
        coarse, fine = ([relative_error(w, form, clip)[0] for w in weights] for form in forms)
        finer.append(int(coarse[1] - fine[1] > coarse[0] - fine[0]))
        model = Two()
        for layer, weight in zip(model.layers, weights, strict=True):
            layer.weight.data = weight.clone()
        config = FineQuant(lm_head=None, bits=5.0, group_sizes=(64, 32), clip=clip)
        qcompile.quantize(model, Recipe("f", (config, Fuse())), example=torch.randn(4, 64), progress=False)
        assert [layer.format.group for layer in model.layers] == [[64, 32], [32, 64]][1 - finer[-1]]
    assert finer == [1, 0]


def test_formats_of_rules_stay_and_do_not_count():
    """The budget is that of the other matrices: sizes that fill it, and codes that are searched if asked for."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, n) for n in (64, 64, 64)]).eval()
    weights = [layer.weight.detach().clone() for layer in model]
    rules = (Rule("1.*", weight=Format("int8")),)
    config = FineQuant(lm_head=None, bits=4.8, group_sizes=(64, 32), clip=True)
    report = qcompile.quantize(model, Recipe("f", (config, Fuse()), rules), example=torch.randn(4, 64), progress=False)
    assert model[1].format == Format("int8")
    # Groups of 64 cost 4.625 bits: a byte of a zero point and 4 of a scale; of 32, 5.25. One of two is 4.94.
    assert report.passes[0].notes == ["4.625 bits a weight; group 64: 2, group 32: 0"]
    for layer, weight in zip(model, weights, strict=True):
        assert torch.equal(layer.codes, quantize_tensor(weight, layer.format, clip=True).stored())
    fresh = torch.nn.Sequential(*[torch.nn.Linear(64, n) for n in (64, 64, 64)]).eval()
    config = FineQuant(lm_head=None, bits=5.0, group_sizes=(64, 32))
    report = qcompile.quantize(fresh, Recipe("f", (config, Fuse()), rules), example=torch.randn(4, 64), progress=False)
    assert report.passes[0].notes == ["4.938 bits a weight; group 64: 1, group 32: 1"]


def test_bad_configurations():
    with pytest.raises(ValueError, match="has no groups"):
        FineQuant(weight="int4/row")
    for sizes in ((0,), ()):
        with pytest.raises(ValueError, match="group_sizes must be positive"):
            FineQuant(group_sizes=sizes)
    with pytest.raises(ValueError, match="nothing for scales"):
        FineQuant(bits=4.0)
