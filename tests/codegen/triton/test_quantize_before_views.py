"""A quantization moves before views of whole rows, with the same bits, and before nothing else."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.triton.quantize_before_views import quantize_before_views
from qcompile.ir.capture import capture
from qcompile.ir.op_calls import QuantizeCall

ops = torch.ops.qcompile


class Viewed(torch.nn.Module):
    def __init__(self, view, form):
        super().__init__()
        self.view, self.form = view, form

    def forward(self, x):
        codes, scale, zero = ops.quantize(self.view(x * 2), self.form)
        return ops.dequantize(codes, scale, zero if "zero" in self.form else None, None, self.form, 0, x.dtype)


MERGED = lambda x: x.view(-1, x.shape[-1])  # noqa: E731


@pytest.mark.parametrize(
    "view,form,moves",
    [
        (MERGED, "int8/row", True),
        (MERGED, "fp8/row", True),
        (MERGED, "int4/group16/zero", True),
        (lambda x: x.view(2, -1, 32).reshape(3, 2, 32), "int8/row", True),
        (lambda x: x.reshape(6, -1), "int8/row/zero", True),
        (MERGED, "int8/tensor", False),
        (MERGED, "int8/group16/smooth", False),
        (lambda x: x.view(2, 96), "int8/row", False),
        (lambda x: x.transpose(0, 1), "int8/row", False),
        (lambda x: x, "int8/row", False),
    ],
)
def test_what_moves(view, form, moves):
    x = torch.randn(2, 3, 32)
    program = capture(Viewed(view, form), (x,))
    found = program.copy()
    quantize_before_views(found)
    found.cleanup()
    ((_, call),) = QuantizeCall.find(found)
    doubled = call.x.target is torch.ops.aten.mul.Tensor
    assert doubled == (moves or view(x) is x)
    assert torch.equal(found(x)[0], program(x)[0])


def test_a_view_of_any_number_of_rows():
    program = capture(Viewed(MERGED, "int8/row"), (torch.randn(2, 3, 32),))
    found = program.copy()
    quantize_before_views(found)
    found.cleanup()
    for rows in (2, 5):
        x = torch.randn(rows, 3, 32)
        assert torch.equal(found(x)[0], program(x)[0])
