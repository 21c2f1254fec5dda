"""HQQ: zero points that no group is worse with than with those of round-to-nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import rewrite
from torch import nn
from zoo import build, example

import qcompile
from qcompile.ir.capture import capture
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
    assert torch.equal(found.scale, nearest.scale) and int(found.codes.max()) < 2**bits


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
    for form in ("int4/group64/zero", "int4/row/floatzero"):
        with pytest.raises(ValueError, match="float zero points"):
            HQQ(Format.parse(form))
    for bad in (dict(norm=1.5), dict(norm=0.0), dict(beta=0.0), dict(steps=0)):
        with pytest.raises(ValueError, match="0 < norm < 1"):
            HQQ(**bad)


def test_the_steps_are_those_of_the_law():
    """Group by group: shrink, the best zero point of what remains, codes; of all steps the best, each group its own."""
    weight, form = heavy(0, rows=6, columns=40), Format("int3", "group", 16, "float")
    nearest = quantize_tensor(weight, form)
    found = hqq(weight, nearest, norm=0.6, beta=5.0, steps=6)
    for n in range(6):
        for g, columns in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
            w, s, z = weight[n, columns], nearest.scale[n, g], nearest.zero[n, g]
            tried = []
            for _ in range(7):
                q = (w / s + z).round().clamp(0, 7)
                error = w - (q - z) * s
                tried.append((float(error.abs().sum()), float(z), q))
                size = error.abs()
                rest = error.sign() * (size - size.clamp_min(1e-8) ** -0.4 / 5).clamp_min(0)
                z = (q - (w - rest) / s).mean()
            _, zero, codes = min(tried, key=lambda one: one[0])
            assert float(found.zero[n, g]) == pytest.approx(zero, abs=1e-4)
            assert torch.equal(found.codes[n, columns].float(), codes)


@pytest.mark.parametrize("config", [HQQ(lm_head=None), HQQ(norm=0.5, beta=3.0, steps=2, lm_head=None, clip=True)])
def test_the_config_reaches_the_search(config):
    layer, x = nn.Linear(160, 12), torch.randn(3, 160)
    layer.weight.data = heavy(0)
    program = capture(layer.requires_grad_(False), (x,))
    rewrite(program, config, batches=[[x]])
    grid = quantize_tensor(layer.weight, config.weight, clip=config.clip)
    want = hqq(layer.weight, grid, norm=config.norm, beta=config.beta, steps=config.steps)
    assert torch.equal(program.weights["weight.zero"], want.zero)
    assert torch.equal(program.weights["weight.codes"], want.stored())


def test_a_whole_row_with_a_float_zero_point_is_rounded_to_nearest():
    layer, x, row = nn.Linear(160, 12), torch.randn(3, 160), Format.parse("int4/row/floatzero")
    program = capture(layer.requires_grad_(False), (x,))
    (report,) = rewrite(program, HQQ(lm_head=row), batches=[[x]])
    assert torch.equal(program.weights["weight.zero"], quantize_tensor(layer.weight, row).zero)
    assert report.notes == ["rounded to nearest, their format has no float zero points in groups: weight"]


@pytest.mark.parametrize("scale", ["bf16", "f16"])
def test_offsets_of_its_zero_points_are_values_of_the_stored_dtype(scale):
    weight, form = heavy(3), Format("int4", "group", 64, "float", scale=scale)
    nearest = quantize_tensor(weight, form)
    found = hqq(weight, nearest)
    assert not torch.equal(found.zero, nearest.zero) and found.scale.dtype == form.scale_dtype
    offset = found.scale.float() * found.zero
    stored = offset.to(form.scale_dtype).float()
    assert bool(((offset - stored).abs() <= 2**-22 * offset.abs()).all())


def test_six_bit_scales_have_no_zero_points_to_move():
    form = Format.parse("int4/group32/k6")
    with pytest.raises(ValueError, match="HQQ finds float zero points for groups, and the format is int4/group32/k6"):
        HQQ(form, None)
    model, x = nn.Sequential(nn.Linear(256, 8)), torch.randn(3, 256)
    passes = (HQQ("int4/group32/floatzero", None, lm_head=form), Fuse())
    report = qcompile.quantize(model, Recipe("hqq", passes), example=x, progress=False)
    assert "rounded to nearest, their format has no float zero points in groups: 0.weight" in str(report)
