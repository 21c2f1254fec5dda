"""What `quantize` and `train` share: modes are restored, and the caller's reasons keep sites as they are."""

from __future__ import annotations

import time

import torch
from torch import nn

from qcompile.api.rewrite_model import evaluation_mode, rewrite_model
from qcompile.modules.quant_linear import QuantLinear
from qcompile.pipeline.presets import PRESETS

OPTIONS = dict(example=torch.randn(4, 64), verify=True, progress=False, dump=None)


def model():
    return nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.Sequential(nn.ReLU(), nn.Linear(64, 64)))


def test_sites_that_the_caller_keeps_say_why():
    found = model()
    reason = {"2.1.weight": "the caller says so"}
    report, ran = rewrite_model(found, PRESETS["int8"], None, keep_float=lambda _facts: reason, **OPTIONS)
    assert {site.name: site.reason for site in report.sites}["2.1.weight"] == "the caller says so"
    assert isinstance(found[0], QuantLinear) and type(found[2][1]) is nn.Linear and ran.name == "int8"


def test_seconds_are_of_the_whole_call():
    class Slow(nn.Linear):
        def forward(self, input):
            time.sleep(0.5)  # capture and comparison call the model; passes run its graph
            return super().forward(input)

    report, _ = rewrite_model(nn.Sequential(nn.Linear(64, 64), Slow(64, 64)), PRESETS["int8"], None, **OPTIONS)
    assert report.seconds > 1


def test_every_module_is_in_its_own_mode_again():
    found = model()
    found[2].eval()
    with evaluation_mode(found):
        assert not any(module.training for module in found.modules())
        found[0] = nn.Linear(64, 64).eval()
    assert found.training and found[1].training and not found[2].training and not found[2][1].training
    assert found[0].training, "a new module is as the one before it"


def test_a_new_module_has_the_mode_of_the_one_in_whose_place_it_is():
    found = model()
    found[2].eval()
    rewrite_model(found, PRESETS["int8"], None, **OPTIONS)
    assert found[0].training and isinstance(found[2][1], QuantLinear) and not found[2][1].training
