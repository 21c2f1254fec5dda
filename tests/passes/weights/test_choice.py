"""Stacks of weights that read one input, and the damage that rounding does to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.memory.stored_tensor import StoredTensor
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.weights.choice import damage, stacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_all_rows_in_float32(dtype):
    weights = [torch.randn(n, 8).to(dtype) for n in (3, 1, 5)]
    want = torch.cat(weights).float()
    reads = []
    lazy = [StoredTensor(w, lambda i=i, w=w: (reads.append(i), w.clone())[1]) for i, w in enumerate(weights)]
    for given_weights in (weights, lazy, [lazy[0], *weights[1:]]):
        found = stacked(given_weights)
        assert type(found) is torch.Tensor and found.dtype == torch.float32 and torch.equal(found, want)
    assert reads == [0, 1, 2, 0], "each is read once"
    found.zero_()
    assert torch.equal(torch.cat(weights).float(), want), "the weights are copied"


@given(
    st.integers(1, 400),
    st.sampled_from(["int4/group32/zero", "int8", "int3/row", "fp8", "int8/tensor", "int4/group32/zero/dual"]),
    st.integers(0, 99),
)
def test_damage_is_that_of_rows_at_even_distances(rows, form, seed):
    generator, form = torch.Generator().manual_seed(seed), Format.parse(form)
    weight = torch.randn(rows, 64, generator=generator)
    x = torch.randn(90, 64, generator=generator, dtype=torch.float64)
    codes = quantize_tensor(weight * 1.01, form)
    chosen = range(0, rows, -(-rows // 128))
    assert len(chosen) <= 128
    sample = weight[list(chosen)].double()

    def share(dequantized):
        return float(((sample - dequantized.double()) @ x.t()).square().sum() / (sample @ x.t()).square().sum())

    nearest, found = damage(weight, x.t() @ x, codes)
    assert found == pytest.approx(share(codes.dequantize()[list(chosen)]), rel=1e-2, abs=1e-8)
    assert nearest == pytest.approx(share(quantize_tensor(sample.float(), form).dequantize()), rel=1e-2, abs=1e-8)


def test_exact_codes_do_no_damage_and_zeros_count_for_none():
    weight = torch.randint(-8, 8, (5, 32)).float()
    exact = QTensor(weight.to(torch.int8), torch.ones(5, 1), None, None, Format.parse("int8"))
    assert damage(weight, torch.eye(32, dtype=torch.float64), exact)[1] == 0
    nothing = torch.zeros(32, 32, dtype=torch.float64)
    assert damage(weight, nothing, exact) == (0, 0)
