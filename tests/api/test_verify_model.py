"""`verify_model`: the exact part of a recipe, certified in float64."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example

from qcompile.api.verify_model import exact_part, verify_model, verify_program
from qcompile.ir.capture import capture
from qcompile.passes import FoldNorm, Rotate, Untie
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import RecipeError


def test_only_exact_passes_remain():
    exact = exact_part(find_recipe("w4a4-rotated"))
    assert [type(p).__name__ for p in exact.passes][:3] == ["Untie", "FoldNorm", "Rotate"]
    assert not any("Quantize" in type(p).__name__ or type(p).__name__ == "Fuse" for p in exact.passes)
    assert exact_part(find_recipe("int8")).passes == ()


def test_the_laws_hold_in_float64_and_the_model_stays():
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = verify_model(model, example("llama"))
    assert {c.name for c in report.certificates} >= {type(p).__name__ for p in (FoldNorm(), Rotate())}
    for certificate in report.certificates:
        assert certificate.holds and certificate.error < 1e-9 and certificate.dtype == "float64"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_program_is_verified_on_its_flat_inputs():
    inputs = example("llama")
    program = capture(build("llama"), (), inputs)
    report = verify_program(program, list(inputs.values()), "w4a4-rotated")
    assert report.certificates and all(c.holds for c in report.certificates)


def test_a_recipe_without_exact_passes_certifies_nothing():
    assert verify_model(build("mlp"), torch.randn(4, 48), "w4a16").certificates == []
    with pytest.raises(RecipeError, match="unknown recipe"):
        verify_model(build("mlp"), torch.randn(4, 48), "no")


def test_untie_is_exact():
    assert type(exact_part(find_recipe("exact")).passes[0]) is Untie
