"""In-place quantization of calls of every form, and of models that cannot be one graph."""

from __future__ import annotations

import copy
import dataclasses
from collections import namedtuple

import pytest
import torch
from torch import nn

import qcompile
from qcompile import CaptureError, QuantLinear
from qcompile.api.traced_model import TracedModel
from qcompile.ir.call_tree import tensors_of
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.certificate import relative_error

X, Y = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    factor: int = 2


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    loss: object = None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm, self.c = nn.LayerNorm(32), nn.Linear(32, 16)

    def run(self, x, y):
        return self.c(self.norm(self.a(x) + self.b(y)))


def net(forward):
    return type("Own", (Net,), {"forward": forward})().eval().requires_grad_(False)


CALLS = {
    "**kwargs": (lambda s, **batch: s.run(batch["x"], batch["y"]), {"x": X, "y": Y}),
    "*args": (lambda s, *args: s.run(*args), (X, Y)),
    "one dict": (lambda s, features: s.run(features["x"], features["y"]), ({"x": X, "y": Y},)),
    "a dict by itself": (lambda s, features: s.run(features["x"], features["y"]), {"x": X, "y": Y}),
    "a dataclass": (lambda s, b: s.run(b.x, b.y) * b.factor, Batch(X, Y)),
    "a namedtuple": (lambda s, b: s.run(b.x, b.y), Pair(X, Y)),
    "a namedtuple of arguments": (lambda s, x, y: s.run(x, y), Pair(X, Y)),
    "nested": (lambda s, b: s.run(b[0]["x"][0], b[1]), ([{"x": [X]}, Y],)),
    "keyword-only": (lambda s, *, x, y: s.run(x, y), {"x": X, "y": Y}),
    "keywords besides": (lambda s, x, **more: s.run(x, more["y"]), {"x": X, "y": Y, "unused": torch.ones(4)}),
    "no tensors": (lambda s, x, n, flag, none=1: s.run(x, x) * n if flag else x, {"x": X, "n": 3, "flag": True}),
    "one tensor twice": (lambda s, x, y: s.run(x, y), (X, X)),
    "one row": (lambda s, x: s.run(x, x), (X[:1],)),
    "a size of one beside": (lambda s, x, m: s.run(x, x) * m, (X, torch.ones(1, 16))),
    "a dataclass back": (lambda s, x: Result(s.run(x, x)), (X,)),
    "None and lists back": (lambda s, x: (None, [s.run(x, x), None]), (X,)),
}


@pytest.mark.parametrize("recipe,calibrated", [("int8", False), ("int8-smooth", True)])
@pytest.mark.parametrize("name", CALLS)
def test_calls_of_every_form(name, recipe, calibrated):
    forward, batch = CALLS[name]
    model = net(forward)
    is_one = isinstance(batch, Pair) and "arguments" not in name or isinstance(batch, Batch) or "by itself" in name
    args = (batch,) if is_one else tuple(batch) if isinstance(batch, tuple) else ()
    kwargs = batch if not args else {}
    want = tensors_of(model(*args, **kwargs))
    report = qcompile.quantize(
        model, recipe, [batch, copy.copy(batch)] if calibrated else None, example=batch, progress=False
    )
    assert all(s.quantized for s in report.sites) and all(c.holds for c in report.certificates)
    linears = 3 if len([m for m in model.modules() if isinstance(m, QuantLinear)]) == 3 else 0
    got = tensors_of(model(*args, **kwargs))
    assert linears and 0 < relative_error(got, want) < 0.05


class Branches(Net):
    """A branch on a value; the linear behind it is called by the example or not."""

    def forward(self, x):
        h = self.norm(self.a(x))
        if h.mean() > 100:
            h = self.b(h)
        return self.c(h)


def test_a_branch_is_quantized_module_by_module():
    model = Branches().eval().requires_grad_(False)
    want = model(X)
    report = qcompile.quantize(model, "int8-rotated", example=X, progress=False)
    assert {s.name: s.quantized for s in report.sites} == {"a.weight": True, "c.weight": True, "b.weight": False}
    assert "does not call it" in next(s.reason for s in report.sites if s.name == "b.weight")
    dropped = {p.name: p.skipped[0].reason for p in report.passes if p.skipped and p.skipped[0].site == "the model"}
    assert {"FoldNorm", "Rotate"} <= set(dropped) and "if h.mean() > 100" in dropped["Rotate"]
    assert 0 < relative_error([model(X)], [want]) < 0.05


@pytest.mark.parametrize("recipe", ["int8-smooth", "w4a16-gptq"])
def test_what_needs_one_graph_is_refused_with_the_line(recipe):
    model = Branches().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError, match=rf"test_traced_model.py:\d+: if h.mean.*backend='qcompile'.*{recipe}"):
        qcompile.quantize(model, recipe, [X], progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(CaptureError, match="if h.mean"):
        qcompile.quantize(model, "exact", example=X, progress=False)


def test_arithmetic_of_sizes_is_traced_with_the_sizes_of_the_batch():
    class Halves(Net):
        def forward(self, x):
            rows = int(torch.div(torch.tensor(x.shape[0]), 2, rounding_mode="trunc"))
            return self.run(x[:rows], x[rows : 2 * rows])

    model, recipe = Halves().eval(), find_recipe("int8-smooth")
    traced = TracedModel.of(model, recipe, [X, Y], None)
    assert traced.recipe is recipe and not traced.dropped and len(traced.flat) == 2


def test_what_the_example_does_not_reach_is_reported():
    model = net(lambda s, x: s.c(s.norm(s.a(x))))
    report = qcompile.quantize(model, "int8", example=X, progress=False)
    (site,) = report.skipped
    assert site.name == "b.weight" and "the example does not reach it. Fix" in site.reason and site.bytes_after == 4096


def test_a_model_that_does_not_run_is_not_taken_apart():
    with pytest.raises(CaptureError, match="does not run on this example"):
        qcompile.quantize(net(lambda s, x: s.run(x, x)), "int8", example=torch.randn(4, 5), progress=False)
