"""A vmap in a captured graph: the same values, nothing batched left, compiled and quantized in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qcompile
from qcompile.ir.capture import capture


class Mapped(nn.Module):
    """Linears inside and outside of vmaps: of a module, nested, over another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        y = torch.vmap(self.first)(x)
        y = torch.vmap(torch.vmap(lambda a, b: torch.tanh(a) * b + 1, in_dims=(0, None)))(y, x[:, 0])
        y = torch.vmap(lambda a: torch.tanh(a), in_dims=1, out_dims=1)(y)
        return self.last(y)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mapped().eval()


@pytest.mark.parametrize("rows", [5, 9])
def test_a_captured_vmap_is_operators_of_the_batch(model, rows):
    program = capture(model, (torch.randn(5, 64),))
    assert not any("batch_dim" in str(node.target) or "vmap" in str(node.target) for node in program.graph.nodes)
    assert not any(torch._C._functorch.is_batchedtensor(node.meta["val"]) for node in program.inputs)
    x = torch.randn(rows, 64)
    assert torch.allclose(program(x)[0], model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_vmap_is_compiled(model, dynamic):
    torch._dynamo.reset()
    options = {"on_slow_kernel": "quantize", "verify": False}
    compiled, x = torch.compile(model, backend="qcompile", dynamic=dynamic, options=options), torch.randn(5, 64)
    with torch.no_grad():
        assert (compiled(x) - model(x)).norm() < 0.02 * model(x).norm()
    assert [site.name for site in qcompile.backend.reports[-1].sites] == ["first.weight", "last.weight"]


def test_a_module_that_a_vmap_calls_stays_float_in_place(model):
    """An operator of ours has no batching rule."""
    quantized, x = copy.deepcopy(model), torch.randn(5, 64)
    report = qcompile.quantize(quantized, "int8", [x], progress=False)
    assert {site.name: bool(site.reason) for site in report.sites} == {"first.weight": True, "last.weight": False}
    with torch.no_grad():
        assert 0 < (quantized(x) - model(x)).norm() < 0.02 * model(x).norm()


class Constant(Mapped):
    """What torch.export (2.13) does not trace: a constant within a vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.arange(64.0) / 64

    def forward(self, x):
        return super().forward(torch.vmap(lambda a: a + self.offset.sum())(x))


def test_linears_around_a_vmap_that_cannot_be_traced():
    torch.manual_seed(0)
    model, x = Constant().eval(), torch.randn(5, 64)
    quantized = copy.deepcopy(model)
    report = qcompile.quantize(quantized, "int8", [x], progress=False)
    assert "last.weight" in [site.name for site in report.sites if site.quantized]
    with torch.no_grad():
        assert 0 < (quantized(x) - model(x)).norm() < 0.02 * model(x).norm()
