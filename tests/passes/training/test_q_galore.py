"""QGaLore: which products are rewritten, and what the recipe refuses."""

from __future__ import annotations

import pytest
import torch
from q_galore_models import low_rank_linears, net, prepared
from torch import nn

import qcompile
from qcompile import Recipe, RecipeError, Rule, capture
from qcompile.ir.op_calls import LowRankLinearCall
from qcompile.modules.low_rank_linear import LowRankLinear
from qcompile.passes import QGaLore
from qcompile.pipeline.run import run
from qcompile.training.optim import QGaLoreAdamW8bit


class Tied(nn.Module):
    """An embedding whose table is also a projection in the middle, a linear that is called twice, and logits."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.back = nn.Linear(16, 12, bias=False)
        self.back.weight = self.table.weight
        self.twice = nn.Linear(16, 16)
        self.mix = nn.Linear(12, 16)
        self.head = nn.Linear(16, 12)

    def forward(self, ids):
        x = torch.relu(self.twice(torch.relu(self.twice(self.table(ids)))))
        return self.head(torch.relu(self.mix(torch.relu(self.back(x)))))


def recipe(*rules, **config):
    return qcompile.Recipe("test", (QGaLore(**{"rank": 4, **config}),), rules)


def train(model, *rules, example=None, **config):
    example = torch.randn(4, 12) if example is None else example
    return qcompile.train(model, recipe(*rules, **config), example=example, progress=False)


def test_all_but_the_logits_are_trained():
    model, parameters = net(), {}
    biases = [model[0].bias, model[2].bias]
    report = train(model)
    assert [type(m) for m in model] == [LowRankLinear, nn.Tanh, LowRankLinear, nn.Tanh, nn.Linear]
    assert report.passes[0].done == ["0.weight", "2.weight"]
    assert [(s.site, s.reason) for s in report.passes[0].skipped] == [("4.weight", "it gives the output")]
    by_name = {site.name: site for site in report.sites}
    assert by_name["0.weight"].weight == "int8/group256/zero" and by_name["0.weight"].bytes_after == 12 * 20 + 20 * 5
    assert by_name["4.weight"].reason == "it gives the output"
    assert model[0].bias is biases[0] and model[2].bias is biases[1]
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameters == {
        "0.low": (20, 4), "0.bias": (20,), "2.low": (4, 20), "2.bias": (16,), "4.weight": (8, 16), "4.bias": (8,),
    }  # fmt: skip
    assert all(p.requires_grad for p in model.parameters()) and not any(m.low.any() for m in low_rank_linears(model))


def test_tied_frozen_and_kept_weights_stay_with_the_reason():
    model = Tied()
    model.mix.weight.requires_grad_(False)
    report = train(model, example=torch.arange(6)[None])
    reasons = {s.site: s.reason for s in report.passes[0].skipped}
    table = next(name for name in reasons if name in ("table.weight", "back.weight"))
    assert "its weight is tied: embedding reads it too" in reasons[table]
    assert reasons["mix.weight"] == "requires_grad of its weight is off: nothing to train"
    assert reasons["head.weight"] == "it gives the output"
    assert report.passes[0].done == ["twice.weight"] and isinstance(model.twice, LowRankLinear)
    assert model.back.weight is model.table.weight
    kept = train(net(), Rule("0.*", keep=True))
    assert {s.site: s.reason for s in kept.passes[0].skipped}["0.weight"] == "kept float by the rule '0.*'"


class Transposed(nn.Module):
    """A linear of another class: its weight is [K, N], its bias has another name."""

    def __init__(self):
        super().__init__()
        self.matrix, self.offset = nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(20))

    def forward(self, x):
        return torch.addmm(self.offset, x, self.matrix)


def test_a_linear_of_another_class():
    first = Transposed()
    model, x = nn.Sequential(first, nn.Tanh(), nn.Linear(20, 8)), torch.randn(4, 12)
    expected = model(x)
    train(model)
    assert isinstance(model[0], LowRankLinear) and model[0].bias is first.offset
    assert torch.allclose(model(x), expected, atol=0.1) and model[0].low.shape == (20, 4)
    assert torch.allclose(model[0].weight, first.matrix.t(), atol=0.05)


def test_a_rule_gives_a_weight_its_own_format():
    model = net()
    train(model, Rule("2.*", weight="int8/row"))
    assert [str(m.rule.format) for m in low_rank_linears(model)] == ["int8/group256/zero", "int8/row"]


def test_the_config_reaches_the_modules():
    model = prepared(
        net(), gap=7, scale=0.5, basis="int8/group64", similarity=0.7, factor=3, queue=2, rounding="nearest", seed=2
    )
    module = low_rank_linears(model)[0]
    rule = module.rule
    assert (rule.scale, rule.threshold, rule.factor, rule.stochastic) == (0.5, 0.7, 3, False)
    assert str(rule.basis_format) == "int8/group64" and module.basis.dtype == torch.int8 and module.basis_zero is None
    assert module.schedule.tolist() == [0, 7, 0, 1] and module.similarities.shape == (2,)
    streams = {m.rule.stream for seed in (0, 2) for m in low_rank_linears(prepared(net(), seed=seed))}
    assert len(streams) == 4


def test_half_and_double_models():
    for dtype, low in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = prepared(net(dtype=dtype))
        model(torch.randn(4, 12, dtype=dtype)).float().sum().backward()
        before = model[0].weight
        QGaLoreAdamW8bit(model.parameters(), lr=0.1).step()
        assert not torch.equal(model[0].weight, before) and model[0](torch.randn(2, 12, dtype=dtype)).dtype == dtype
        assert {m.low.dtype for m in low_rank_linears(model)} == {low} and model[0].scale.dtype == torch.float32


def unchanged(model, attempt, match):
    before, modules = {n: t.clone() for n, t in model.state_dict().items()}, list(model.modules())
    with pytest.raises(RecipeError, match=match):
        attempt()
    assert list(model.modules()) == modules
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_weight_that_is_smaller_than_the_rank_is_left_and_the_others_are_trained():
    model = net((12, 20, 16, 16, 8))
    report = train(model, rank=13)
    assert report.passes[0].done == ["2.weight", "4.weight"] and type(model[0]) is nn.Linear
    reason = "rank 13 is larger than a side of its weight. Fix: QGaLore(rank=12) or smaller"
    assert (report.passes[0].skipped[0].site, report.passes[0].skipped[0].reason) == ("0.weight", reason)
    assert {site.name: site.reason for site in report.sites}["0.weight"] == reason
    model(torch.randn(4, 12)).sum().backward()
    QGaLoreAdamW8bit(model.parameters()).step()


def test_refused_ranks_and_rules_name_the_sites():
    model = net((12, 20, 16, 16, 8))
    match = r"trains no weight: 0\.weight: rank 17 is larger.*QGaLore\(rank=12\) or.*; 2\.weight.*rank=16.*; 4\.weight"
    unchanged(model, lambda: train(model, rank=17), match)
    unchanged(model, lambda: train(model, Rule("0.*", weight="int4/group32")), "by the rule '0.*', is int4/group32")
    unchanged(model, lambda: train(model, Rule("0.*", act="int8")), "has act=int8/row, but QGaLore keeps activations")
    unchanged(model, lambda: train(model, Rule("*", keep=True)), "QGaLore trains no weight: 0.weight: kept float")
    train(model, rank=12)
    unchanged(model, lambda: train(model, rank=4), "is in training already")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 4.0}, "rank is 4.0"),
        ({"gap": 0}, "gap is 0"),
        ({"factor": 0}, "factor is 0"),
        ({"queue": 0}, "queue is 0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"similarity": 1.5}, "similarity is 1.5"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"weight": "int4/group32"}, "weight is int4/group32"),
        ({"weight": "fp8/row"}, "weight is fp8/row"),
        ({"weight": "int8/tensor"}, "weight is int8/tensor"),
        ({"basis": "int4/tensor"}, "cannot be stored as int4/tensor"),
        ({"basis": "int4/group32/dual"}, "cannot be stored as int4/group32/dual"),
    ],
)
def test_refused_configs(config, match):
    with pytest.raises(RecipeError, match=match):
        QGaLore(**config)


def test_the_preset_and_its_json():
    preset = qcompile.find_recipe("q-galore")
    assert preset.passes == (QGaLore(),) and preset.trains
    other = recipe(basis=None, weight=None)
    assert qcompile.Recipe.from_json(other.to_json()) == other
    model = net()
    unchanged(model, lambda: qcompile.quantize(model, recipe(), example=torch.randn(4, 12)), "qcompile.train")


def test_products_that_follow_each_other_are_all_trained():
    model, x = (
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)),
        torch.randn(4, 32),
    )
    before = model.eval()(x)
    program = capture(model, (x,))
    rewritten, report = run(program, Recipe("small", (QGaLore(rank=4),)))
    assert report.passes[0].done == ["0.weight", "1.weight", "2.weight"]
    assert len(list(LowRankLinearCall.find(rewritten))) == 3
    assert not torch.equal(rewritten(x)[0], before) and torch.allclose(rewritten(x)[0], before, atol=0.05)
    qcompile.train(model, Recipe("small", (QGaLore(rank=4),)), example=x, progress=False)
    assert torch.allclose(model(x), rewritten(x)[0], atol=1e-6)
