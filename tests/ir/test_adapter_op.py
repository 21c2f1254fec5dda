"""The group-pooled adapter as an operator: its value, its gradients, and what refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.ir.adapter_op import pool_groups

op = torch.ops.qcompile.group_adapter


@given(st.integers(1, 100), st.integers(1, 40))
def test_pooling_is_a_sum_over_the_full_group(k, group):
    x = torch.randn(2, k, dtype=torch.float64)
    pooled = pool_groups(x, group)
    want = torch.stack([x[:, i : i + group].sum(1) / group for i in range(0, k, group)], 1)
    assert torch.allclose(pooled, want)


@given(st.integers(1, 5), st.sampled_from([(64, 32), (80, 32), (7, 32)]))
def test_the_adapter_is_a_weight_constant_in_each_group(rank, shape):
    k, group = shape
    x = torch.randn(3, k, dtype=torch.float64)
    a = torch.randn(rank, -(-k // group), dtype=torch.float64)
    b = torch.randn(6, rank, dtype=torch.float64)
    weight = (0.5 / group * b @ a).repeat_interleave(group, 1)[:, :k]
    assert torch.allclose(op(x, a, b, group, 0.5), x @ weight.t())


def test_gradients():
    x, a, b = torch.randn(3, 20), torch.randn(2, 3), torch.randn(4, 2)
    inputs = [t.double().requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(lambda *t: op(*t, 8, 0.7), inputs)


def test_it_is_computed_in_the_dtype_of_the_adapter():
    x, a, b = torch.randn(3, 64).bfloat16(), torch.randn(4, 2), torch.randn(8, 4)
    out = op(x, a, b, 32, 1.0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, op(x.float(), a, b, 32, 1.0).bfloat16())


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"a is \[4, 3\].*must be \[r, 2\] and \[N, r\] for x \[3, 64\]"):
        op(torch.randn(3, 64), torch.randn(4, 3), torch.randn(8, 4), 32, 1.0)


@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([(64, 32), (80, 32), (7, 32)]))
def test_a_stack_gets_what_the_adapters_of_its_experts_add(experts, rank, shape):
    k, group = shape
    a = torch.randn(experts, rank, -(-k // group), dtype=torch.float64)
    b = torch.randn(experts, 6, rank, dtype=torch.float64)
    added = torch.ops.qcompile.stack_adapter(a, b, k, group, 0.5, torch.float64)
    assert added.shape == (experts, 6, k)
    for index in range(experts):
        x = torch.randn(3, k, dtype=torch.float64)
        assert torch.allclose(x @ added[index].t(), op(x, a[index], b[index], group, 0.5))


def test_gradients_of_a_stack():
    a, b = torch.randn(2, 2, 3).double().requires_grad_(), torch.randn(2, 4, 2).double().requires_grad_()
    stack = lambda a, b: torch.ops.qcompile.stack_adapter(a, b, 20, 8, 0.7, torch.float64)  # noqa: E731
    assert torch.autograd.gradcheck(stack, (a, b))


@pytest.mark.parametrize(
    "a,b", [((2, 3), (4, 2)), ((1, 2, 2), (1, 4, 2)), ((1, 2, 3), (2, 4, 2)), ((1, 2, 3), (1, 4, 3))]
)
def test_shapes_of_a_stack_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ValueError, match=r"stack_adapter: a is .* must be \[E, r, 3\] and \[E, N, r\] for 20 columns"):
        torch.ops.qcompile.stack_adapter(torch.zeros(a), torch.zeros(b), 20, 8, 1.0, torch.float32)
