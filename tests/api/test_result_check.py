"""What the changed model computes is compared with its graph and with the float model."""

from __future__ import annotations

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


def test_a_model_whose_calls_differ_is_not_compared():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            return self.linear(x) + torch.randn_like(x)

    model = Noisy().requires_grad_(False)
    report = qcompile.quantize(model, "int8", example=torch.randn(4, 32), progress=False)
    assert isinstance(model.linear, qcompile.QuantLinear) and report.metrics["relative error of the output"] > 0.1


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
