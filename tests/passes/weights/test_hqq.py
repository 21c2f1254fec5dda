"""HQQ: zero points that no group is worse with than with those of round-to-nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import build, example

import qcompile
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse
from qcompile.passes.weights.hqq import HQQ, best_zero, hqq, shrink
from qcompile.recipe.recipe import Recipe


def heavy(seed, rows=12, columns=160):
    """Weights with outliers: what HQQ's norm is for. 160 columns leave a ragged group."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    return w + (torch.rand(rows, columns, generator=generator) < 0.03) * 5 * w.sign()


@given(st.integers(0, 2**20), st.sampled_from([2, 3, 4]))
def test_no_group_is_worse_than_nearest(seed, bits):
    weight = heavy(seed)
    form = Format(f"int{bits}", "group", 64, "float")
    nearest = quantize_tensor(weight, form)
    found = hqq(weight, nearest)

    def by_group(q):
        error = (q.dequantize() - weight).abs()
        return torch.nn.functional.pad(error, (0, -160 % 64)).unflatten(-1, (-1, 64)).sum(-1)

    assert bool((by_group(found) <= by_group(nearest) * (1 + 1e-5)).all())
    assert by_group(found).sum() < 0.99 * by_group(nearest).sum()
    assert torch.equal(found.scale, nearest.scale)


@given(st.integers(0, 2**20))
def test_the_zero_is_the_least_squares_one(seed):
    generator = torch.Generator().manual_seed(seed)
    target, scale = torch.randn(3, 2, 16, generator=generator).double(), torch.rand(3, 2, 1, generator=generator) + 0.1
    codes, inside = torch.randint(0, 16, (3, 2, 16), generator=generator).double(), torch.ones(3, 2, 16).double()
    inside[:, 1, 10:] = 0  # a ragged group
    zero = best_zero(target, codes, scale, inside)

    def size(z):
        return ((target - scale * (codes - z)).square() * inside).sum(-1, keepdim=True)

    assert bool((size(zero) < size(zero + 1e-3)).all() and (size(zero) < size(zero - 1e-3)).all())


@given(st.floats(-10, 10), st.floats(0.1, 0.9), st.floats(1, 100))
def test_shrink_is_a_contraction_with_the_sign_of_the_error(value, norm, beta):
    found = float(shrink(torch.tensor(value), norm, beta))
    assert abs(found) <= abs(value) + 1e-6 and found * value >= 0


def test_sites_in_another_format_are_rounded_to_nearest_and_the_report_says_so():
    model = build("mistral")
    recipe = Recipe("hqq", (HQQ(Format.parse("int4/group32/floatzero"), lm_head=Format("int8")), Fuse()))
    report = qcompile.quantize(model, recipe, [example("mistral")], progress=False)
    (note,) = report.passes[0].notes
    assert note == "rounded to nearest, their format has no float zero points in groups: lm_head.weight"
    assert torch.equal(model.lm_head.codes, quantize_tensor(build("mistral").lm_head.weight, Format("int8")).stored())
    others = [m for m in model.modules() if isinstance(m, QuantLinear) and m is not model.lm_head]
    assert others and all(m.zero.is_floating_point() for m in others)


def test_bad_configurations():
    with pytest.raises(ValueError, match="float zero points"):
        HQQ(Format.parse("int4/group64/zero"))
    with pytest.raises(ValueError, match="0 < norm < 1"):
        HQQ(norm=1.5)
