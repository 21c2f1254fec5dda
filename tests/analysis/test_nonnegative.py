"""Values that are never negative, by their operators: whatever is claimed holds for random inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.analysis.nonnegative import is_nonnegative
from qcompile.ir.capture import capture


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


YES = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "softmax of scores": lambda x: x.softmax(-1),
    "pooled": lambda x: F.adaptive_avg_pool2d(F.max_pool2d(F.relu(x), 2), 1).flatten(1),
    "mean": lambda x: F.relu(x).mean((2, 3)),
    "sum of two": lambda x: F.relu(x) + F.relu(-x),
    "joined": lambda x: torch.cat([F.relu(x), x.abs()], 1),
    "sliced": lambda x: F.relu(x)[:, 1:].transpose(1, 2),
    "split": lambda x: F.relu(x).chunk(2, 1)[0],
    "clamped": lambda x: x.clamp(min=0.0),
    "clamped 6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "scaled": lambda x: F.relu(x) * 0.5,
    "dropped": lambda x: F.dropout(F.relu(x), 0.5, True),
}
NO = {
    "input": lambda x: x + 0,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu minus": lambda x: F.relu(x) - 1,
    "sum with the input": lambda x: F.relu(x) + x,
    "joined with the input": lambda x: torch.cat([F.relu(x), x], 1),
    "scaled below zero": lambda x: F.relu(x) * -0.5,
    "clamped below zero": lambda x: x.clamp(min=-0.1),
    "clamped above": lambda x: x.clamp(max=6.0),
    "hardtanh": F.hardtanh,
}


def claim(function):
    program = capture(Function(function).eval(), (torch.randn(2, 4, 6, 6),))
    return is_nonnegative(program.outputs[0])


@pytest.mark.parametrize("name", YES)
def test_yes(name):
    assert claim(YES[name])
    assert float(YES[name](torch.randn(64, 4, 6, 6)).min()) >= 0


@pytest.mark.parametrize("name", NO)
def test_no(name):
    assert not claim(NO[name])
    assert float(NO[name](torch.randn(64, 4, 6, 6)).min()) < 0


def test_answers_are_kept():
    program = capture(Function(lambda x: F.relu(x).flatten(1)).eval(), (torch.randn(2, 4, 6, 6),))
    known = {}
    assert is_nonnegative(program.outputs[0], known) and len(known) == 2
