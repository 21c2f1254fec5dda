"""LoRC: the best correction of a rank, beside quantized weights of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import build, example

import qcompile
from qcompile.ir.capture import capture
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse, Quantize
from qcompile.passes.weights.lorc import LoRC, low_rank
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe


@given(st.integers(0, 2**20), st.integers(1, 10), st.sampled_from([(24, 40), (40, 24), (32, 32)]))
def test_eckart_and_young(seed, rank, shape):
    error = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    inner, outer = low_rank(error, rank)
    assert inner.shape == (rank, shape[1]) and outer.shape == (shape[0], rank)
    dropped = torch.linalg.svdvals(error.double())[rank:].square().sum()
    rest = (error - outer @ inner).double().square().sum()
    assert torch.allclose(rest, dropped, rtol=1e-4)
    # The square root of the singular values goes to each side.
    assert torch.allclose(inner.norm(dim=1), outer.norm(dim=0), rtol=1e-3)


def test_full_rank_restores_the_weight_and_zero_error_needs_none():
    error = torch.randn(24, 40)
    inner, outer = low_rank(error, 24)
    assert torch.allclose(outer @ inner, error, atol=1e-4)
    inner, outer = low_rank(torch.zeros(8, 8), 2)
    assert torch.equal(outer @ inner, torch.zeros(8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act, factors", [(None, None), ("int8/row", None), (None, "int8/row")])
def test_corrections_by_hand(act, factors, dtype):
    """Of the float input, whatever the product reads; the report counts what they take."""
    form, act, factors = Format.parse("int3/row"), act and Format.parse(act), factors and Format.parse(factors)
    model, x = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 16)).to(dtype).requires_grad_(False), torch.randn(5, 24)
    x = x.to(dtype)
    program, report = run(capture(model, (x,)), Recipe("r", (Quantize(form, act, lm_head=None), LoRC(4, factors))))
    value, added, sizes = x, 0, []
    for layer in model:
        q = quantize_tensor(layer.weight, form)
        inner, outer = low_rank(layer.weight.float() - q.dequantize(dtype).float(), 4)
        parts = [part.to(dtype) if factors is None else quantize_tensor(part, factors) for part in (inner, outer)]
        bytes_of = [part.nbytes for part in parts]
        inner, outer = (part if factors is None else part.dequantize(dtype) for part in parts)
        read = value if act is None else quantize_tensor(value, act).dequantize(dtype)
        value = nn.functional.linear(read, q.dequantize(dtype), layer.bias) + (value @ inner.t()) @ outer.t()
        added, sizes = added + sum(bytes_of), [*sizes, q.nbytes + sum(bytes_of)]
    (found,) = program(x)
    assert found.dtype == dtype and torch.allclose(
        found, value, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=0.05
    )
    assert float((found - value).norm() / value.norm()) < (1e-5 if dtype == torch.float32 else 0.02)
    assert report.passes[1].notes == [f"rank 4: {8 * added / (24 * 40 + 40 * 16):.3f} bits a weight"]
    assert [site.bytes_after for site in report.sites] == sizes
    kinds = {part: t.dtype for part, t in program.weights.items() if part.endswith((".low_in", ".low_out"))}
    assert len(kinds) == 4 and set(kinds.values()) == {dtype if factors is None else torch.int8}


def test_errors_of_low_rank_have_no_other_directions():
    """Eigenvalues that rounding makes negative have no root, and small ones keep their digits."""
    error = torch.randn(40, 2) @ torch.randn(2, 24)
    for one in (error, error.t(), 1e-25 * error):
        inner, outer = low_rank(one, 24)
        assert bool(inner.isfinite().all() and outer.isfinite().all())
        rest = one.double() - outer.double() @ inner.double()
        assert float(rest.norm() / one.double().norm()) < 1e-5


def logits(model, name):
    with torch.no_grad():
        return model(**example(name))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name, act, factors", [("llama", None, None), ("gpt2", "int8", None), ("bert", None, "int8")])
def test_a_correction_helps_and_a_full_one_is_the_float_model(name, act, factors):
    want, errors = logits(build(name), name), []
    for rank in (0, 4, 1000):
        model = build(name)
        config = Quantize(Format.parse("int3/row"), None if act is None else Format.parse(act), lm_head=None)
        passes = (config, *([LoRC(rank, factors)] if rank else []), Fuse())
        qcompile.quantize(model, Recipe("test", passes), [example(name)], progress=False)
        errors.append(float((logits(model, name) - want).norm() / want.norm()))
    assert errors[1] < errors[0]
    if act is None:
        assert errors[2] < (1e-4 if factors is None else errors[0] / 20)


@pytest.mark.slow
def test_int8_factors_are_half_the_bytes_and_survive_saving(tmp_path):
    models = {}
    for factors in (None, Format("int8")):
        models[factors] = model = build("llama").to(torch.bfloat16)
        recipe = Recipe("test", (Quantize(Format.parse("int4/group32"), None), LoRC(4, factors), Fuse()))
        qcompile.quantize(model, recipe, [example("llama")], progress=False)
    linears = [[m for m in model.modules() if isinstance(m, QuantLinear)] for model in models.values()]
    for wide, narrow in zip(*linears, strict=True):
        assert narrow.low_in.dtype == narrow.low_out.dtype == torch.int8
        assert 2 * narrow.low_in.nbytes == wide.low_in.nbytes and 2 * narrow.low_out.nbytes == wide.low_out.nbytes
        for part in ("low_in", "low_out"):
            codes, scale = getattr(narrow, part).float(), getattr(narrow, f"{part}_scale")
            error = (codes * scale - getattr(wide, part).float()).abs().amax(1, keepdim=True)
            assert bool((error <= scale * (0.5 + 127 * 2**-8)).all())  # half a scale, and what bfloat16 took
    narrow = models[Format("int8")].float()
    want = logits(narrow, "llama")
    qcompile.save(narrow, tmp_path / "q")
    fresh = build("llama").to(torch.bfloat16).float()  # its rotary table was cast as well
    assert torch.equal(logits(qcompile.load(tmp_path / "q", fresh), "llama"), want)
    compiled = torch.compile(copy.deepcopy(narrow), backend="qcompile")
    assert torch.allclose(logits(compiled, "llama"), want, atol=1e-4)
    assert qcompile.export_onnx(narrow, tmp_path / "onnx", progress=False).metrics["onnx relative error"] < 1e-4


@pytest.mark.parametrize("factors", ["int4", "int8/group32"])
def test_other_factors_are_refused(factors):
    with pytest.raises(qcompile.RecipeError, match="factors are int8"):
        LoRC(8, factors)


def test_bad_configurations():
    with pytest.raises(ValueError, match="at least 1"):
        LoRC(0)
    with pytest.raises(ValueError, match="LoRC needs Quantize"):
        Recipe("alone", (LoRC(),)).check()
    with pytest.raises(ValueError, match="Fuse must come after LoRC"):
        Recipe("order", (Quantize(), Fuse(), LoRC())).check()
