"""DGQ: the protective range of dual-grained weights, and the search of their two levels of scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import build, example

import qcompile
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import DGQ, GPTQ, Fuse, Quantize
from qcompile.passes.weights.dgq import search_groups, search_rows
from qcompile.passes.weights.gptq import loss
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError, Rule

DUAL = Format.parse("int4/group16/zero/dual")


def second_level(low, high, values):
    """QoQ's second level as the paper writes it, without a clamp to int8."""
    scale = torch.round((high - low) / 15).clamp_min(1)
    zero = torch.round(-low / scale).clamp(0, 15)
    return scale * ((torch.round(values / scale) + zero).clamp(0, 15) - zero)


@pytest.mark.parametrize("most,safe", [(119, True), (120, False)])
def test_the_protective_range_is_119(most, safe):
    """Every group of int8 codes in +-119 comes back as int8; +-120 does not (arXiv:2405.04532 sec. 4.1)."""
    low = torch.arange(-most, 1.0)[:, None].expand(-1, most + 1)
    high = torch.arange(0.0, most + 1)[None].expand(most + 1, -1)
    ends = torch.stack([second_level(low, high, v) for v in (low, high)])
    assert (int(ends.max()) <= 127 and int(ends.min()) >= -128) == safe


def problem(seed, rows=6, columns=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, columns, generator=generator) * torch.rand(columns, generator=generator) ** 2 * 5
    return torch.randn(rows, columns, generator=generator), x.t() @ x


@given(st.integers(0, 999))
def test_the_search_keeps_int8_and_is_never_worse(seed):
    w, hessian = problem(seed)
    q = search_rows(w, hessian, *search_groups(w, hessian, DUAL), DUAL)
    inner = (q.codes.int() - expand_groups(q.zero, DUAL, 40).int()) * expand_groups(q.group_scale, DUAL, 40).int()
    assert int(inner.abs().max()) <= 127 and int(q.codes.max()) <= 15
    for clip in (False, True):
        plain = quantize_tensor(w, DUAL, clip=clip)
        assert bool((loss(w, q.dequantize(), hessian) <= (1 + 1e-4) * loss(w, plain.dequantize(), hessian)).all())


def test_the_search_helps_on_average():
    found = [0.0, 0.0]
    for seed in range(20):
        w, hessian = problem(seed)
        searched = search_rows(w, hessian, *search_groups(w, hessian, DUAL), DUAL)
        for index, q in enumerate((quantize_tensor(w, DUAL), searched)):
            found[index] += float(loss(w, q.dequantize(), hessian).sum())
    assert found[1] < 0.85 * found[0], found


def test_phase_one_takes_the_range_that_costs_least():
    w, hessian = torch.zeros(1, 16), torch.eye(16)
    w[0, 0], w[0, 1:] = 1.0, torch.linspace(-0.5, 0.5, 15)
    wide, _ = search_groups(w, hessian, DUAL)
    hessian[0, 0] = 1e-6  # what clipping the outlier costs
    tight, _ = search_groups(w, hessian, DUAL)
    assert float(tight) < float(wide)


def test_searched_scales_are_those_of_the_law():
    """Group by group and row by row: of either sign, of zeros, and ragged."""
    w, hessian = problem(0, rows=6)
    w[1], w[2], w[3], w[4, 16:32] = w[1].abs() + 1, -w[2].abs() - 1, 0, 0
    w[5, :16], hessian[0], hessian[:, 0] = 0, 0, 0
    w[5, 0] = 50.0  # which no scale needs to cover
    scale, zero = search_groups(w, hessian, DUAL)

    def rounded(values, s, z, low=0, high=15):
        return ((values / s).round() + z).clamp(low, high) - z

    for n in range(6):
        for g, columns in enumerate(range(40)[first : first + 16] for first in (0, 16, 32)):
            values, h = w[n, columns], hessian[columns][:, columns]
            low, high = min(values.min(), torch.tensor(0.0)), max(values.max(), torch.tensor(0.0))
            width = max(high - low, torch.tensor(1e-20))
            assert float(zero[n, g]) == float((-low / width * 15).round())
            scales = [*(width * (1.02 - 0.011 * step) / 15 for step in range(1, 21)), scale[n, g]]
            errors = [rounded(values, s, zero[n, g]) * s - values for s in scales]
            *tried, found = (float(e @ h @ e) for e in errors)
            assert found <= min(tried) * (1 + 1e-4)
    q = search_rows(w, hessian, scale, zero, DUAL)
    found = loss(w, q.dequantize(), hessian)
    assert float(q.scale[5]) < 0.5 * 50 / 127
    z = expand_groups(zero, DUAL, 40)
    for step in range(1, 81):
        row = w.abs().amax(1, keepdim=True).clamp_min(1e-30) * (1.02 - 0.82 * step / 80) / 127
        s1 = expand_groups((scale / row).round().clamp(1, 127), DUAL, 40)
        reach = (127 / s1).floor()
        values = rounded(w / row, s1, z, (z - reach).clamp_min(0), (z + reach).clamp_max(15)) * s1 * row
        assert bool((found <= loss(w, values, hessian) * (1 + 1e-3) + 1e-9).all()), step


def test_formats_of_rules_are_rounded_to_nearest():
    """Of one level, or without zero points: nothing to search, but their clip."""
    model, forms = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)), ("int4/group16/dual", "int3/group16/zero")
    weights = [layer.weight.detach().clone() for layer in model]
    rules = tuple(Rule(f"{i}.*", weight=Format.parse(form)) for i, form in enumerate(forms))
    recipe = Recipe("r", (DGQ(DUAL, None, lm_head=None), Fuse()), rules)
    qcompile.quantize(model, recipe, [torch.randn(5, 32)], progress=False)
    for layer, weight, form in zip(model, weights, forms, strict=True):
        assert torch.equal(layer.codes, quantize_tensor(weight, Format.parse(form), clip=True).stored())


def test_integer_scales_cost_little():
    w = torch.randn(64, 1024)
    form = Format.parse("int4/group128/zero/dual")
    q = search_rows(w, torch.eye(1024), *search_groups(w, torch.eye(1024), form), form)
    free = quantize_tensor(w, Format.parse("int4/group128/zero"))
    assert (q.dequantize() - w).square().sum() < 1.05 * (free.dequantize() - w).square().sum()


def test_on_a_model():
    model, inputs = build("llama"), example("llama")
    with torch.no_grad():
        want = model(**inputs).logits
    errors = {}
    form = Format.parse("int4/group32/zero/dual")
    for name, config in (
        ("plain", Quantize(form, Format("int8"), lm_head=form)),
        ("dgq", DGQ(form, Format("int8"), lm_head=form)),
        ("gptq", DGQ(form, Format("int8"), lm_head=form, codes="gptq")),
    ):
        again = build("llama")
        report = qcompile.quantize(again, Recipe(name, (config, Fuse())), [inputs], progress=False)
        assert not report.skipped and {s.weight for s in report.sites} == {str(form)}
        with torch.no_grad():
            errors[name] = float((again(**inputs).logits - want).norm())
    assert errors["gptq"] < errors["dgq"] < errors["plain"], errors


def test_bad_recipes_are_refused():
    with pytest.raises(RecipeError, match="must be dual"):
        DGQ(Format.parse("int4/group128/zero"))
    with pytest.raises(RecipeError, match="must be dual"):
        DGQ(Format.parse("int4/group128/dual"))
    with pytest.raises(RecipeError, match="codes must be"):
        DGQ(codes="best")
    with pytest.raises(RecipeError, match="GPTQ stands twice"):
        Recipe("two", (DGQ(), GPTQ())).check()
