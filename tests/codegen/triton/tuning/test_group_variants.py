"""What `kernels tune` times of 4-bit weights in groups by 8-bit codes is a linear layer, from copies of its own."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE

from qcompile.codegen.triton.tuning import group_variants
from qcompile.codegen.triton.tuning.baselines import WeightCopies
from qcompile.codegen.triton.tuning.group_variants import group_call, random_group_weight
from qcompile.numerics.format import Format


@pytest.mark.parametrize(
    "form,act,codes",
    [
        ("int4/group64/zero", "int4/group64", torch.int8),
        ("int4/group64/zero", "int4/group64/zero", torch.int8),
        ("int4/group64", "int4/group64/smooth", torch.int8),
        ("int4/group64", "int8/tensor", torch.int8),
        ("int4/group192/zero", "int4/group192/zero", torch.int8),
        ("fp4/group64/m2", "fp8/row", torch.float8_e4m3fn),
    ],
)
def test_a_timed_call_is_a_linear_layer(form, act, codes, monkeypatch):
    device, calls = torch.device(DEVICE), []
    multiply = group_variants.linear_group

    def multiplied(x, x_scale, weight, *rest):
        calls.append((x, weight))
        return multiply(x, x_scale, weight, *rest)

    monkeypatch.setattr(group_variants, "linear_group", multiplied)
    call = group_call(WeightCopies(128, 24, 2, device), Format.parse(form), Format.parse(act), 5)
    first, second = call(0), call(1)
    assert first.shape == (5, 24) and first.dtype == torch.bfloat16 and torch.equal(first, second)
    (x, a), (_, b) = calls
    assert x.dtype == codes and x.shape == (5, 128)
    assert a.packed.data_ptr() != b.packed.data_ptr() and a.words.data_ptr() != b.words.data_ptr()


def test_a_random_weight_has_the_size_of_4_bits():
    weight = random_group_weight(Format.parse("int4/group128/zero"), Format("int4"), 512, 24, torch.device(DEVICE))
    assert weight.packed.nbytes == 24 * 512 // 2 and weight.words.shape == (4, 24)
