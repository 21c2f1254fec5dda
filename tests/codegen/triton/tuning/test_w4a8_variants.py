"""What `kernels tune` times of 4-bit weights and int8 activations computes a linear layer, from copies of its own."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE

from qcompile.codegen.triton.tuning import w4a8_variants
from qcompile.codegen.triton.tuning.baselines import WeightCopies
from qcompile.codegen.triton.tuning.w4a8_variants import random_byte_weight, w4a8_call
from qcompile.numerics.format import Format


@pytest.mark.parametrize("form", ["int4/group64/zero/dual", "int4/row/zero"])
def test_a_timed_call_is_a_linear_layer(form, monkeypatch):
    device, weights = torch.device(DEVICE), []
    multiply = w4a8_variants.linear_w4a8

    def multiplied(x, x_scale, weight, *rest):
        weights.append(weight)
        return multiply(x, x_scale, weight, *rest)

    monkeypatch.setattr(w4a8_variants, "linear_w4a8", multiplied)
    call = w4a8_call(WeightCopies(128, 24, 2, device), Format.parse(form), 5)
    first, second = call(0), call(1)
    assert first.shape == (5, 24) and first.dtype == torch.bfloat16 and torch.equal(first, second)
    a, b = weights
    assert a.packed.data_ptr() != b.packed.data_ptr() and a.steps.data_ptr() != b.steps.data_ptr()


def test_a_random_weight_has_the_size_of_4_bits():
    weight = random_byte_weight(Format.parse("int4/group128/zero/dual"), 512, 24, torch.device(DEVICE))
    assert weight.packed.nbytes == 24 * 512 // 2 and weight.steps.shape == (4, 24)
