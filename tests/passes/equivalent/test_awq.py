"""AWQ's scales and its search."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import FirstTokenLate, UsedTwice, rewrite, rewritten
from padded_batches import decoder, padded, texts, unpadded
from rank_threads import Kept, Together
from torch import nn
from zoo import build, example

import qcompile
from qcompile.calibration import ranks as ranks_module
from qcompile.calibration.ranks import Ranks
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import AWQ, GPTQ, Fuse, Quantize, Rotate, SmoothQuantPlus
from qcompile.passes.equivalent.awq import _search, awq, awq_scale, scaled_error
from qcompile.pipeline.run import run
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

FORM = Format.parse("int4/group32/zero")


@given(st.integers(0, 2**20), st.floats(0, 0.95))
def test_scales(seed, exponent):
    mean = torch.rand(40, generator=torch.Generator().manual_seed(seed)) + 0.01
    scale = awq_scale(mean, exponent)
    assert torch.allclose((scale.max() * scale.min()).log(), torch.zeros((), dtype=torch.float64), atol=1e-9)
    assert bool((scale[mean.argsort()].diff() >= 0).all())  # rises with the activation
    assert torch.equal(awq_scale(mean, 0), torch.ones(40, dtype=torch.float64))


@given(st.integers(0, 2**20))
def test_the_error_is_that_of_the_product(seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(50, 64, generator=generator), torch.randn(9, 64, generator=generator)
    scale = torch.rand(64, generator=generator).double() + 0.5
    rounded = quantize_tensor((w.double() * scale).float(), FORM).dequantize().double()
    want = (x.double() / scale @ rounded.t() - x.double() @ w.double().t()).square().sum()
    assert abs(scaled_error(w, x.t().double() @ x.double(), scale, FORM) / float(want) - 1) < 1e-3


def test_outliers_are_protected():
    """Channels with large activations get larger scales, and the product a smaller error."""
    x, w = torch.randn(200, 64), torch.randn(32, 64)
    x[:, :3] *= 30
    hessian, mean = (x.t() @ x).double(), x.abs().mean(0)
    errors = [scaled_error(w, hessian, awq_scale(mean, r / 20), FORM) for r in range(20)]
    assert min(errors) < 0.5 * errors[0]


def test_padding_has_no_part_in_the_search():
    _, program = decoder()
    rows, scaled = texts([3, 11, 6]), []
    for batches in (unpadded(rows), [padded(rows)], [padded(rows, left=True, extra=2)]):
        after = program.copy()
        (report,) = rewrite(after, AWQ(FORM), batches=batches)
        scaled.append((report.notes, after.weights["up.weight"], after.weights["query.weight"]))
    assert all(notes == scaled[0][0] for notes, *_ in scaled)
    assert all(
        torch.allclose(a, b, rtol=1e-4) for found in scaled for a, b in zip(found[1:], scaled[0][1:], strict=True)
    )


def test_the_search_protects_outliers():
    """A few channels decide the product: scaling by them takes a third off its error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False)
    with torch.no_grad():
        model[0].weight[:3] *= 30
    x = torch.randn(200, 64)
    errors = {}
    for passes in ((), (AWQ(FORM, norms=False),)):
        program, config = capture(model, (x,), {}), Quantize(FORM, None, lm_head=None)
        only = Recipe("q", (*passes, config, Fuse()), (Rule("0.weight", keep=True),))
        quantized, report = run(program, only, batches=lambda: [[x]], example=[x])
        errors[bool(passes)] = float((quantized(x)[0] - model(x)).norm())
    assert errors[True] < 0.7 * errors[False], errors
    (awq,) = [p for p in report.passes if p.name == "AWQ"]
    assert awq.notes and "0.00 to 0.00" not in awq.notes[0]


