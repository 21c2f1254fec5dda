"""Operators as thin as the dispatcher allows: each version runs where it belongs, with the schema of its function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.triton.define_op import TritonOp


@TritonOp
def scaled_for_test(x: Tensor, gain: Tensor | None, factor: float, name: str) -> Tensor:
    """On CUDA."""
    raise AssertionError("no GPU here")


@scaled_for_test.on_cpu
def _(x: Tensor, gain: Tensor | None, factor: float, name: str) -> Tensor:
    return x * factor if gain is None else x * factor * gain


@scaled_for_test.on_fake
def _(x: Tensor, gain: Tensor | None, factor: float, name: str) -> Tensor:
    return torch.empty_like(x)


OP = torch.ops.qcompile_triton.scaled_for_test


def test_versions_and_schema():
    x = torch.ones(3)
    assert torch.equal(OP(x, None, 2.0, "a"), 2 * x) and torch.equal(OP(x, x + 1, 2.0, "a"), 4 * x)
    assert str(OP.default._schema).endswith("(Tensor x, Tensor? gain, float factor, str name) -> Tensor")
    with FakeTensorMode() as mode:
        assert OP(mode.from_tensor(x), None, 2.0, "a").shape == (3,)
    with pytest.raises(AssertionError, match="no GPU"):
        scaled_for_test.on_cuda(x, None, 1.0, "a")


def test_it_is_well_formed():
    torch.library.opcheck(OP, (torch.ones(3), None, 2.0, "a"))
