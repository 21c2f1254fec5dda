"""A device is checked before work; models on one are tried in a process that has a pretend device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qcompile.api.device_placement import device_of, move_to_device
from qcompile.recipe.rule import RecipeError

ON_DEVICE = Path(__file__).parents[1] / "pretend_device" / "on_device.py"


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused_before_work(device):
    model = nn.Linear(4, 4)
    with pytest.raises(RecipeError, match=f"device '{device}' .*Fix: another device, or none"):
        move_to_device(model, device)
    assert model.weight.device.type == "cpu"


def test_the_device_of_a_model_is_that_of_all_its_tensors():
    assert device_of(nn.Linear(4, 4)) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None and device_of(nn.Linear(4, 4, device="meta")) is None
    assert device_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))) is None


@pytest.mark.slow
def test_models_on_a_device_that_refuses_what_a_gpu_refuses():
    command = [sys.executable, "-m", "pytest", str(ON_DEVICE), "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ON_DEVICE.parents[2])
    assert done.returncode == 0, done.stdout[-6000:]