def test_never_worse_than_no_scaling_on_its_calibration_data():
    """Exponents are ranked on 64 of 200 rows, which alone would take a worse one than 0 now and then."""
    chosen = []
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 200)).requires_grad_(False)
        x = torch.randn(100, 16)
        program = capture(model, (x,))
        rewrite(program, AWQ(FORM, steps=8), batches=[[x]])
        scale = (program.weights["2.weight"] / model[2].weight)[0].double()
        rows = model[1](model[0](x))
        hessian, ones = (rows.t() @ rows).double(), torch.ones_like(scale)
        ours, none = (scaled_error(model[2].weight, hessian, s, FORM) for s in (scale, ones))
        assert ours <= none * (1 + 1e-5)
        chosen.append(not torch.allclose(scale, ones))
    assert any(chosen) and not all(chosen)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2", "gemma2", "phi3", "mixtral", "bert"])
def test_exact_on_real_structures(name):
    model = build(name)
    passes = (qcompile.passes.Untie(), AWQ(Format.parse("int3/group32/zero")))
    report = qcompile.quantize(model, Recipe("awq", passes), [example(name)], progress=False)
    with torch.no_grad():
        got, want = model(**example(name))[0], build(name)(**example(name))[0]
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    (awq,) = [p for p in report.passes if p.name == "AWQ"]
    assert awq.done and all(c.holds for c in report.certificates)


def test_bad_recipes():
    with pytest.raises(ValueError, match="steps must be at least 2"):
        AWQ(steps=1)
    with pytest.raises(ValueError, match=r"AWQ\(norms=True\) puts scales"):
        Recipe("both", (qcompile.passes.FoldNorm(), AWQ(), Rotate())).check()
    for search in (AWQ(FORM), SmoothQuantPlus(FORM)):
        for behind in (Quantize(FORM, clip=True), GPTQ(Format.parse("int4/group64/zero"))):
            with pytest.raises(ValueError, match="give both the same"):
                Recipe("other", (search, behind, Fuse())).check()
    with pytest.raises(ValueError, match="needs calibration data for AWQ"):
        qcompile.quantize(build("llama"), "w4a16-awq")


def test_a_dead_channel_has_a_finite_scale():
    scale = awq_scale(torch.tensor([0.0, 1.0, 4.0]), 0.5)
    assert bool(scale.isfinite().all()) and float(scale[0]) > 0


def test_a_weight_that_is_used_twice_takes_no_scale():
    *_, (report,) = rewritten(UsedTwice(), AWQ(SMALL), x=torch.randn(3, 8, dtype=torch.float64))
    assert not report.done and any("is tied to" in place.reason for place in report.skipped)


SMALL = Format.parse("int4/group8/zero")


class Outliers(nn.Module):
    """Siblings behind a norm of uneven gains, and a linear behind one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 80)
        self.down = nn.Linear(16, 8)
        with torch.no_grad():
            self.norm.weight.copy_(torch.arange(1.0, 17.0).square())
            self.norm.bias.copy_(torch.randn(16) * 3)
            self.a.weight[:5] *= 30

    def forward(self, x):
        y = self.norm(x)
        return self.b(y), self.down(torch.relu(self.a(y)))


ROWS = torch.randn(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kinds,done", [((True, False), ["a.weight"]), ((False, True), ["down.weight"])])
def test_either_kind_of_place_can_be_excluded(kinds, done):
    norms, rows = kinds
    *_, (report,) = rewritten(Outliers(), AWQ(SMALL, norms=norms, rows=rows, steps=4), x=ROWS)
    assert [name.replace("b.", "a.") for name in report.done] == done
    assert any("norms=False" in place.reason or "rows=False" in place.reason for place in report.skipped)


def searched(weights, x, steps):
    """The paper's search, written again: all rows, all siblings."""
    mean, hessian = x.abs().mean(0), x.t() @ x
    scales = [awq_scale(mean, step / steps) for step in range(steps)]
    errors = [sum(scaled_error(w.float(), hessian, scale, SMALL) for w in weights) for scale in scales]
    return scales[errors.index(min(errors))]


