"""Norms with the sum in front of them, and those that keep the standard operator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.codegen.onnx.fusions.skip_norm import fuse_norms
from qcompile.codegen.onnx.ops.norm_ops import RMSNormCall, SkipLayerNormCall, SkipRMSNormCall
from qcompile.ir.capture import capture
from qcompile.recipe.report import PassReport


class Block(nn.Module):
    """A norm of a value, and one of its sum with a linear of it."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.linear, self.second = norm(), nn.Linear(16, 16), norm()

    def forward(self, x):
        y = x + self.linear(self.first(x))
        return self.second(y) + y


NORMS = {
    "rms": lambda: nn.RMSNorm(16, eps=1e-3),
    "rms with the default epsilon": lambda: nn.RMSNorm(16),
    "rms without a gain": lambda: nn.RMSNorm(16, eps=1e-3, elementwise_affine=False),
    "layer": lambda: nn.LayerNorm(16, eps=1e-3),
    "layer without a gain": lambda: nn.LayerNorm(16, elementwise_affine=False),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_fused_with_the_sum_before_them(kind):
    torch.manual_seed(0)
    model, x = Block(NORMS[kind]).eval().requires_grad_(False), torch.randn(2, 5, 16) / 100  # epsilons matter
    for parameter in model.parameters():
        parameter.data.normal_()
    program, report = capture(model, (x,), {}), PassReport("norms")
    want = program(x)[0]
    fuse_norms(program, report)
    counts = [len(list(call.find(program))) for call in (RMSNormCall, SkipRMSNormCall, SkipLayerNormCall)]
    assert counts == ([1, 1, 0] if "rms" in kind else [0, 0, 1])
    assert report.notes == [
        "2 RMSNorms, 0 LayerNorms of a sum" if "rms" in kind else "0 RMSNorms, 1 LayerNorms of a sum"
    ]
    assert torch.allclose(program(x)[0], want, atol=1e-5)
    for _, call in SkipLayerNormCall.find(program):
        assert call.bias is not None, "the linear's bias is the operator's"


def test_a_norm_of_a_sum_of_four_dimensions_is_skipped(tmp_path):
    """As in vision models that keep height and width: the operator takes [B, T, C] only."""

    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x):
            y = x + self.a(x)
            return y + self.b(self.norm(y))

    torch.manual_seed(0)
    report = qcompile.export_onnx(Image(), tmp_path / "m", example=torch.randn(2, 4, 4, 16), progress=False)
    assert report.metrics["onnx relative error"] < 1e-5
