"""FixedPoint: which products train, in what format, and what is skipped, with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import qcompile
from qcompile.ir.capture import capture
from qcompile.modules.fixed_point_modules import FixedPointConv, FixedPointLinear
from qcompile.passes import FixedPoint
from qcompile.passes.training.fixed_point import fixed_point
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import Report

ALL = FixedPoint(keep_first=False, keep_last=False)


class Net(nn.Module):
    """Convolutions of several kinds, linears with and without a ReLU before them."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False)
        self.norm, self.mixed = nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.inner, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.deep(F.relu(self.stem(x)))).mean((2, 3))
        return self.head(torch.tanh(self.inner(F.relu(self.mixed(x)))))


def trained(model, config=None, rules=(), example=None, batches=None):
    """The report of `train`."""
    recipe = qcompile.Recipe("test", (config or FixedPoint(),), rules)
    example = torch.randn(4, 1, 9, 9) if example is None and batches is None else example
    return qcompile.train(model, recipe, batches, example=example, progress=False)


def reasons(report):
    return {item.site: item.reason for item in report.passes[0].skipped}


def test_what_trains_and_in_what_format():
    model = Net()
    before = {name: parameter for name, parameter in model.named_parameters()}
    report = trained(model, FixedPoint(weight_bits=3, act_bits=5, alpha=0.02, seed=7))
    assert report.passes[0].done == ["deep.weight", "mixed.weight", "inner.weight"]
    assert reasons(report) == {
        "stem.weight": "it is the first product (keep_first)",
        "head.weight": "it is the last product (keep_last)",
    }
    assert isinstance(model.deep, FixedPointConv) and isinstance(model.inner, FixedPointLinear)
    assert type(model.stem) is nn.Conv2d and type(model.head) is nn.Linear
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    signs = [module.format.signed for module in (model.deep, model.mixed, model.inner)]
    assert signs == [False, True, False]  # behind a ReLU, a mean of values with a sign, a ReLU
    form = model.mixed.format
    assert (form.weight_bits, form.act_bits, form.gradient_bits, form.alpha) == (3, 5, 4, 0.02)
    streams = [module.format.stream for module in (model.deep, model.mixed, model.inner)]
    assert streams == [7 * 1_000_003 + index for index in range(3)]
    told = {site.name: (site.weight, site.act, site.reason) for site in report.sites}
    assert told["deep.weight"] == ("int3/tensor", "int5/tensor", "")
    assert told["stem.weight"][2] and "3 of 5 sites quantized" in str(report)


def test_the_ends_train_too_on_request():
    report = trained(Net(), ALL)
    assert len(report.passes[0].done) == 5 and not report.passes[0].skipped


def test_products_one_after_another():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(8, 8), nn.Linear(8, 3))
    report = trained(model, ALL, example=torch.randn(4, 2, 12))
    assert [type(part) for part in model] == [FixedPointConv, FixedPointConv, FixedPointLinear, FixedPointLinear]
    assert report.passes[0].done == [f"{index}.weight" for index in range(4)]


def test_rules():
    report = trained(Net(), rules=(qcompile.Rule("deep.*", keep=True),))
    assert reasons(report)["deep.weight"] == "kept float by the rule 'deep.*'"
    with pytest.raises(qcompile.RecipeError, match="rule 'inner.weight' gives formats.*Fix"):
        trained(Net(), rules=(qcompile.Rule("inner.weight", weight="int8/row"),))
    with pytest.raises(qcompile.RecipeError, match="matches no site.*deep.weight"):
        trained(Net(), rules=(qcompile.Rule("deeper.*", keep=True),))


def test_frozen_weights():
    model = Net()
    model.deep.requires_grad_(False)
    model.inner.requires_grad_(False)
    found = reasons(trained(model))
    assert "requires_grad" in found["deep.weight"] and "requires_grad" in found["inner.weight"]


class Tied(nn.Module):
    """A table that is a linear's weight too, and a linear that is called twice."""

    def __init__(self):
        super().__init__()
        self.table, self.twice, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight
        self.last = nn.Linear(9, 2)

    def forward(self, ids):
        return self.last(self.head(self.twice(torch.relu(self.twice(self.table(ids))))))


def test_tied_weights_are_skipped_and_a_module_called_twice_is_one():
    model = Tied()
    report = trained(model, example=torch.randint(0, 9, (2, 5)))
    assert report.passes[0].done == ["twice.weight"]
    assert "its weight is tied: embedding" in reasons(report)["table.weight"]
    assert model.twice.format.signed  # one of its two inputs has a sign


