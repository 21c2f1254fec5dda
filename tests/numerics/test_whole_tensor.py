"""Whether all values of a tensor are finite, or zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.whole_tensor import is_finite, is_zero

VALUES = st.sampled_from([0.0, -0.0, 1e-30, -2.0, float("inf"), float("-inf"), float("nan")])


@given(st.lists(st.lists(VALUES, min_size=3, max_size=3), max_size=4))
def test_they_are_what_torch_says(values):
    x = torch.tensor(values).reshape(-1, 3)
    assert is_finite(x) == bool(torch.isfinite(x).all())
    assert is_zero(x) == (not bool(x.any()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_gradients_and_shared_memory(dtype):
    x = torch.zeros((), dtype=dtype).expand(3, 2)
    assert is_zero(x) and is_finite(x.clone().requires_grad_())
    assert not is_finite(x / 0) and not is_zero(x + 1)
