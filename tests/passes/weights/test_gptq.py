"""GPTQ's law: on the same grid of scales and zero points, never worse than round-to-nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import build, example

import qcompile
from qcompile.calibration.statistics import CalibrationError
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_orthogonal
from qcompile.numerics.qparams import expand_qparams
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.weights import gptq as gptq_module
from qcompile.passes.weights.gptq import GPTQ, compensate, gptq, grid_of, inverse_factor, invert_triangle, loss
from qcompile.recipe.recipe import Recipe

FORMATS = [
    "int8",
    "int4/group32",
    "int4/group32/zero",
    "int4/group32/floatzero",
    "int4/group32/zero/dual",
    "int4/group32/dual",
    "int3/group32/zero",
    "fp8",
    "int8/row/f16",
    "int4/group32/bf16",
    "int4/group32/floatzero/f16",
]


def correlated(seed, columns, rows=400):
    """Inputs with few strong directions, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mix *= torch.logspace(0, -2, columns, dtype=torch.float64)[:, None]
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix
    return x.t() @ x


def solve(weight, hessian, form, *, block_size=128, act_order=True):
    grid = quantize_tensor(weight, Format.parse(form))
    by = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(len(hessian))
    upper = inverse_factor(hessian[by][:, by], 0.01)
    return gptq(weight, hessian, grid, upper, by, block_size), grid


@given(st.sampled_from(FORMATS), st.integers(0, 2**20), st.floats(0.01, 100), st.booleans())
def test_without_correlation_it_is_round_to_nearest(form, seed, size, act_order):
    weight = torch.randn(5, 80, generator=torch.Generator().manual_seed(seed))
    found, grid = solve(weight, size * torch.eye(80, dtype=torch.float64), form, act_order=act_order)
    assert torch.equal(found.codes.float(), grid.codes.float())


@given(st.sampled_from(FORMATS), st.integers(0, 2**20), st.booleans())
def test_it_is_never_worse_and_usually_much_better(form, seed, act_order):
    weight, hessian = torch.randn(24, 96, generator=torch.Generator().manual_seed(seed)), correlated(seed, 96)
    found, grid = solve(weight, hessian, form, act_order=act_order)
    ours, nearest = (loss(weight, q.dequantize(), hessian) for q in (found, grid))
    assert bool((ours <= nearest * (1 + 1e-9)).all())
    assert ours.sum() < 0.6 * nearest.sum()
    scale, zero, low, high = expand_qparams(found)
    if low is not None:  # int8 stays int8
        assert bool((found.codes >= low).all() and (found.codes <= high).all())


