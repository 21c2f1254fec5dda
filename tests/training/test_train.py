"""`train` on the whole: which recipes it takes, what it refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile import NothingToQuantize, RecipeError
from qcompile.codegen.cpu.training_kernels import install_cpu_rounding
from qcompile.modules.training_module import TrainingModule
from qcompile.numerics import code_rounding
from qcompile.pipeline.training_presets import TRAINING_PRESETS

X = torch.randn(4, 64)


def model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 8))  # fmt: skip


def recipe(name):
    """The preset, at a size that fits the model."""
    found = TRAINING_PRESETS[name].to_json()
    if "rank" in found["passes"][0]:
        found["passes"][0]["rank"] = 8
    return found


@pytest.mark.parametrize("name", TRAINING_PRESETS)
def test_a_model_in_training_is_not_prepared_twice_nor_quantized(name):
    found = model()
    report = qcompile.train(found, recipe(name), example=X, progress=False)
    trained = [path for path, module in found.named_modules() if isinstance(module, TrainingModule)]
    assert len(trained) >= 2 and len(report.passes[0].done) == len(trained) and report.recipe == name
    assert found.training, "its mode is as it was"
    with pytest.raises(RecipeError, match="in training already.*qcompile.settle"):
        qcompile.train(found, recipe(name), example=X)
    with pytest.raises(ValueError, match="qcompile.quantize is for models that are not"):
        qcompile.quantize(found, "int8", example=X)
    found(X).sum().backward()
    qcompile.settle(found)
    assert not any(isinstance(module, TrainingModule) for module in found.modules())


@pytest.mark.parametrize("name", TRAINING_PRESETS)
def test_a_recipe_that_trains_is_none_for_quantize_and_the_reverse(name):
    found = model()
    before = [type(module) for module in found.modules()]
    with pytest.raises(RecipeError, match=rf"recipe '{name}' trains. Fix: qcompile.train\(model, '{name}'\)"):
        qcompile.quantize(found, name, example=X)
    with pytest.raises(RecipeError, match=r"recipe 'int8' does not train. Fix: qcompile.quantize\(model, 'int8'\)"):
        qcompile.train(found, "int8", example=X)
    assert [type(module) for module in found.modules()] == before


@pytest.mark.parametrize("name", TRAINING_PRESETS)
def test_frozen_weights_are_left_and_a_frozen_model_is_refused(name):
    found = model()
    found[2].requires_grad_(False)
    report = qcompile.train(found, recipe(name), example=X, progress=False)
    reasons = {site.name: site.reason for site in report.sites}
    assert "requires_grad of its weight is off" in reasons["2.weight"] and type(found[2]) is nn.Linear
    frozen = model().requires_grad_(False)
    with pytest.raises((RecipeError, NothingToQuantize), match="requires_grad"):
        qcompile.train(frozen, recipe(name), example=X, progress=False)
    assert type(frozen[0]) is nn.Linear


@pytest.mark.parametrize("name", TRAINING_PRESETS)
def test_an_error_leaves_the_model_as_it_was(name, monkeypatch):
    from qcompile.api import rewrite_model as rewriting

    found = model()
    before = [type(module) for module in found.modules()]
    state = {key: tensor.clone() for key, tensor in found.state_dict().items()}

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewriting, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        qcompile.train(found, recipe(name), example=X, progress=False)
    after = found.state_dict()
    assert [type(module) for module in found.modules()] == before and found.training
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)


def test_rounding_has_its_kernels_from_the_start(monkeypatch):
    monkeypatch.setattr(code_rounding, "_installed", {})
    install_cpu_rounding.cache_clear()
    qcompile.train(model(), "int4-train", example=X, progress=False)
    assert list(code_rounding._installed) == ["cpu"]
    install_cpu_rounding.cache_clear()
