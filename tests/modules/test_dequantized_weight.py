"""The weight of a quantized linear can be read like any tensor, and every write to it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.modules.dequantized_weight import DequantizedWeight, read_only


def add_to_data(w):
    w.data += 1.0


def set_data(w):
    w.data = torch.zeros(3, 4)


def set_item(w):
    w[0] = 1.0


@pytest.mark.parametrize(
    "write",
    [
        add_to_data,
        set_data,
        set_item,
        lambda w: w.add_(1.0),
        lambda w: w.data.copy_(torch.zeros(3, 4)),
        lambda w: w.detach().t()[0].zero_(),
        lambda w: nn.init.normal_(w),
        lambda w: torch.add(w, 1.0, out=w),
        lambda w: torch._foreach_mul_([w], 2.0),
    ],
)
def test_writes_are_refused(write):
    values = torch.randn(3, 4)
    weight = read_only(values.clone())
    with torch.no_grad(), pytest.raises(ValueError, match="would have no effect.*Fix: take weight.clone"):
        write(weight)
    assert torch.equal(weight, values)


def test_what_is_computed_is_a_plain_tensor():
    values = torch.randn(3, 4)
    weight = read_only(values.clone())
    for made in (weight + 1, weight.clone(), weight.double(), nn.functional.linear(torch.ones(2, 4), weight)):
        assert type(made) is torch.Tensor
    weight.clone().add_(1.0)
    target = torch.zeros(3, 4)
    target.copy_(weight)
    assert torch.equal(target, values) and weight.requires_grad_(False).shape == (3, 4)
    assert type(weight.view(12)) is DequantizedWeight and weight.dtype is torch.float32


def test_pytorch_does_not_bypass_the_module_with_it():
    """nn.TransformerEncoderLayer reads its linears' weights and computes without them where they are plain tensors."""
    assert torch.overrides.has_torch_function((read_only(torch.ones(1)),))
