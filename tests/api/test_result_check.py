"""What the changed model computes is compared with its graph and with the float model."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile.recipe.rule import RecipeError


class LooksAtItsModules(nn.Module):
    """It computes something else where a module is not of the class that it expects."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        hidden = torch.relu(self.up(self.norm(x)))
        return self.down(hidden if type(self.down) is nn.Linear else 2 * hidden)


def test_a_model_that_computes_something_else_than_its_graph_is_restored():
    torch.manual_seed(0)
    model, x = LooksAtItsModules().eval().requires_grad_(False), torch.randn(4, 32)
    before, down = model(x), model.down
    with pytest.raises(RecipeError, match="depends on its modules in another way.*Fix"):
        qcompile.quantize(model, "int8-rotated", example=x, progress=False)
    assert torch.equal(model(x), before) and model.down is down


class Branches(nn.Module):
    """No whole graph: what it does depends on values."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        found = self.inner(*args, **kwargs)
        return found if float(getattr(found, "logits", found).sum()) < 1e9 else None


def test_a_model_without_a_graph_is_restored_where_it_does_more_than_call_its_modules():
    torch.manual_seed(0)
    model, x = Branches(LooksAtItsModules()).eval().requires_grad_(False), torch.randn(4, 32)
    before, down = model(x), model.inner.down
    with pytest.raises(RecipeError, match=r"than its own modules with .* \(relative difference .*another way.*Fix"):
        qcompile.quantize(model, "int8", example=x, progress=False)
    assert torch.equal(model(x), before) and model.inner.down is down and not down._forward_hooks


def test_a_model_without_a_graph_whose_calls_differ_is_not_compared():
    calls = itertools.count(1)

    class Counts(LooksAtItsModules):
        def forward(self, x):
            return super().forward(x) * 2 ** next(calls)

    model = Branches(Counts()).requires_grad_(False)
    qcompile.quantize(model, "int8", example=torch.randn(4, 32), progress=False)
    assert isinstance(model.inner.down, qcompile.QuantLinear)


@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
def test_the_distance_from_float_of_a_model_without_a_graph(recipe):
    class Text(Branches):
        def forward(self, input_ids):
            return super().forward(input_ids=input_ids)

    model, inputs = Text(build("llama")), {"input_ids": torch.randint(3, 128, (4, 40))}
    want = model(**inputs).logits
    report = qcompile.quantize(model, recipe, [inputs], progress=False)
    got, metrics = model(**inputs).logits, report.metrics
    assert any(site.quantized for site in report.sites)
    assert metrics["relative error of the output"] == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)
    assert metrics["top-1 agreement"] == float((got.argmax(-1) == want.argmax(-1)).double().mean())
    p = want.log_softmax(-1)
    kl = float((p.exp() * (p - got.log_softmax(-1))).sum(-1).mean())
    assert metrics["KL divergence, nats per token"] == pytest.approx(kl, rel=1e-2, abs=1e-7)


def test_poor_agreement_without_a_graph_is_warned_of():
    class Text(Branches):
        def forward(self, input_ids):
            return super().forward(input_ids=input_ids)

    model, inputs = Text(build("llama")), {"input_ids": torch.randint(3, 128, (4, 40))}
    with torch.no_grad():
        for layer in model.inner.model.layers:
            layer.mlp.down_proj.weight[:, 0] = 20.0
    with pytest.warns(UserWarning, match="agree on .* of 160 tokens. Fix"):
        qcompile.quantize(model, _recipe("coarse"), [inputs], progress=False)


def test_a_model_whose_calls_differ_is_not_compared():
    calls = itertools.count(1)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            return self.linear(x) * 2 ** next(calls)

    model = Counts().requires_grad_(False)
    report = qcompile.quantize(model, "int8", example=torch.randn(4, 32), progress=False)
    assert isinstance(model.linear, qcompile.QuantLinear) and report.metrics["relative error of the output"] > 0.05


class Draws(LooksAtItsModules):
    """Adds what PyTorch's generator draws, or a Reformer's hashes, which are a product with such values."""

    def forward(self, x):
        hidden = self.up(self.norm(x)) @ torch.randn(64, 64) + torch.rand_like(x[..., :1])
        return self.down(hidden if type(self.down) is nn.Linear or not self.looks else 2 * hidden)


def test_a_model_that_draws_random_values_is_compared_with_the_same_draws():
    model = Draws().eval()
    model.looks = False
    report = qcompile.quantize(model, "int8-smooth", [torch.randn(4, 32)], progress=False)
    assert report.certificates and all(certificate.holds for certificate in report.certificates)
    assert report.metrics["relative error of the output"] < 0.05


def test_a_model_that_draws_random_values_and_looks_at_its_modules_is_restored():
    model = Draws().eval()
    model.looks = True
    with pytest.raises(RecipeError, match="depends on its modules in another way"):
        qcompile.quantize(model, "int8", example=torch.randn(4, 32), progress=False)
    assert type(model.down) is nn.Linear


def test_the_report_says_how_far_the_result_is_from_the_float_model():
    model, inputs = build("llama"), example("llama")
    want = model(**inputs).logits
    report = qcompile.quantize(model, "w4a16", [inputs], progress=False)
    got = model(**inputs).logits
    metrics = report.metrics
    assert metrics["relative error of the output"] == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)
    assert metrics["top-1 agreement"] == float((got.argmax(-1) == want.argmax(-1)).double().mean())
    assert metrics["compared tokens"] == 16 and "relative error" in str(report)


def _recipe(name, *passes):
    formats = dict(weight=qcompile.Format("int4"), act=None, lm_head=None)
    return qcompile.Recipe(name, (*passes, qcompile.passes.Quantize(**formats), qcompile.passes.Fuse()))


def test_poor_agreement_is_warned_of():
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 0] = 20.0  # one column takes the range of every row
    inputs = {"input_ids": torch.randint(3, 128, (4, 40))}
    with pytest.warns(UserWarning, match="agree on .* of 160 tokens. Fix"):
        qcompile.quantize(model, _recipe("coarse"), [inputs], progress=False)


def test_rewritings_that_do_harm_are_warned_of():
    """A fold without the rotation that it is for: columns carry the spread of the gains."""
    model = build("gemma3")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.exp(2.0 * torch.randn_like(parameter)) - 1)
    folded = _recipe("folded", qcompile.passes.Untie(), qcompile.passes.FoldNorm(open_streams=True))
    with pytest.warns(UserWarning, match="further from the float model .* than the same formats without"):
        qcompile.quantize(model, folded, [example("gemma3")], progress=False)


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_model_that_does_not_run_any_more_is_restored(fault):
    class Refuses(LooksAtItsModules):
        def forward(self, x):
            if type(self.down) is not nn.Linear:
                raise fault("another module")
            return super().forward(x)

    model, x = Refuses().eval().requires_grad_(False), torch.randn(4, 32)
    before = model(x)
    with pytest.raises(fault, match="another module"):
        qcompile.quantize(model, "int8", example=x, progress=False)
    assert torch.equal(model(x), before) and type(model.up) is nn.Linear


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 0] = 20.0
    inputs = {"input_ids": torch.randint(3, 128, (4, 40))}
    before = model(**inputs).logits
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="agree on"):
        warnings.simplefilter("error")
        qcompile.quantize(model, _recipe("coarse"), [inputs], progress=False)
    assert torch.equal(model(**inputs).logits, before)
