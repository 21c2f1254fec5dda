"""Which modules the config names: those of the dataflow, not of a list of names."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import qcompile
from qcompile import RecipeError
from qcompile.training.adapters import adapted_names


def model():
    found = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    qcompile.quantize(found, "w4a16-g32", example=torch.randn(4, 64), progress=False)
    return found


def test_targets_are_the_products_that_can_have_an_adapter():
    found, x = model(), torch.randn(4, 64)
    config = qcompile.peft_config(found, 2, 4, example=x)
    assert sorted(config.target_modules) == sorted(adapted_names(found, 2, 4, x)) == ["0", "2"]
    assert qcompile.peft_config(found, target_modules=["2"]).target_modules == {"2"}
    assert get_peft_model(found, config)(x).shape == (4, 8)


def test_a_float_model_is_refused():
    with pytest.raises(RecipeError, match="adapts no product"):
        qcompile.peft_config(nn.Sequential(nn.Linear(64, 64)), example=torch.randn(2, 64))