def test_the_search_is_that_of_the_paper():
    model = Outliers().double().requires_grad_(False)
    program = capture(model, (ROWS,), dynamic=True)
    before = dict(program.weights)
    batches = [[ROWS], [ROWS[:, :2] * 3 - 1]]
    rewrite(program, AWQ(SMALL, steps=7), batches=batches)
    rows = model.norm(torch.cat([batch[0].flatten(0, 1) for batch in batches]))
    want = searched([model.a.weight, model.b.weight], rows, 7)
    assert torch.allclose(before["norm.weight"] / program.weights["norm.weight"], want, rtol=1e-5)
    assert not torch.allclose(want, torch.ones_like(want))
    want = searched([model.down.weight], torch.relu(model.a(rows)), 7)
    assert torch.allclose((program.weights["down.weight"] / before["down.weight"])[0], want, rtol=1e-5)


def test_the_search_rounds_as_the_pass_behind_it():
    generator = torch.Generator().manual_seed(0)
    w, scale = torch.randn(6, 32, generator=generator), torch.ones(32, dtype=torch.float64)
    w[:, 0] *= 4
    for clip in (False, True):
        error = (quantize_tensor(w, FORM, clip=clip).dequantize() - w).double().square().sum()
        assert scaled_error(w, torch.eye(32), scale, FORM, clip) == pytest.approx(float(error), rel=1e-5)


def test_shared_rows_are_searched_with_one_scale():
    program = SimpleNamespace(weights={"w": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))})
    channels = torch.arange(4).repeat(2)
    source = SimpleNamespace(site=SimpleNamespace(N=4), channels=channels)
    mean = torch.arange(1.0, 9.0) ** 2
    _, scale = _search(program, (SimpleNamespace(name="w"),), source, mean.diag(), mean, AWQ(SMALL, steps=4))
    assert torch.equal(scale, scale[4:].repeat(2))


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_search_side_by_side_and_fold_the_same_scales(monkeypatch, count):
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(16, 16, 64, generator=generator)] for _ in range(6)]  # each is a block of tokens
    parts = [part for _ in range(5) for part in (nn.Linear(64, 64), nn.ReLU())]
    program = capture(nn.Sequential(*parts).requires_grad_(False), (batches[0][0],))
    group, searched, module = Together(count), [], sys.modules[awq.__module__]

    def scaled(ranks):
        own = program.copy()
        context = PassContext.of(own, batches=lambda: batches, finished=Kept(ranks))
        report = awq(own, AWQ(FORM, steps=4), context)
        return own.weights, report.done, report.notes

    want, done, notes = scaled(Ranks())
    assert len(done) == 4 and "exponents 0.00 to 0.00" not in notes

    def counted(of, sites, *rest):
        searched.append((group.place.rank, sites[0].name))
        return _search(of, sites, *rest)

    monkeypatch.setattr(ranks_module, "dist", group)
    monkeypatch.setattr(module, "_search", counted)
    for weights, names, said in group.run(scaled):
        assert (names, said) == (done, notes)
        assert [name for name, weight in weights.items() if not torch.equal(weight, want[name])] == []
    assert sorted(name for _, name in searched) == sorted(done), "each once"
    shares = [sum(rank == own for own, _ in searched) for rank in range(count)]
    assert max(shares) - min(shares) <= 1


def test_readers_of_one_norm_need_not_follow_one_another():
    model, batch = FirstTokenLate().eval(), torch.randn(8, 2, 32)
    want = model(batch).detach()
    recipe = Recipe("awq", (AWQ(weight=FORM), Quantize(FORM), Fuse()))
    report = qcompile.quantize(model, recipe, [batch], progress=False)
    awq_report = next(entry for entry in report.passes if entry.name == "AWQ")
    assert awq_report.done == ["b.weight", "c.weight"] and awq_report.skipped == []
    assert float((model(batch) - want).norm() / want.norm()) < 0.2
