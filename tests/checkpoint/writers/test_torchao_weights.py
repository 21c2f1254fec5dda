"""Weights for ExecuTorch: what XNNPACK has no kernel for is refused, and torchao computes with the same values."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.torchao_weights import (
    check_xnnpack,
    check_xnnpack_linear,
    intx_weight,
    take_intx_weights,
)
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor

ACT = "int8/row/zero"


def linear(weight, rows=24, columns=128, act=ACT, bias=False, clip=False):
    torch.manual_seed(0)
    form = Format.parse(weight)
    values = torch.randn(rows, columns) * (1 + 3 * torch.rand(rows, columns) ** 8)
    tensors = dict(zip(PARTS, quantize_tensor(values, form, clip=clip).stored_parts, strict=True))
    return QuantLinear(
        columns, rows, form, act and Format.parse(act), {**tensors, "bias": torch.randn(rows) if bias else None}
    )


@pytest.mark.parametrize(
    "weight, act, columns, words",
    [
        ("fp4/group32", ACT, 64, "site: weights in fp4/group32.*Fix: use int4/group32/bf16 or int8/row"),
        ("fp8/row", ACT, 64, "weights in fp8/row"),
        ("int3/group32/bf16", ACT, 64, "weights in int3/group32/bf16"),
        ("int2/row/bf16", ACT, 64, "weights in int2/row/bf16"),
        ("int4/group32/k6", ACT, 256, "weights in int4/group32/k6"),
        ("int4/group32/dual", ACT, 64, "weights in int4/group32/dual"),
        ("int4/group32/zero/bf16", ACT, 64, "which have zero points.*Fix: use symmetric weights"),
        ("int4/group32/floatzero/bf16", ACT, 64, "which have zero points"),
        ("int8/row/zero", ACT, 64, "which have zero points"),
        ("int8/group32", ACT, 64, r"int8 weights in groups \(int8/group32\).*Fix: use int8/row"),
        ("int4/group32/bf16", None, 64, "activations in float .*Fix: quantize them to int8/row/zero"),
        ("int8/row", "int8/row", 64, "activations in int8/row "),
        ("int8/row", "fp8/row", 64, "activations in fp8/row "),
        ("int4/group32/bf16", ACT, 80, r"groups of 32 columns \(K = 80\).*Fix: use int4/group32/bf16, or int8/row"),
        ("int4/group48/bf16", ACT, 96, r"groups of 48 columns \(K = 96\)"),
        ("int4/row/bf16", ACT, 48, r"groups of 48 columns \(K = 48\)"),
        ("int4/group32", ACT, 64, "scales of int4/group32, .*Fix: quantize to int4/group32/bf16"),
        ("int4/row/f16", ACT, 64, "scales of int4/row/f16, .*Fix: quantize to int4/row/bf16"),
    ],
)
def test_what_has_no_kernel_is_refused(weight, act, columns, words):
    with pytest.raises(ExportError, match=words):
        check_xnnpack("site", Format.parse(weight), act and Format.parse(act), columns, torch.float32)


SAID = ["int4/group32/bf16", "int4/group64/bf16", "int4/row/bf16", "int4/tensor/bf16"]
SAID += ["int8/row/bf16", "int8/row", "int8/tensor"]


@pytest.mark.parametrize("weight", SAID)
def test_what_has_one_is_taken(weight):
    check_xnnpack("site", Format.parse(weight), Format.parse(ACT), 64, torch.bfloat16)


def test_scales_are_positive():
    made = linear("int8/row")
    check_xnnpack_linear("a.b", made)
    for value in (0.0, -0.5, float("nan")):
        made.scale[3] = value
        with pytest.raises(ExportError, match="a.b: a scale of .*, which is not above zero"):
            check_xnnpack_linear("a.b", made)


@given(
    st.sampled_from(SAID),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 9),
    st.floats(0.01, 100),
)  # fmt: skip
def test_torchao_computes_with_the_same_values(weight, rows, blocks, tokens, size):
    """Weights and rounded activations are equal bit for bit, and so is a product of float32."""
    made = linear(weight, rows, 64 * blocks)
    theirs = intx_weight("site", made)
    assert torch.equal(theirs.dequantize(), made.weight) and theirs.dtype == torch.float32
    x = torch.randn(tokens, 64 * blocks, generator=torch.Generator().manual_seed(tokens)) * size
    expected = nn.functional.linear(made.operand(x), made.weight)
    assert torch.equal(nn.functional.linear(x, theirs), expected)


def test_codes_and_scales_stand_where_torchao_has_them():
    made = linear("int4/group32/bf16", 2, 64)
    theirs = intx_weight("site", made)
    assert theirs.qdata.dtype == torch.int8 and int(theirs.qdata.min()) >= -8 and int(theirs.qdata.max()) <= 7
    assert theirs.block_size == (1, 32) and theirs.target_dtype == torch.int4
    assert torch.equal(theirs.scale, made.scale.float()) and not theirs.zero_point.any()
    assert theirs.scale.untyped_storage().nbytes() == theirs.scale.nbytes, "ExecuTorch writes the whole storage"
    one = intx_weight("site", linear("int8/tensor", 3, 64)).scale
    assert one.shape == (3, 1) and one.untyped_storage().nbytes() == one.nbytes


def test_linears_are_replaced_once_with_their_bias():
    shared = linear("int8/row", 128, 128, bias=True)
    model = nn.Sequential(shared, nn.ReLU(), shared, linear("int4/group32/bf16", 8, 128))
    x, before = torch.randn(3, 128), copy.deepcopy(model)
    assert take_intx_weights(model) == 3
    assert type(model[0]) is nn.Linear and model[0] is model[2] and model[3].bias is None
    assert torch.allclose(model(x), before(x), atol=1e-4, rtol=1e-4)
