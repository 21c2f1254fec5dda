"""Every kind of module goes into an entry and comes back with the same buffers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from qcompile.checkpoint.module_entries import describe, place, replaced_parameters
from qcompile.modules.kv_constants import CENTERS, PREFIX, SCALES, Centers, Prefix, Scales
from qcompile.modules.quant_experts import STACK_SUFFIX, QuantStack, replace_parameter
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor


def quant_linear():
    form = Format.parse("int4/group16/zero")
    tensors = dict(zip(PARTS, quantize_tensor(torch.randn(12, 40), form).stored_parts, strict=True))
    low = {"low_in": torch.randn(3, 40), "low_out": torch.randn(12, 3)}
    return QuantLinear(40, 12, form, Format("int8"), {**tensors, **low, "bias": torch.randn(12)})


def stack():
    form = Format.parse("int4/group16/zero")
    parts = [
        None if t is None else t.unflatten(0, (2, 6)) for t in quantize_tensor(torch.randn(12, 32), form).stored_parts
    ]
    return QuantStack(dict(zip(PARTS, parts, strict=True)), form, 32, False, torch.bfloat16)


class Transposed(nn.Module):
    """A linear that stores its weight as [K, N]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 12))

    def forward(self, x):
        return x @ self.weight


class Host(nn.Module):
    """A float model with a place for each kind."""

    def __init__(self):
        super().__init__()
        self.linear, self.other, self.norm = nn.Linear(40, 12), Transposed(), nn.LayerNorm(12)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(2, 32, 6))


def quantized_host():
    model = Host()
    model.linear = quant_linear()
    model.other = RotatedLinear(model.other, torch.ones(40))
    model.norm = nn.RMSNorm(12, eps=1e-3)
    replace_parameter(model, "experts.up", stack())
    model.add_module(
        PREFIX, Prefix(torch.tensor([1]), [(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))], torch.ones(1, 1, 9))
    )
    model.add_module(CENTERS, Centers([torch.ones(2, 4)]))
    model.add_module(SCALES, Scales([(torch.ones(2, 4), torch.ones(2, 4))]))
    return model


def test_every_kind_comes_back():
    """From JSON, into a float model; a rotated linear may store its weight either way."""
    source = quantized_host()
    entries = {path: entry for path, m in source.named_modules() if (entry := describe(m))}
    assert [entry["kind"] for entry in entries.values()] == [
        "QuantLinear", "RotatedLinear", "RMSNorm", "QuantStack", "Prefix", "Centers", "Scales"
    ]  # fmt: skip
    target = Host()
    assert replaced_parameters(entries) == {"experts.up"}
    for path, entry in json.loads(json.dumps(entries)).items():
        place(target, path, entry, source.state_dict())
    for name, tensor in source.state_dict().items():
        mine = target.state_dict()[name]
        assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype), name
    target.load_state_dict(source.state_dict(), strict=True, assign=True)
    x = torch.randn(3, 40)
    assert torch.equal(target.linear(x), source.linear(x)) and torch.equal(target.other(x), source.other(x))
    assert torch.equal(target.experts.up, source.experts.up) and target.experts.up.dtype == torch.bfloat16
    assert target.norm.eps == 1e-3


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.LayerNorm(2), nn.Sequential()])
def test_modules_of_float_models_have_no_entry(module):
    assert describe(module) is None


def test_the_suffix_is_the_stacks():
    assert replaced_parameters({f"a.up{STACK_SUFFIX}": {"kind": "QuantStack"}, "a": {"kind": "RMSNorm"}}) == {"a.up"}
