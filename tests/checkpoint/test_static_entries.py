"""Entries of modules with static activations: back to the same module, and every lie is refused."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.module_entries import build, describe
from qcompile.modules.static_quant import StaticQuantConv, StaticQuantLinear
from qcompile.numerics.code_convolution import ConvolutionShape


def conv():
    codes = torch.randint(-7, 8, (6, 2, 3, 3), dtype=torch.int8)
    act = torch.tensor(0.3), 0, 15
    shape = ConvolutionShape((1, 2), (1, 0), (1, 1), 2)
    return StaticQuantConv.of(codes, 4, torch.tensor(0.1), torch.randn(6), act, shape)


def linear():
    codes = torch.randint(-3, 4, (6, 9), dtype=torch.int8)
    return StaticQuantLinear.of(codes, 3, torch.tensor(0.1), None, (torch.tensor(0.3), -7, 7))


def entry_of(module):
    return json.loads(json.dumps(describe(module)))


@pytest.mark.parametrize("make,shape", [(conv, (3, 4, 7, 7)), (linear, (3, 9))])
def test_there_and_back(make, shape):
    module = make()
    again = build("a.b", entry_of(module), dict(module.named_buffers()))
    assert type(again) is type(module) and entry_of(again) == entry_of(module)
    x = torch.randn(shape)
    assert torch.equal(again(x), module(x))


@pytest.mark.parametrize(
    "make,key,value",
    [
        (conv, "size", [6, 2, 3]), (conv, "size", [6, 2, 3, -3]), (conv, "moves", [[1, 0], [1, 0], [1, 1]]),
        (conv, "moves", [[1], [1, 0], [1, 1]]), (conv, "groups", 4), (conv, "format", "int4/row"),
        (conv, "format", "fp4/tensor"), (conv, "codes", [0, 128]), (conv, "codes", [1, 15]), (conv, "has", ["codes"]),
        (conv, "size", [6, 2, 3, True]), (linear, "codes", [-7.0, 7]), (linear, "codes", [7]), (linear, "in", 8),
    ],
)  # fmt: skip
def test_entries_that_are_none(make, key, value):
    module = make()
    with pytest.raises(CheckpointError, match="'a.b"):
        build("a.b", {**entry_of(module), key: value}, dict(module.named_buffers()))


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize(
    "name,value",
    [
        ("act_scale", torch.tensor(-1.0)), ("act_scale", torch.tensor(torch.nan)), ("act_scale", torch.ones(2)),
        ("act_scale", torch.tensor(1)), ("scale", torch.tensor(torch.inf)), ("bias", torch.full((6,), torch.nan)),
        ("codes", torch.zeros(5, 2, dtype=torch.uint8)), ("other", torch.ones(1)),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(make, name, value):
    module = make()
    with pytest.raises(CheckpointError, match="'a.b"):
        build("a.b", entry_of(module), {**dict(module.named_buffers()), name: value})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv1d(1, 4, 3), nn.Conv1d(4, 8, 3, groups=2)
        self.inner, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.conv(F.relu(self.stem(x)))).mean(-1)
        return self.head(torch.tanh(self.inner(x)))


def test_save_and_load_bit_for_bit(tmp_path):
    model, x = Net(), torch.randn(16, 1, 12)
    qcompile.train(model, "int4-train", [x], progress=False)
    for _ in range(2):
        model(x).square().mean().backward()
    model.eval()
    before = model(x).detach()
    with pytest.raises(ValueError, match="in training"):
        qcompile.save(model, tmp_path / "early")
    qcompile.settle(model)
    qcompile.save(model, tmp_path / "s")
    loaded = qcompile.load(tmp_path / "s", Net())
    assert torch.equal(model(x), before) and torch.equal(loaded(x), before)
    assert type(loaded.conv) is StaticQuantConv and type(loaded.inner) is StaticQuantLinear
