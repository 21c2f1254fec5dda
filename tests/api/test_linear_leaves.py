"""Linear modules side by side, and what one call tells of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile import CaptureError, QuantLinear
from qcompile.analysis.sites import find_sites
from qcompile.api.linear_leaves import capture_leaves, without_whole_graph
from qcompile.ir.call_tree import CallTree
from qcompile.passes.qdq.site_plan import chooses_experts, writes_output
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.certificate import relative_error


class Experts(nn.Module):
    """Tokens go to the expert that a router chooses; which experts are called depends on the data."""

    def __init__(self, choose="topk"):
        super().__init__()
        torch.manual_seed(0)
        self.choose = choose
        self.up, self.router, self.head = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(32, 16)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4))

    def forward(self, x):
        h = self.up(x) + x
        scores = self.router(h).softmax(-1)
        chosen = scores.topk(1).indices[..., 0] if self.choose == "topk" else scores.argmax(-1)
        out = torch.zeros_like(h)
        for index in chosen.unique().tolist():
            rows = chosen == index
            out[rows] = self.experts[index](h[rows])
        return self.head(h + out).float()


FAILURE = CaptureError("no whole graph, at line 1")
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("choose", ["topk", "argmax"])
def test_routers_and_heads_are_known(choose):
    model = Experts(choose).eval().requires_grad_(False)
    program, skipped = capture_leaves(model, CallTree.of((X,), {}), FAILURE)
    sites = {site.name: site for site in find_sites(program)}
    assert not skipped and len(sites) == 11  # experts that the example does not choose too
    assert [name for name, site in sites.items() if chooses_experts(site)] == ["router.weight"]
    assert [name for name, site in sites.items() if writes_output(site) and name != "router.weight"] == ["head.weight"]


def test_experts_are_quantized_and_the_router_stays():
    model = Experts().eval().requires_grad_(False)
    want = model(X)
    report = qcompile.quantize(model, "int8", example=X, progress=False)
    assert [s.name for s in report.skipped] == ["router.weight"] and "chooses experts" in report.skipped[0].reason
    assert all(isinstance(expert[0], QuantLinear) for expert in model.experts)
    assert 0 < relative_error([model(X)], [want]) < 0.05


class Reads(nn.Module):
    """Multiplies by a child's weight itself, so the child is not called."""

    def __init__(self):
        super().__init__()
        self.inner, self.table = nn.Linear(32, 32), nn.Embedding(8, 32)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.inner.weight) * (1 if x.sum() > 0 else 2) + self.table.weight[0]


def test_a_child_that_is_not_called_by_its_parent_stays():
    program, skipped = capture_leaves(nn.Sequential(Reads(), nn.Linear(32, 8)), CallTree.of((X,), {}), FAILURE)
    assert [site.name for site in find_sites(program)] == ["1.weight"]
    assert [site.name for site in skipped] == ["0.inner.weight"]


def test_passes_of_single_sites_remain():
    failure = CaptureError("a line")
    recipe, dropped = without_whole_graph(find_recipe("w4a4-rotated"), failure)
    names = {type(c).__name__ for c in recipe.passes}
    assert {"Quantize", "Fuse"} <= names and not names & {p.name for p in dropped}
    assert all("a line" in p.skipped[0].reason for p in dropped)
    with pytest.raises(CaptureError, match="a line Or use a recipe without calibration: 'int8-smooth' .*SmoothQuant"):
        without_whole_graph(find_recipe("int8-smooth"), failure)
    with pytest.raises(CaptureError, match="a line"):
        without_whole_graph(find_recipe("exact"), failure)


def test_a_model_without_linear_modules_is_refused_for_its_control_flow():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="cannot be traced to one graph.*x.sum"):
        qcompile.quantize(Branches(), "int8", example=torch.ones(1, 4, 4), progress=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_linears_around_a_scripted_module_are_quantized():
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.ReLU()))
    model = nn.Sequential(nn.Linear(32, 32), scripted, nn.Linear(32, 8)).eval()
    x = torch.randn(4, 32)
    want = model(x).detach()
    report = qcompile.quantize(model, "int8", [x], progress=False)
    assert [site.name for site in report.sites if site.quantized] == ["0.weight", "2.weight"]
    assert isinstance(model[0], QuantLinear) and 0 < relative_error([model(x).detach()], [want]) < 0.05
