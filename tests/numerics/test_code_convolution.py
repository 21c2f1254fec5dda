"""Convolutions of codes, forward and backward, are exact in both forms: float64 and autograd are the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics import code_convolution as subject
from qcompile.numerics.code_convolution import ConvolutionShape, forward_sums, input_sums, weight_sums


@st.composite
def cases(draw):
    rank = draw(st.sampled_from([1, 2]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape = ConvolutionShape(
        tuple(draw(st.integers(1, 2)) for _ in range(rank)), tuple(draw(st.integers(0, 2)) for _ in range(rank)),
        tuple(draw(st.integers(1, 2)) for _ in range(rank)), groups,
    )  # fmt: skip
    size = [draw(st.integers(5, 8)) for _ in range(rank)]
    x = codes(draw, 3, 4 * draw(st.sampled_from([1, 2])), *size)
    weight = codes(draw, 4, x.shape[1] // groups, *kernel)
    return x, weight, shape


def codes(draw, *shape):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def expected(x, weight, shape, gradient=None):
    """The output in float64, and the gradients that autograd gives it."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    function = torch.nn.functional.conv1d if x.ndim == 3 else torch.nn.functional.conv2d
    out = function(x, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)
    if gradient is None:
        return out.detach()
    return torch.autograd.grad(out, (x, weight), gradient.double())


@pytest.mark.parametrize("wide", [False, True])
@given(case=cases())
def test_three_products_are_exact(wide, case):
    x, weight, shape = case
    bound = 127 * 127
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "WIDE", 1 if wide else 10**6)
        patch.setattr(subject, "has_fast_int8_matmul", lambda: True)
        out = forward_sums(x, weight, shape, bound)
        assert torch.equal(out.double(), expected(x, weight, shape))
        gradient = torch.randint(-127, 128, out.shape, dtype=torch.int8)
        dx, dw = expected(x, weight, shape, gradient)
        assert torch.equal(input_sums(gradient, weight, shape, x.shape, bound).double(), dx)
        assert torch.equal(weight_sums(gradient, x, shape, weight.shape, bound).double(), dw)


def test_large_sums_are_exact():
    """More than float32 holds, in one sample and over the batch: codes of 127 everywhere."""
    shape = ConvolutionShape((1,), (0,), (1,), 1)
    x, weight = torch.full((3, 2, 1200), 127, dtype=torch.int8), torch.full((2, 2, 3), 127, dtype=torch.int8)
    x[0, 0, 0] = 126  # an odd sum
    gradient = torch.full((3, 2, 1198), 127, dtype=torch.int8)
    dx, dw = expected(x, weight, shape, gradient)
    assert float(dw.max()) > 2**24
    assert torch.equal(weight_sums(gradient, x, shape, weight.shape, 127 * 127).double(), dw)
    assert torch.equal(input_sums(gradient, weight, shape, x.shape, 127 * 127).double(), dx)