@given(st.integers(0, 2**20))
def test_where_greed_loses_nearest_is_kept(seed):
    """With weakly correlated inputs some rows come out worse than rounded to nearest."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(300, 8, generator=generator), torch.randn(60, 8, generator=generator).double()
    hessian = x.t() @ x
    found, grid = solve(weight, hessian, "int3/row")
    ours, nearest = (loss(weight, q.dequantize(), hessian) for q in (found, grid))
    assert bool((ours <= nearest * (1 + 1e-9)).all())
    kept = (found.codes == grid.codes).all(1)
    assert bool((ours[~kept] <= nearest[~kept]).all()) and bool(kept.any())


@given(st.integers(0, 2**20), st.sampled_from([1, 7, 32, 96]))
def test_blocks_change_nothing_but_rounding(seed, block_size):
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hessian = correlated(seed, 96)
    found, _ = solve(weight, hessian, "int4/group32/zero", block_size=block_size)
    want, _ = solve(weight, hessian, "int4/group32/zero", block_size=96)
    assert torch.equal(found.codes, want.codes)


def test_a_singular_hessian_has_no_factor_and_a_damped_one_has():
    assert inverse_factor(torch.zeros(8, 8), 0.01) is None
    one = torch.ones(8, 1) @ torch.ones(1, 8)
    assert inverse_factor(one, 0.01) is not None


def with_eigenvalue(lowest, columns=16):
    """A symmetric matrix of mean diagonal near 1 that needs more damping than -lowest."""
    basis = random_orthogonal(columns, 0)
    return basis @ torch.diag(torch.tensor([1.0] * (columns - 1) + [lowest], dtype=torch.float64)) @ basis.t()


@pytest.mark.parametrize("lowest, fell_back", [(0.5, False), (-0.05, False), (-0.5, False), (-5.0, True)])
def test_damping_rises_until_it_helps(lowest, fell_back):
    """0.01 of the mean diagonal, then ten and a hundred times that; then round-to-nearest."""
    weight, hessian = torch.randn(5, 16), with_eigenvalue(lowest)
    grid = quantize_tensor(weight, Format.parse("int3/row"))
    choice = compensate(weight, hessian, grid, GPTQ())
    assert choice.fell_back == fell_back
    if not fell_back:
        harder = {0.5: 1, -0.05: 10, -0.5: 100}[lowest]
        upper = inverse_factor(hessian, 0.01 * harder)
        want = gptq(weight, hessian, grid, upper, torch.arange(16))
        assert torch.equal(compensate(weight, hessian, grid, GPTQ(act_order=False)).codes.codes, want.codes)
    assert torch.equal(choice.codes.codes, grid.codes) or not fell_back


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_of_large_inputs_are_rounded_first_if_asked_for(act_order):
    weight, hessian = torch.randn(8, 96), correlated(0, 96)
    mixed = torch.randperm(96)
    hessian = hessian[mixed][:, mixed]
    found = [
        solve(weight, hessian, "int3/group32/zero", act_order=order)[0].codes for order in (act_order, not act_order)
    ]
    grid = quantize_tensor(weight, Format.parse("int3/group32/zero"))
    codes = compensate(weight, hessian, grid, GPTQ(act_order=act_order)).codes.codes
    assert torch.equal(codes, found[0]) and not torch.equal(codes, found[1])


def test_rows_beyond_a_block_of_rows_have_their_own_scales(monkeypatch):
    weight, hessian = torch.randn(9, 32) * torch.logspace(-2, 2, 9)[:, None], correlated(0, 32)
    grid = quantize_tensor(weight, Format.parse("int3/group32/zero"))
    whole = compensate(weight, hessian, grid, GPTQ()).codes
    monkeypatch.setattr(gptq_module, "_ELEMENTS", 4)
    monkeypatch.setattr(gptq_module, "_LEAST_ROWS", 4)
    assert torch.equal(compensate(weight, hessian, grid, GPTQ()).codes.codes, whole.codes)


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    weight, hessian = torch.randn(5, 96), correlated(0, 96)
    dead = [3, 40]
    hessian[dead], hessian[:, dead] = 0, 0
    grid = quantize_tensor(weight, Format.parse("int3/group32/zero"))
    choice = compensate(weight, hessian, grid, GPTQ())
    assert not bool(hessian[dead].any()), "the caller's Hessian is not changed"
    assert not choice.fell_back and not torch.equal(choice.codes.codes, grid.codes)
    assert torch.equal(choice.codes.codes[:, dead], grid.codes[:, dead])
    nothing = compensate(weight, torch.zeros_like(hessian), grid, GPTQ())  # an expert that no row reached
    assert not nothing.fell_back and torch.equal(nothing.codes.codes, grid.codes)


@pytest.mark.parametrize("columns", [5, 129, 300])
def test_the_factor_of_the_inverse(columns):
    hessian = correlated(0, columns)
    upper = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    assert torch.allclose(upper.t() @ upper @ damped, torch.eye(columns, dtype=torch.float64), atol=1e-8)


@given(st.integers(1, 300), st.integers(0, 2**20), st.sampled_from([torch.float64, torch.float32]), st.booleans())
def test_the_factor_in_an_order_is_that_of_the_permuted_hessian(columns, seed, dtype, ordered):
    """The plain definition: the upper Cholesky factor of the inverse."""
    hessian = correlated(seed, columns, 2 * columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) if ordered else None
    kept = hessian.clone()
    upper = inverse_factor(hessian, 0.01, order, dtype)
    by = torch.arange(columns) if order is None else order
    damped = hessian[by][:, by] + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    plain = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert upper.dtype == dtype and torch.equal(hessian, kept)
    tight = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    assert torch.allclose(upper.double(), plain, **{**tight, "atol": tight["atol"] * float(plain.abs().max())})
    assert torch.equal(inverse_factor(hessian[by][:, by].contiguous(), 0.01, None, dtype), upper)


@given(st.integers(1, 700), st.integers(0, 2**20), st.booleans())
def test_a_triangle_is_inverted_in_place(size, seed, flipped):
    generator = torch.Generator().manual_seed(seed)
    lower = torch.randn(size, size, generator=generator, dtype=torch.float64).tril(-1) / size**0.5
    lower += torch.diag(0.5 + torch.rand(size, generator=generator, dtype=torch.float64))
    found = lower.clone()
    if flipped:  # columns first, as LAPACK writes them
        found = lower.t().clone(memory_format=torch.contiguous_format).t()
    invert_triangle(found)
    one = torch.eye(size, dtype=torch.float64)
    assert torch.equal(found, found.tril())
    assert torch.allclose(found @ lower, one, atol=1e-8 * float(found.abs().max()))


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "int8-gptq"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "mixtral", "bert"])
@pytest.mark.slow
def test_in_place_and_better_than_nearest(name, recipe):
    def error(recipe):
        model = build(name)
        qcompile.quantize(model, recipe, [example(name)] * 2, progress=False)
        with torch.no_grad():
            got, want = model(**example(name))[0], build(name)(**example(name))[0]
        return float((got - want).norm() / want.norm())

    nearest = {"w4a16-gptq": "w4a16", "int8-gptq": "int8-smooth"}[recipe]
    assert error(recipe) < 1.05 * error(nearest)


def test_bad_input():
    model = build("llama")
    with pytest.raises(ValueError, match="needs calibration data for GPTQ"):
        qcompile.quantize(model, "w4a16-gptq")
    with pytest.raises(CalibrationError, match="empty"):
        qcompile.quantize(model, "w4a16-gptq", [], progress=False)
    for bad in (dict(damp_percent=0), dict(block_size=0)):
        with pytest.raises(ValueError, match="damp_percent and block_size must be positive"):
            GPTQ(**bad)
    with pytest.raises(ValueError, match="stands twice"):
        Recipe("two", (GPTQ(), qcompile.passes.Quantize())).check()
    again = Recipe.from_json(qcompile.find_recipe("w4a16-gptq").to_json())
    assert again == qcompile.find_recipe("w4a16-gptq")


@given(st.integers(0, 2**20))
def test_grids_of_k6_are_never_left_and_are_chosen_for_the_inputs(seed):
    form, generator = Format.parse("int4/group32/k6"), torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 512, generator=generator)
    size = 1 + 10 * torch.rand(512, generator=generator, dtype=torch.float64) ** 6  # some channels are larger
    x = torch.randn(700, 512, generator=generator, dtype=torch.float64) * size
    x += 0.3 * x.mean(1, keepdim=True) * size
    hessian = x.t() @ x
    even = quantize_tensor(weight, form, clip=True)
    aimed = grid_of(weight, hessian, form, GPTQ(form, None, clip=True))
    choices = [compensate(weight, hessian, grid, GPTQ(form, None)).codes for grid in (even, aimed)]
    of_even, of_aimed = (loss(weight, q.dequantize(), hessian) for q in choices)
    assert bool((of_even <= loss(weight, even.dequantize(), hessian) * (1 + 1e-9)).all())
    assert of_aimed.sum() < 0.9 * of_even.sum()
    for grid, choice in zip((even, aimed), choices, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(grid.parts[1:], choice.parts[1:], strict=True))
    plain = grid_of(weight, hessian, form, GPTQ(form, None))
    assert torch.equal(plain.codes, quantize_tensor(weight, form).codes)
    assert torch.equal(grid_of(weight, torch.zeros_like(hessian), form, GPTQ(form, None, clip=True)).codes, even.codes)
