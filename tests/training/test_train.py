"""`train` on the whole: which recipes it takes, what it refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile import NothingToQuantize, RecipeError
from qcompile.backend import training_speed
from qcompile.codegen.cpu.training_kernels import install_cpu_rounding
from qcompile.codegen.kernel_choice import KernelChoice
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


def by_outputs(shape, dtype):
    """A layer in the middle is slower than float."""
    ratio = 0.5 if shape.rows < 100 else 2.0
    return KernelChoice(shape.kernel, ratio, f"{ratio}x float")


def test_sites_that_train_slower_than_float_are_told(monkeypatch):
    monkeypatch.setattr(training_speed, "choose_training_kernel", by_outputs)
    found = model()
    with pytest.warns(UserWarning, match="2 sites train slower than in float: 2.weight.*rows 4.*keep_float"):
        report = qcompile.train(found, "int4-train", example=X, progress=False)
    assert isinstance(found[2], TrainingModule) and "2 of 2 sites train slower" in str(report)
    kernels = {site.name: list(site.kernel.values()) for site in report.sites}
    assert kernels["2.weight"] == ["fixed_point_linear (0.5x float)"] and kernels["0.weight"] == []


def test_sites_that_train_slower_than_float_may_stay_float(monkeypatch, recwarn):
    monkeypatch.setattr(training_speed, "choose_training_kernel", by_outputs)
    found = model()
    found[2].requires_grad_(False)
    options = dict(example=X, progress=False, on_slow_kernel="keep_float")
    with pytest.raises(RecipeError, match="4.weight: fixed_point_linear .0.5x float. at rows 4.*='quant") as error:
        qcompile.train(found, "int4-train", **options)
    assert "2.weight: requires_grad of its weight is off" in str(error.value)
    report = qcompile.train(found, "int4-train", rows=512, **options)
    reasons = {site.name: site.reason for site in report.sites}
    assert isinstance(found[4], TrainingModule) and "requires_grad" in reasons["2.weight"]
    assert not [w for w in recwarn if "train slower" in str(w.message)]


def test_low_rank_sites_are_not_compared(monkeypatch, recwarn):
    monkeypatch.setattr(training_speed, "choose_training_kernel", by_outputs)
    report = qcompile.train(model(), recipe("q-galore"), example=X, progress=False, on_slow_kernel="keep_float")
    assert report.passes[0].done and not [w for w in recwarn if "train slower" in str(w.message)]


def test_a_model_of_its_own_example_has_no_size_to_compare_at(recwarn):
    import transformers

    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=32)  # fmt: skip
    found = transformers.LlamaForCausalLM(config)
    with pytest.raises(RecipeError, match="keep_float': speed was not compared.*Fix: give batches, example, or rows"):
        qcompile.train(found, "int4-train", progress=False, on_slow_kernel="keep_float")
    report = qcompile.train(found, "int4-train", progress=False)
    assert "speed was not compared with float" in str(report)
    assert not [w for w in recwarn if "train slower" in str(w.message)]


@pytest.mark.parametrize("options,said", [({"on_slow_kernel": "float"}, "use 'quantize' or 'keep_float'"),
                                          ({"rows": 0}, "rows=0 is no integer"),
                                          ({"rows": True}, "rows=True")])  # fmt: skip
def test_wrong_options(options, said):
    with pytest.raises(RecipeError, match=said):
        qcompile.train(model(), "int4-train", example=X, **options)
