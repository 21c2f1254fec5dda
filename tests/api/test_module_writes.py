"""What goes into the model: each result in the module that it belongs to, and nothing at all where one has no place."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional

import qcompile
from qcompile import QuantLinear, RecipeError
from qcompile.modules.quant_linear import RotatedLinear
from qcompile.passes import FoldNorm, Fuse, OnlineHadamard, Quantize, Untie
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

K = 64
api = importlib.import_module("qcompile.api.rewrite_model")
FOLD = Recipe("fold", (Untie(), FoldNorm(open_streams=True)))


def norm():
    made = nn.LayerNorm(K)
    made.weight.data.uniform_(0.5, 1.5)
    made.bias.data.normal_()
    return made


def changed(model, recipe, x=None, **options):
    """The error of a model that was quantized in place, against what it gave before."""
    x = torch.randn(6, K) if x is None else x
    model.eval().requires_grad_(False)
    want = model(x)
    qcompile.quantize(model, recipe, [x], progress=False, **options)
    return relative_error([model(x)], [want])


class Shared(nn.Module):
    """Two linears with one weight and biases of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
        self.b.weight = self.a.weight
        self.b.bias.data += 3

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
def test_two_linears_with_one_weight_keep_their_biases(recipe):
    """w4a16 has another format for the weight that gives the output: one weight has one format."""
    model = Shared()
    biases = model.a.bias.clone(), model.b.bias.clone()
    assert changed(model, recipe) < 0.02
    assert torch.equal(model.a.bias, biases[0]) and torch.equal(model.b.bias, biases[1])
    assert model.a.codes is model.b.codes


@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
def test_a_module_that_is_called_twice_is_replaced_once_at_every_path(recipe):
    shared = nn.Linear(K, K)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared), nn.ReLU(), shared)
    assert changed(model, recipe) < 0.02
    assert isinstance(model[0], QuantLinear) and model[0] is model[2][0] is model[4]


def test_a_transform_in_front_of_a_module_that_stays_float_stands_once():
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    looked = []
    model[2].register_forward_hook(lambda m, args, out: looked.append(args[0]))
    x = torch.randn(3, K)
    plain = model[1](model[0](x)).detach()
    weight = model[2].weight.detach().clone()
    assert changed(model, Recipe("x", (OnlineHadamard(),)), x) < 1e-5
    assert isinstance(model[2], RotatedLinear) and torch.allclose(looked[-1], plain)  # the hook sees the model's own x
    assert torch.allclose(model[2].weight, weight, atol=1e-6)


def test_signs_are_not_shared():
    model = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(K, K), nn.ReLU())), nn.Linear(K, K))
    assert changed(model, Recipe("x", (OnlineHadamard(), Quantize(), Fuse()))) < 0.05
    signs = [m.signs for m in model.modules() if isinstance(m, QuantLinear) and m.signs is not None]
    assert len(signs) == 3 and len({s.data_ptr() for s in signs}) == 3


class Bare(nn.Module):
    """A linear of its own class, which reads no bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, K) / 8)

    def forward(self, x):
        return functional.linear(x, self.weight)


@pytest.mark.parametrize("linear", [Bare, lambda: nn.Linear(K, K, bias=False)])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_bias_that_a_pass_adds_is_added(linear, quantized):
    rules = () if quantized else (Rule("1.*", keep=True),)
    recipe = Recipe("x", (FoldNorm(open_streams=True), Quantize(), Fuse()), rules)
    model = nn.Sequential(norm(), linear(), nn.ReLU(), nn.Linear(K, K))
    assert changed(model, recipe) < 0.02
    assert model[1].bias is not None and isinstance(model[1], QuantLinear) == quantized


def test_a_shift_stays_in_the_norm_where_no_module_could_add_a_bias():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.w = norm(), nn.Parameter(torch.randn(K, K) / 8)

        def forward(self, x):
            return functional.linear(self.norm(x), self.w)

    model = Functional()
    assert changed(model, FOLD) < 1e-5 and model.norm.bias.any()


def test_a_gain_with_the_name_of_a_part_is_written():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(K) + 0.5)

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    model = nn.Sequential(Norm(), nn.Linear(K, K))
    assert changed(model, FOLD) < 1e-5 and torch.equal(model[0].scale, torch.ones(K))


class Tied(nn.Module):
    """A tied head whose path comes before or behind that of the table."""

    def __init__(self, head_first):
        super().__init__()
        names = ("head", "table") if head_first else ("table", "head")
        for name in names:
            setattr(self, name, nn.Embedding(97, K) if name == "table" else nn.Linear(K, 97, bias=False))
        self.head.weight = self.table.weight
        self.first, self.last, self.up, self.down = norm(), norm(), nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, ids):
        h = self.table(ids)
        return self.head(self.last(h + self.down(torch.relu(self.up(self.first(h))))))


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("recipe", ["exact", "int8-rotated"])
def test_an_untied_head_and_its_table_go_to_their_own_paths(head_first, recipe):
    model = Tied(head_first)
    assert changed(model, recipe, torch.randint(0, 97, (2, 7))) < (1e-4 if recipe == "exact" else 0.03)
    assert model.head.weight.data_ptr() != model.table.weight.data_ptr()


def test_a_norm_that_does_more_is_refused():
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 2

    model = Tied(False)
    model.first, model.last = Doubled(K), Doubled(K)
    with pytest.raises(RecipeError, match="gain first.weight is no nn.LayerNorm module"):
        changed(model, FOLD, torch.randint(0, 97, (2, 7)))


def test_calls_of_one_module_that_differ_are_refused_and_nothing_is_written(monkeypatch):
    shared = nn.Linear(K, K)
    model = nn.Sequential(shared, nn.ReLU(), shared).requires_grad_(False)
    before = shared.weight.clone()
    recipe = Recipe("x", (Quantize(), Fuse()))
    x = torch.randn(3, K)
    original = api.run

    def differently(*args, **options):
        after, report = original(*args, **options)
        second = [node for node in after.graph.nodes if "qlinear" in str(node.target)][-1]
        second.args = (*second.args[:7], None, *second.args[8:])  # without its bias
        return after, report

    monkeypatch.setattr(api, "run", differently)
    with pytest.raises(RecipeError, match="calls of 0 were rewritten differently.*Fix: keep it float by a rule"):
        qcompile.quantize(model, recipe, [x], progress=False)
    assert model[0] is shared and torch.equal(shared.weight, before)
