"""The module behind wrappers that compute nothing of their own."""

from __future__ import annotations

import torch
from torch import nn

from qcompile.modules.wrappers import unwrapped


def test_wrappers_of_wrappers():
    inner = nn.Linear(3, 3)
    compiled = torch.compile(inner, backend="eager")
    assert unwrapped(inner) is inner and unwrapped(compiled) is inner
    assert unwrapped(torch.compile(nn.DataParallel(compiled), backend="eager")) is inner
    holder = nn.Sequential(inner)
    assert unwrapped(holder) is holder
