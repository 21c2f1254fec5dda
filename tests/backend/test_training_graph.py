"""The backend's own form of fixed-point training: the run of `qcompile.train` with a quantile, without its state."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import qcompile
from qcompile import Recipe, RecipeError
from qcompile.backend import dynamo, training_speed
from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.passes import FixedPoint
from qcompile.pipeline.training_presets import TRAINING_PRESETS

(PRESET,) = TRAINING_PRESETS["int4-train"].passes
QUANTILE = Recipe("quantile", (dataclasses.replace(PRESET, interval="quantile"),))
X, TARGET = torch.randn(16, 1, 8, 8), torch.arange(16) % 4


class Net(nn.Module):
    """Convolutions, a linear, and a value whose gradient is stopped."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=2)
        self.norm, self.hidden, self.last = nn.BatchNorm2d(8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(self.conv(x)).mean((2, 3))
        x = functional.relu(self.hidden(x) - x.mean().detach())
        return self.last(x)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def train(model, parameters, x, steps=3):
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), TARGET)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def compiled(model, recipe="int4-train", **options):
    options.setdefault("on_slow_kernel", "quantize")  # these models are small: all their sites are slower than float
    return torch.compile(model, backend="qcompile", options={"recipe": recipe, **options})


def test_it_is_the_run_of_a_model_that_was_prepared():
    """In float64: in float32 the last bit of an activation, which Inductor adds up otherwise, picks another code."""
    model, x = Net().double(), X.double()
    prepared = copy.deepcopy(model)
    qcompile.train(prepared, QUANTILE, example=x, progress=False)
    run = compiled(model)
    train(run, model.parameters(), x)
    train(prepared, prepared.parameters(), x)
    expected = dict(prepared.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-10, atol=1e-10), name
    report = dynamo.reports[-1]
    assert {site.name for site in report.sites if site.weight == "int4/tensor"} == {"conv.weight", "hidden.weight"}
    assert not any(name.endswith("gamma") for name in model.state_dict()), "no state in the model"


def test_it_is_not_the_float_model_and_evaluation_rounds_too():
    model = Net().eval()
    want = model(X)
    with torch.no_grad():
        got = compiled(model)(X)
    assert not torch.allclose(got, want, atol=1e-4)
    assert (got - want).abs().max() < 0.5 * want.abs().max()


def test_a_stopped_gradient_stays_stopped():
    class Stopped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.c(self.b(x) + self.a(x).detach())

    model = Stopped()
    everywhere = Recipe("all", (FixedPoint(keep_first=False, keep_last=False),))
    compiled(model, everywhere)(torch.randn(8, 16)).sum().backward()
    assert model.a.weight.grad is None and model.b.weight.grad.abs().max() > 0


def test_rules_keep_sites():
    model = Net()
    compiled(model, rules=[qcompile.Rule("conv.*", keep=True)])(X).sum().backward()
    reasons = {site.name: site.reason for site in dynamo.reports[-1].sites}
    assert "kept float by the rule" in reasons["conv.weight"] and reasons["hidden.weight"] == ""


def test_a_graph_without_a_site_runs_as_it_is():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    assert torch.equal(compiled(model)(x), model(x))
    assert dynamo.reports[-1].metrics["sites that train"] == 0 and "compiled as it is" in dynamo.reports[-1].breaks[-1]


@pytest.mark.parametrize("recipe", ["q-galore", Recipe("learned", (FixedPoint(ranges="learned"),)),
                                    Recipe("adapters", (qcompile.passes.QALoRA(),))])  # fmt: skip
def test_what_adds_parameters_is_refused(recipe):
    with pytest.raises(Exception, match="(adds parameters|needs calibration data)"):
        compiled(Net(), recipe)(X)


def test_pieces_without_parameters_are_refused(tmp_path):
    """What DistributedDataParallel hands over: the weights of its pieces are fake."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layers = nn.Sequential(*(nn.Linear(600, 600) for _ in range(4)))  # 1.4 MB each
        model = nn.parallel.DistributedDataParallel(Wrapped(layers), bucket_cap_mb=1)
        with pytest.raises(Exception, match="qcompile.train.*before it is wrapped"):
            compiled(model)(torch.randn(2, 600)).sum().backward()
    finally:
        dist.destroy_process_group()


def test_a_recipe_that_trains_needs_no_warning(recwarn):
    compiled(Net())(X).sum().backward()
    assert not [w for w in recwarn if "gradients are enabled" in str(w.message)]
    with pytest.raises(RecipeError, match="trains. Fix: qcompile.train"):
        qcompile.quantize(Net(), "int4-train", example=X)


def by_channels(shape, dtype):
    """Everything with fewer than 16 outputs is slower than float."""
    ratio = 0.5 if shape.outputs < 16 else 2.0
    return KernelChoice(shape.kernel, ratio, f"{ratio}x float")


def told(report):
    return {site.name: (site.weight, site.reason, site.kernel) for site in report.sites}


def test_a_slower_site_stays_float_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(training_speed, "choose_training_kernel", by_channels)
    compiled(Net(), on_slow_kernel="keep_float")(X).sum().backward()
    sites = told(dynamo.reports[-1])
    weight, reason, _ = sites["conv.weight"]
    assert weight == "float" and reason.startswith("fixed_point_conv_grouped (0.5x float) at 256 positions: slower")
    assert "options={'on_slow_kernel': 'quantize'} trains it" in reason
    assert "first product" in sites["first.weight"][1], "a reason that no option lifts comes first"
    assert sites["hidden.weight"][0] == "int4/tensor" and sites["hidden.weight"][2] == {
        "rows 16": "fixed_point_linear (2.0x float)"
    }


def test_by_default_a_small_model_stays_float():
    model = Net()
    torch.compile(model, backend="qcompile", options={"recipe": "int4-train"})(X).sum().backward()
    report = dynamo.reports[-1]
    assert report.metrics["sites that train"] == 0 and "slower than float" in report.breaks[-1]


def test_later_graphs_follow_the_first_that_trained(monkeypatch):
    monkeypatch.setattr(training_speed, "choose_training_kernel", by_channels)
    model = Net()
    run = compiled(model, on_slow_kernel="keep_float")
    run(X).sum().backward()
    monkeypatch.setattr(training_speed, "choose_training_kernel", lambda shape, dtype: KernelChoice("other", 0.1))
    run(X[:4]).sum().backward()
    with torch.no_grad():
        run(X)
    for report in list(dynamo.reports)[-2:]:
        sites = told(report)
        assert "0.5x float" in sites["conv.weight"][1] and sites["hidden.weight"][0] == "int4/tensor"


def test_evaluation_alone_decides_nothing(monkeypatch):
    monkeypatch.setattr(training_speed, "choose_training_kernel", lambda shape, dtype: KernelChoice("other", 0.1))
    model = Net()
    run = compiled(model, on_slow_kernel="keep_float")
    with torch.no_grad():
        run(X)
    monkeypatch.setattr(training_speed, "choose_training_kernel", by_channels)
    run(X).sum().backward()
    assert told(dynamo.reports[-1])["hidden.weight"][0] == "int4/tensor"
