"""Laws of the data-free weight algorithms: FineQuant, HQQ and LoRC."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import build, example

import qcompile
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.passes.weights.finequant import FineQuant, spend
from qcompile.passes.weights.hqq import HQQ, best_zero, hqq, shrink
from qcompile.passes.weights.lorc import LoRC, low_rank
from qcompile.recipe.recipe import Recipe

FLOAT_ZERO = Format.parse("int4/group64/floatzero")


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


@given(st.integers(0, 2**20), st.integers(1, 10), st.sampled_from([(24, 40), (40, 24), (32, 32)]))
def test_eckart_and_young(seed, rank, shape):
    error = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    inner, outer = low_rank(error, rank)
    assert inner.shape == (rank, shape[1]) and outer.shape == (shape[0], rank)
    dropped = torch.linalg.svdvals(error.double())[rank:].square().sum()
    left = (error - outer @ inner).double().square().sum()
    assert torch.allclose(left, dropped, rtol=1e-4)
    # The square root of the singular values goes to each side.
    assert torch.allclose(inner.norm(dim=1), outer.norm(dim=0), rtol=1e-3)


def test_full_rank_restores_the_weight_and_zero_error_needs_none():
    error = torch.randn(24, 40)
    inner, outer = low_rank(error, 24)
    assert torch.allclose(outer @ inner, error, atol=1e-4)
    inner, outer = low_rank(torch.zeros(8, 8), 2)
    assert torch.equal(outer @ inner, torch.zeros(8, 8))


def logits(model, name):
    with torch.no_grad():
        return model(**example(name))[0]


@pytest.mark.parametrize("act, factors", [(None, None), ("int8", None), (None, "int8")])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_correction_helps_and_a_full_one_is_the_float_model(name, act, factors):
    want, errors = logits(build(name), name), []
    for rank in (0, 4, 1000):
        model = build(name)
        how = Quantize(Format.parse("int3/row"), None if act is None else Format.parse(act), lm_head=None)
        passes = (how, *([LoRC(rank, factors)] if rank else []), qcompile.passes.Fuse())
        qcompile.quantize(model, Recipe("test", passes), [example(name)], progress=False)
        errors.append(float((logits(model, name) - want).norm() / want.norm()))
    assert errors[1] < errors[0]
    if act is None:
        assert errors[2] < (1e-4 if factors is None else errors[0] / 20)


def test_int8_factors_are_half_the_bytes_and_survive_saving(tmp_path):
    models = {}
    for factors in (None, Format("int8")):
        models[factors] = model = build("llama").to(torch.bfloat16)
        recipe = Recipe(
            "test", (Quantize(Format.parse("int4/group32"), None), LoRC(4, factors), qcompile.passes.Fuse())
        )
        qcompile.quantize(model, recipe, [example("llama")], progress=False)
    linears = [[m for m in model.modules() if isinstance(m, QuantLinear)] for model in models.values()]
    for wide, narrow in zip(*linears, strict=True):
        assert narrow.low_in.dtype == narrow.low_out.dtype == torch.int8
        assert 2 * narrow.low_in.nbytes == wide.low_in.nbytes and 2 * narrow.low_out.nbytes == wide.low_out.nbytes
        for part in ("low_in", "low_out"):
            numbers, scale = getattr(narrow, part).float(), getattr(narrow, f"{part}_scale")
            error = (numbers * scale - getattr(wide, part).float()).abs().amax(1, keepdim=True)
            assert bool((error <= scale * (0.5 + 127 * 2**-8)).all())  # half a step, and what bfloat16 took
    narrow = models[Format("int8")].float()
    want = logits(narrow, "llama")
    qcompile.save(narrow, tmp_path / "q")
    fresh = build("llama").to(torch.bfloat16).float()  # its rotary table was cast as well
    assert torch.equal(logits(qcompile.load(tmp_path / "q", fresh), "llama"), want)
    compiled = torch.compile(copy.deepcopy(narrow), backend="qcompile")
    assert torch.allclose(logits(compiled, "llama"), want, atol=1e-4)
    assert qcompile.export_onnx(narrow, tmp_path / "onnx", progress=False).numbers["onnx relative error"] < 1e-4


@pytest.mark.parametrize("factors", ["int4", "int8/group32"])
def test_other_factors_are_refused(factors):
    with pytest.raises(qcompile.RecipeError, match="factors are int8"):
        LoRC(8, factors)


@pytest.mark.parametrize("recipe", ["w4a16-lorc", "w4a16-hqq", "w4a16-finequant"])
def test_saves_loads_compiles_and_exports(recipe, tmp_path):
    model = build("llama")
    how = recipe
    if recipe == "w4a16-finequant":  # matrices of 64 columns need more than the preset's budget for their scales
        how = Recipe("fine", (FineQuant(bits=6.0), qcompile.passes.Fuse()))
    report = qcompile.quantize(model, how, [example("llama")], progress=False)
    want = logits(model, "llama")
    if recipe == "w4a16-lorc":
        assert any(m.low_in is not None for m in model.modules() if isinstance(m, QuantLinear))
        assert "bits a weight" in str(report)
    qcompile.save(model, tmp_path / "q")
    again = qcompile.load(tmp_path / "q", build("llama"))
    assert torch.equal(logits(again, "llama"), want)
    compiled = torch.compile(copy.deepcopy(model), backend="qcompile")
    assert torch.allclose(logits(compiled, "llama"), want, atol=1e-4)
    exported = qcompile.export_onnx(model, tmp_path / "onnx", progress=False)
    assert exported.numbers["onnx relative error"] < 1e-4


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
    how = FineQuant(lm_head=None, bits=5.0)
    report = qcompile.quantize(model, Recipe("f", (how, qcompile.passes.Fuse())), example=torch.randn(4, 256))
    assert model[2].format.group < model[0].format.group
    assert "bits a weight" in report.passes[0].notes[0]
    with pytest.raises(ValueError, match="already take"):
        tight = FineQuant(lm_head=None, bits=4.01)
        fresh = torch.nn.Sequential(torch.nn.Linear(256, 256))
        qcompile.quantize(fresh, Recipe("f", (tight,)), example=torch.randn(4, 256))


def test_bad_configurations():
    with pytest.raises(ValueError, match="real zeros"):
        HQQ(Format.parse("int4/group64/zero"))
    with pytest.raises(ValueError, match="0 < norm < 1"):
        HQQ(norm=1.5)
    with pytest.raises(ValueError, match="at least 1"):
        LoRC(0)
    with pytest.raises(ValueError, match="LoRC needs Quantize"):
        Recipe("alone", (LoRC(),)).check()
    with pytest.raises(ValueError, match="Fuse must come after LoRC"):
        Recipe("order", (Quantize(), qcompile.passes.Fuse(), LoRC())).check()
