"""Adapters of stacks of experts: the identity at the start, differentiable, and merged exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qcompile import Format
from qcompile.modules.adapted_linear import AdaptedLinear
from qcompile.modules.adapted_stack import AdaptedStack
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor

E, N, K, R = 3, 6, 80, 2
FORMATS = ["int4/group32/zero", "int4/group32", "int8/group32/floatzero", "int3/group16/zero"]


def adapted(format="int4/group32/zero", *, rows_first=True, dtype=torch.float32, seed=0):
    """A stack [E, N, K] with adapters that say something, and the codes of each expert."""
    torch.manual_seed(seed)
    form = Format.parse(format)
    experts = [quantize_tensor(torch.randn(N, K), form).stored_parts for _ in range(E)]
    parts = [None if part[0] is None else torch.stack(part) for part in zip(*experts, strict=True)]
    stack = QuantStack(dict(zip(PARTS, parts, strict=True)), form, K, rows_first, dtype)
    a, b = torch.randn(E, R, form.groups(K)), torch.randn(E, N, R)
    return AdaptedStack(stack, a, b, 0.5), experts


@pytest.mark.parametrize("format", FORMATS)
def test_each_expert_is_an_adapted_linear(format):
    module, experts = adapted(format)
    x = torch.randn(4, K)
    for index, stored in enumerate(experts):
        tensors = {**dict(zip(PARTS, stored, strict=True)), "bias": None}
        linear = QuantLinear(K, N, Format.parse(format), None, tensors)
        alone = AdaptedLinear(linear, module.lora_a[index].detach(), module.lora_b[index].detach(), 0.5)
        assert torch.allclose(x @ module()[index].t(), alone(x), atol=1e-4)
        assert torch.equal(module.settled().zero[index], alone.settled().zero)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows_first", [True, False])
def test_settling_keeps_the_values_the_codes_and_the_base(format, rows_first):
    module, _ = adapted(format, rows_first=rows_first)
    base = copy.deepcopy(module.base_stack.state_dict())
    settled = module.settled()
    assert type(settled) is QuantStack and settled.format.zero == "float" and settled.rows_first is rows_first
    assert settled().shape == ((E, N, K) if rows_first else (E, K, N))
    assert torch.allclose(settled(), module(), atol=1e-5)
    assert torch.equal(settled.scale, module.base_stack.scale.float())
    assert all(torch.equal(tensor, base[name]) for name, tensor in module.base_stack.state_dict().items())
    again = QuantStack.empty(settled.describe())
    again.load_state_dict(settled.state_dict())
    assert torch.equal(again(), settled())


def test_without_b_it_is_the_stack_bit_for_bit_and_only_adapters_learn():
    module, _ = adapted()
    with torch.no_grad():
        module.lora_b.zero_()
    assert torch.equal(module(), module.base_stack())
    module().square().sum().backward()
    assert module.lora_b.grad.abs().sum() > 0
    assert [name for name, _ in module.named_parameters()] == ["lora_a", "lora_b"]
    other, _ = adapted()
    other().square().sum().backward()
    assert other.lora_a.grad.abs().sum() > 0


def test_a_cast_of_the_model_casts_what_it_gives():
    module = nn.ModuleList([adapted()[0]]).to(torch.bfloat16)[0]
    assert module().dtype == torch.bfloat16 and module.base_stack.scale.dtype == torch.float32


def test_what_cannot_be_merged_names_the_expert():
    module, _ = adapted()
    with torch.no_grad():
        module.lora_b[1] = float("nan")
    with pytest.raises(ValueError, match="expert 1: its adapter cannot be merged"):
        module.settled()
