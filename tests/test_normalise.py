"""One spelling for one meaning, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.ir.capture import capture

aten = torch.ops.aten


class Scores(nn.Module):
    """Scores with a bias, in one operator."""

    def __init__(self, beta, alpha):
        super().__init__()
        self.factors = dict(beta=beta, alpha=alpha)

    def forward(self, bias, a, b):
        return torch.baddbmm(bias, a, b, **self.factors)


@pytest.mark.parametrize("beta,alpha", [(1, 1), (0.5, 1), (1, -3.0), (2.0, 0.25), (0, 2.0)])
def test_a_product_and_a_sum_in_one_operator(beta, alpha):
    model = Scores(beta, alpha)
    inputs = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    program = capture(model, inputs)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert aten.bmm.default in targets and aten.baddbmm.default not in targets
    assert torch.allclose(program(*inputs)[0], model(*inputs), atol=1e-6)
    if beta == 0:  # whatever the bias holds
        assert torch.allclose(program(torch.full((2, 3, 5), torch.nan), *inputs[1:])[0], model(*inputs), atol=1e-6)


@pytest.mark.parametrize("between", ["dropout", "detach", "to"])
def test_a_view_behind_a_dropped_copy_and_another_no_op(between):
    """`contiguous` goes, and what stands between it and the view: the view must copy then."""

    class Turned(torch.nn.Module):
        def forward(self, x):
            y = x.view(2, 4, 2, 8).transpose(1, 2).contiguous()
            y = {"dropout": lambda: torch.dropout(y, 0.1, False), "detach": y.detach, "to": lambda: y.to(x.dtype)}[
                between
            ]()
            return y.view(2, 4, 16)

    x = torch.randn(2, 4, 16)
    program = capture(Turned(), (x,))
    assert torch.equal(program(x)[0], Turned()(x))
