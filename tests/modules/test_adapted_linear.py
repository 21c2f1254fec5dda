"""A quantized linear with an adapter: its value, its merge, and what stays float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile import Format, QuantLinear
from qcompile.modules.adapted_linear import AdaptedLinear, merged
from qcompile.numerics.rounding import quantize_tensor

FORMATS = ["int4/group32/zero", "int4/group32", "int4/group48/floatzero", "int3/group32/zero", "int8/group16"]


def adapted(text="int4/group32/zero", act=None, k=80, n=12, rank=3, signs=False):
    form = Format.parse(text)
    q = quantize_tensor(torch.randn(n, k), form)
    tensors = dict(zip(("codes", "scale", "zero", "group_scale"), q.stored_parts, strict=True), bias=torch.randn(n))
    tensors["signs"] = torch.randn(k).sign() if signs else None
    base = QuantLinear(k, n, form, Format.parse(act) if act else None, tensors)
    return AdaptedLinear(base, torch.randn(rank, form.groups(k)), torch.randn(n, rank), 0.7)


@given(st.sampled_from(FORMATS), st.sampled_from([None, "int8/row", "int4/group32"]), st.integers(8, 20), st.booleans())
def test_the_settled_linear_computes_the_same(text, act, eighths, signs):
    module = adapted(text, act, k=8 * eighths if not signs else 96, signs=signs)
    x = torch.randn(2, 5, module.base_layer.in_features)
    with torch.no_grad():
        want, got = module(x), module.settled()(x)
    assert torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_the_adapter_reads_the_mean_of_each_group():
    module = adapted(k=64)
    x = torch.randn(5, 64)
    pooled = x.view(5, 2, 32).mean(-1)
    want = module.base_layer(x) + 0.7 * pooled @ module.lora_a.t() @ module.lora_b.t()
    assert torch.allclose(module(x), want, atol=1e-5)


def test_gradients_reach_the_adapter_and_the_input_only():
    module = adapted(act="int8/row")
    x = torch.randn(5, 80, requires_grad=True)
    module(x).square().sum().backward()
    assert module.lora_a.grad.abs().max() > 0 and module.lora_b.grad.abs().max() > 0 and x.grad.abs().max() > 0
    assert {name for name, _ in module.named_parameters()} == {"lora_a", "lora_b"}


def test_it_shows_weight_and_bias_of_its_base_and_its_rank():
    module = adapted()
    assert torch.equal(torch.Tensor(module.weight), torch.Tensor(module.base_layer.weight))
    assert module.bias is module.base_layer.bias and "rank=3, group=32" in repr(module)


def test_scales_and_the_correction_of_the_base_are_kept():
    module = adapted()
    module.base_layer.low_in, module.base_layer.low_out = torch.randn(2, 80), torch.randn(12, 2)
    half = module.bfloat16()
    assert half.base_layer.scale.dtype == torch.float32 and half.lora_a.dtype == torch.bfloat16
    settled = half.settled()
    assert settled.low_in is half.base_layer.low_in and settled.bias is half.base_layer.bias
    assert settled.zero.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_cannot_be_merged_is_refused(value):
    module = adapted()
    product = torch.zeros(12, 3, dtype=torch.float64)
    product[1, 1] = value
    with pytest.raises(ValueError, match="its adapter cannot be merged: the weights would change by (nan|inf)"):
        merged(module.base_layer, product, 1.0)
