"""Every kind of module goes into an entry and comes back with the same tensors, or is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.module_entries import build, describe, replaced_parameters
from qcompile.ir.quantized_stacks import STACK_SUFFIX
from qcompile.modules.kv_constants import Centers, Prefix, Scales
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor


def quant_linear():
    form = Format.parse("int4/group16/zero")
    tensors = dict(zip(PARTS, quantize_tensor(torch.randn(12, 40), form).stored_parts, strict=True))
    low = {"low_in": torch.randn(3, 40), "low_out": torch.randn(12, 3)}
    return QuantLinear(
        40, 12, form, Format("int8"), {**tensors, **low, "bias": torch.randn(12), "signs": torch.ones(40)}
    )


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


KINDS = {
    "QuantLinear": quant_linear,
    "QuantStack": stack,
    "RotatedLinear": lambda: RotatedLinear(Transposed(), torch.ones(40)),
    "RMSNorm": lambda: nn.RMSNorm(12, eps=1e-3),
    "Prefix": lambda: Prefix(
        torch.tensor([1]), [(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))], torch.ones(1, 1, 9)
    ),
    "Centers": lambda: Centers([torch.ones(2, 4), torch.ones(2, 4)]),
    "Scales": lambda: Scales([(torch.ones(2, 4), torch.ones(2, 4))]),
}


def rebuilt(module, change=(), entry_change=()):
    """A module from its entry, as JSON has it, and its tensors."""
    tensors = {name: t.detach().clone() for name, t in module.state_dict().items() if not name.startswith("inner.")}
    tensors |= dict(change)
    entry = json.loads(json.dumps({**describe(module), **dict(entry_change)}))
    return build("a.b", entry, {n: t for n, t in tensors.items() if t is not None}, getattr(module, "inner", None))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back(kind):
    module = KINDS[kind]()
    again = rebuilt(module)
    assert type(again) is type(module) and describe(again) == describe(module) and describe(module)["kind"] == kind
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype


def test_a_norm_without_a_gain_has_none():
    norm = rebuilt(nn.RMSNorm(12, eps=1e-3, elementwise_affine=False))
    assert norm.weight is None and norm.eps == 1e-3


class Own(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.LayerNorm(2), nn.Sequential(), Own(2)])
def test_modules_of_float_models_have_no_entry(module):
    assert describe(module) is None


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("QuantLinear", {"bias": torch.ones(11)}),
        ("QuantLinear", {"bias": torch.full((12,), float("nan"))}),
        ("QuantLinear", {"signs": torch.zeros(40)}),
        ("QuantLinear", {"low_in": torch.ones(4, 40)}),
        ("QuantLinear", {"low_in": torch.ones(3, 40, dtype=torch.int8)}),
        ("QuantLinear", {"low_out": None}),
        ("QuantLinear", {"zero": None}),
        ("QuantLinear", {"group_scale": torch.ones(12, 3, dtype=torch.int8)}),
        ("QuantStack", {"scale": torch.ones(2, 6)}),
        ("QuantStack", {"zero": torch.full((2, 6, 2), 99, dtype=torch.uint8)}),
        ("RotatedLinear", {"signs": torch.ones(20)}),
        ("RotatedLinear", {"signs": torch.full((40,), 2.0)}),
        ("RMSNorm", {"weight": torch.ones(11)}),
        ("RMSNorm", {"weight": None}),
        ("RMSNorm", {"bias": torch.ones(12)}),
        ("Prefix", {"ids": torch.tensor([9])}),
        ("Prefix", {"ids": torch.tensor([-1])}),
        ("Prefix", {"ids": torch.tensor([1.0])}),
        ("Prefix", {"keys0": torch.ones(1, 2, 2, 4)}),
        ("Prefix", {"values0": torch.full((1, 2, 1, 4), float("nan"))}),
        ("Centers", {"center1": torch.ones(2)}),
        ("Centers", {"center1": None}),
        ("Scales", {"keys0": torch.zeros(2, 4)}),
        ("Scales", {"values0": torch.full((2, 4), float("inf"))}),
        ("Scales", {"values0": torch.ones(2, 4).half()}),
    ],
)
def test_tensors_that_an_entry_does_not_allow_are_refused(kind, change):
    with pytest.raises(CheckpointError, match=r"a\.b.* Fix: "):
        rebuilt(KINDS[kind](), change)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("QuantLinear", {"kind": "Other"}),
        ("QuantLinear", {"kind": ["QuantLinear"]}),
        ("QuantLinear", {"in": "40"}),
        ("QuantLinear", {"in": 39}),
        ("QuantLinear", {"in": -40}),
        ("QuantLinear", {"out": 10**30}),
        ("QuantLinear", {"format": "int4/group8/zero"}),
        ("QuantLinear", {"format": "int9"}),
        ("QuantLinear", {"format": None}),
        ("QuantLinear", {"act": "int4//"}),
        ("QuantLinear", {"has": 3}),
        ("QuantLinear", {"has": ["codes"]}),
        ("QuantLinear", {"rank": None}),
        ("QuantStack", {"dtype": "int8"}),
        ("QuantStack", {"dtype": "nn"}),
        ("QuantStack", {"columns": 31.0}),
        ("QuantStack", {"rows_first": "yes"}),
        ("QuantStack", {"tensors": {}}),
        ("RMSNorm", {"eps": "x"}),
        ("RMSNorm", {"eps": -1.0}),
        ("RMSNorm", {"shape": 3}),
        ("RMSNorm", {"shape": [13]}),
    ],
)
def test_entries_that_are_none_are_refused(kind, change):
    with pytest.raises(CheckpointError, match=r"'a\.b.* Fix: ") as caught:
        rebuilt(KINDS[kind](), entry_change=change)
    assert "\n" not in str(caught.value)


def test_the_suffix_is_the_stacks():
    assert replaced_parameters({f"a.up{STACK_SUFFIX}": {"kind": "QuantStack"}, "a": {"kind": "RMSNorm"}}) == {"a.up"}