class Odd(nn.Module):
    """Products that no module computes alone, or not from a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.normed = nn.Conv1d(2, 4, 3), weight_norm(nn.Conv1d(4, 4, 3))
        self.reflected, self.reversed_ = (
            nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"),
            nn.ConvTranspose1d(4, 4, 3),
        )
        self.free = nn.Parameter(torch.randn(5, 4))
        self.plain, self.head = nn.Conv1d(4, 5, 1), nn.Linear(5, 3)

    def forward(self, x):
        x = self.plain(self.reversed_(self.reflected(self.normed(self.first(x)))))
        return self.head(F.linear(F.linear(x.mean(-1), self.free.t().contiguous()), self.free))


def test_what_no_module_computes_alone():
    model = Odd()
    report = trained(model, example=torch.randn(3, 2, 16))
    assert report.passes[0].done == ["plain.weight"]
    found = reasons(report)
    assert "computes aten.pad too" in found["reflected.weight"]
    assert "no module computes just this product" in found["free"]
    assert "computed, or it is no convolution" in found["reversed_.weight"]
    assert any("computed, or it is no convolution" in r for n, r in found.items() if n.startswith("normed"))


def test_nothing_to_train_names_all_reasons_and_the_model_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(qcompile.RecipeError, match="trains no weight.*first product.*last product.*keep_first=False"):
        trained(model, example=torch.randn(2, 4))
    assert [type(part) for part in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_batches_start_the_ranges():
    torch.manual_seed(0)
    batches = [torch.randn(8, 1, 9, 9) for _ in range(2)]
    model, other = Net(), Net()
    trained(model, batches=batches)
    assert float(model.inner.act_range) > 0
    trained(other, example=batches[0])
    assert float(other.inner.act_range) == 0
    kept = []
    model.inner.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    float_model = Net()
    float_model.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name in float_model.state_dict()}
    )
    float_model.inner.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            float_model.eval()(batch)
    expected = torch.stack([3 * x.std(correction=0) / (1 - 2 / torch.pi) ** 0.5 for x in kept]).mean()
    assert float(model.inner.act_range) == pytest.approx(float(expected), rel=1e-4)


def test_learned_ranges_need_batches_and_are_parameters():
    config = dataclasses.replace(FixedPoint(), ranges="learned")
    with pytest.raises(qcompile.RecipeError, match="needs calibration data for FixedPoint"):
        trained(Net(), config)
    model = Net()
    trained(model, config, batches=[torch.randn(8, 1, 9, 9)])
    names = [name for name, _ in model.named_parameters() if name.endswith("_clip")]
    assert len(names) == 6
    sigma = float(model.inner.weight.detach().std(correction=0))
    assert float(model.inner.weight_clip.detach()) == pytest.approx(3 * sigma)
    assert float(model.inner.act_clip.detach()) == float(model.inner.act_range) > 0


def test_batches_that_are_not_finite():
    with pytest.raises(qcompile.RecipeError, match="inputs of deep.weight.*not finite"):
        trained(Net(), batches=[torch.full((4, 1, 9, 9), torch.inf)])


def test_weights_that_are_not_finite():
    model = Net()
    with torch.no_grad():
        model.deep.weight[0, 0] = torch.nan
    with pytest.raises(qcompile.RecipeError, match="NaN or Inf in the weights deep.weight"):
        trained(model)
    assert type(model.mixed) is nn.Linear


@pytest.mark.parametrize("field,value", [("alpha", 0.7), ("gradient_bits", 1), ("ranges", "minmax"), ("seed", 0.5)])
def test_wrong_configs(field, value):
    with pytest.raises(qcompile.RecipeError, match="FixedPoint: .*Fix") as error:
        FixedPoint(**{field: value})
    assert repr(value) in str(error.value) or field == "seed"


def test_recipe_travels_as_json():
    recipe = qcompile.find_recipe("int4-train")
    assert recipe.trains and qcompile.Recipe.from_json(recipe.to_json()).passes == recipe.passes
    with pytest.raises(qcompile.RecipeError, match="qcompile.train"):
        qcompile.quantize(Net(), recipe, example=torch.randn(4, 1, 9, 9), progress=False)


class Branch(nn.Module):
    """Behind a ReLU in evaluation, and behind noise in training."""

    def __init__(self):
        super().__init__()
        self.first, self.deep, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.last(self.deep(x + 0.1 * torch.randn_like(x) if self.training else x))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_what_only_training_makes_negative_is_refused_by_name(backend):
    model, x = Branch(), torch.randn(16, 8)
    trained(model, example=x)
    assert not model.deep.format.signed
    run = model if backend is None else torch.compile(model, backend=backend)
    with pytest.raises(ValueError, match=r"deep.weight reads -.* in training;.*Fix: FixedPoint\(drop_signs=False\)"):
        run(x)
    model.eval()
    model(x)


def test_signs_may_be_kept():
    model, x = Branch(), torch.randn(16, 8)
    report = trained(model, FixedPoint(drop_signs=False), batches=[x])
    assert model.deep.format.signed and "0 of 1 sites read values that are never negative" in report.passes[0].notes[0]
    values = F.relu(model.first(x)).detach()
    assert float(model.deep.act_range) == pytest.approx(3 * float(values.std(correction=0)), rel=1e-4)
    model(x).sum().backward()


def test_a_caller_keeps_sites_float_only_for_want_of_another_reason():
    program = capture(Net().eval(), (torch.randn(4, 1, 9, 9),))
    context = PassContext.of(program, keep_float={"stem.weight": "slow", "inner.weight": "slow"})
    report = fixed_point(program, FixedPoint(), context)
    found = reasons(Report("r", passes=[report]))
    assert found["stem.weight"] == "it is the first product (keep_first)" and found["inner.weight"] == "slow"
