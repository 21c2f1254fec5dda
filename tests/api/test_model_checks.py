"""Models that cannot be quantized in place are refused in one sentence, before any work."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build

import qcompile
from qcompile import RecipeError
from qcompile.api.model_checks import check_model
from qcompile.modules.generation_hooks import attach
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe


def test_weights_on_the_meta_device_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(RecipeError, match=r"2 of 4 tensors are on the meta device .*1.weight.*Fix: load the weights"):
        qcompile.quantize(model, "int8", example=torch.ones(2, 4), progress=False)


@pytest.mark.parametrize("among_others", [False, True])
def test_offloaded_weights_are_named(among_others):
    from accelerate import hooks

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=model[1].state_dict())
    hooks.add_hook_to_module(model[1], hooks.SequentialHook(hooks.ModelHook(), hook) if among_others else hook)
    with pytest.raises(RecipeError, match="weights of 1 are offloaded.*Fix: load the model without"):
        check_model(model)


def test_a_second_run_on_a_model_with_a_quantized_cache_is_refused():
    model = build("llama")
    attach(model.model, Recipe("kv", (QuantizeKV(8),)))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(
        RecipeError, match="quantized before and has a quantized key/value cache.*Fix: quantize the float"
    ):
        qcompile.quantize(model, "int8", progress=False)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_what_experts_read_is_quantized_in_graphs_only():
    model, recipe = build("mixtral"), Recipe("quantized", (Quantize(experts_act="int8"), Fuse()))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(
        RecipeError, match=r"experts\S+: Quantize quantizes .*experts_act=int8/row.*Fix: drop experts_act"
    ):
        qcompile.quantize(model, recipe, progress=False)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert qcompile.quantize(nn.Sequential(nn.Linear(8, 8)), recipe, example=torch.ones(2, 8), progress=False).sites
