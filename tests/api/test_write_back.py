"""Where results go in the module, and what is refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile import QuantLinear, RecipeError
from qcompile.analysis.facts import Facts
from qcompile.api.write_back import WriteBack
from qcompile.ir.capture import capture
from qcompile.modules.quant_linear import RotatedLinear
from qcompile.passes import FoldNorm, Fuse, OnlineHadamard, Quantize, Rotate, Untie
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule


def test_a_weight_in_a_module_that_does_more_stays_float():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.plain = nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.plain(torch.nn.functional.linear(torch.tanh(x), self.w)))

    model = Odd().eval().requires_grad_(False)
    report = qcompile.quantize(model, "int8", example=torch.randn(4, 8), progress=False)
    assert [s.quantized for s in report.sites] == [False, True]
    assert "no module computes just this product" in report.sites[0].reason


def test_the_owner_of_a_tied_weight_is_the_linear():
    """Its first path is the embedding's, which is no linear."""
    model = build("llama")
    program = capture(model, (), example("llama"))
    places = WriteBack.of(model, Facts(program))
    (table,) = program.aliases
    assert isinstance(model.get_submodule(places.owners[table]), nn.Linear) and not places.not_plain


def test_a_transform_before_a_float_linear_gets_a_module():
    model, inputs = build("llama"), example("llama")
    recipe = Recipe(
        "x", (Untie(), FoldNorm(), Rotate(), OnlineHadamard(), Quantize(), Fuse()), (Rule("*.0.*", keep=True),)
    )
    with torch.no_grad():
        want = model(**inputs).logits
    qcompile.quantize(model, recipe, [inputs], progress=False)
    rotated = [m for m in model.modules() if isinstance(m, RotatedLinear)]
    signed = [m for m in model.modules() if isinstance(m, QuantLinear) and m.signs is not None]
    assert len(rotated) == len(signed) == 1
    with torch.no_grad():
        assert (model(**inputs).logits - want).abs().max() < 0.05 * want.abs().max()


def test_a_transform_without_a_linear_is_refused_before_anything_is_written():
    class Functional(nn.Module):
        """Its weights are parameters of one module, so no linear can hold a transform."""

        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = (
                nn.Parameter(torch.randn(n, k) / 8) for n, k in ((32, 8), (32, 8), (8, 32))
            )

        def forward(self, x):
            linear = torch.nn.functional.linear
            return linear(linear(x, self.up) * torch.sigmoid(linear(x, self.gate)), self.down)

    model, x = Functional(), torch.randn(4, 8)
    before = {n: p.clone() for n, p in model.named_parameters()}
    recipe = Recipe("x", (OnlineHadamard(),))
    facts = Facts(capture(model, (x,)))
    after, report = run(facts.program, recipe)  # which does not know that it is written back
    assert report.passes[0].done
    with pytest.raises(RecipeError, match="have no linear module to live in. Fix: drop OnlineHadamard"):
        WriteBack.of(model, facts).check(after)
    report = qcompile.quantize(model, recipe, example=x, progress=False)
    assert not report.passes[0].done and report.passes[0].skipped
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_layer_norms_whose_stream_was_centered_become_rms_norms(name):
    model, inputs = build(name), example(name)
    qcompile.quantize(model, Recipe("fold", (Untie(), FoldNorm())), [inputs], progress=False)
    assert any(isinstance(m, nn.RMSNorm) for m in model.modules())
    assert model.config.tie_word_embeddings is False  # or saving would tie them again
