"""CalibratePrefix: a trained prefix is better on texts it was not trained on, and never worse."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example

import qcompile
from qcompile.calibration.statistics import CalibrationError
from qcompile.numerics.divergence import kl_divergence
from qcompile.numerics.format import Format
from qcompile.passes import CalibratePrefix, Fuse, IntactKV, Quantize, QuantizeKV
from qcompile.passes.kv_cache.calibrate_prefix import PrefixHeads
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError

PREFIX = (1, 7, 9)
INT3 = Quantize(Format.parse("int3/group32/zero"), None, lm_head=None)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def texts(count=8):
    """Batches of random ids; CalibratePrefix puts the prefix before them."""
    return [torch.randint(3, 128, (4, 24), generator=torch.manual_seed(seed)) for seed in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "bloom"])  # bloom folds heads into rows
def test_a_trained_prefix_is_better_on_texts_it_was_not_trained_on(name):
    """Grouped queries: the heads that share a key still do. The cache and the weights are quantized."""
    losses = {}
    for trained in (False, True):
        training = (CalibratePrefix(steps=60, lr=2e-2),) if trained else ()
        model = build(name)
        recipe = Recipe("q", (IntactKV(PREFIX), QuantizeKV(4), INT3, *training, Fuse()))
        report = qcompile.quantize(model, recipe, texts(), progress=False)
        ids = [torch.cat([torch.tensor(PREFIX).expand(4, -1), t], 1) for t in texts(12)[8:]]
        want = [logits(build(name), t) for t in ids]
        losses[trained] = sum(
            float(kl_divergence(w[:, 3:], logits(model, t)[:, 3:])) for w, t in zip(want, ids, strict=True)
        )
        assert relative_error([logits(model, ids[0])[:, :3]], [want[0][:, :3]]) < 1e-5  # its own logits stay
    assert losses[True] < 0.98 * losses[False], losses
    assert "60 steps" in str(report)


def test_training_keeps_the_lossless_prefix_where_nothing_is_lost():
    kept, model = build("llama"), build("llama")
    int8 = Quantize(Format("int8"), None)
    qcompile.quantize(kept, Recipe("q", (IntactKV(PREFIX), int8, Fuse())), progress=False)
    training = CalibratePrefix(steps=4, lr=10.0)  # every step of this size harms
    qcompile.quantize(model, Recipe("q", (IntactKV(PREFIX), int8, training, Fuse())), texts(), progress=False)
    assert torch.equal(model.qcompile_prefix.keys1, kept.qcompile_prefix.keys1)


@pytest.mark.slow
def test_the_texts_that_judge_are_not_trained_on():
    """One step: the last batch only judges, so that what is learned comes from the first."""

    def trained(first):
        model = build("llama")
        recipe = Recipe("q", (IntactKV(PREFIX), INT3, CalibratePrefix(steps=1, lr=1e-2), Fuse()))
        qcompile.quantize(model, recipe, [texts()[first], texts()[7]], progress=False)
        return model.qcompile_prefix.keys1

    assert not torch.equal(trained(0), trained(1))


def test_heads_that_repeat_one_another_are_trained_as_one():
    start = torch.randn(1, 2, 3, 4).repeat_interleave(2, dim=1)
    heads = PrefixHeads(start)
    assert heads.own.shape == (1, 2, 3, 4) and torch.equal(heads.all, start)
    (gradient,) = torch.autograd.grad(heads.all.sum(), heads.own)
    assert torch.equal(gradient, torch.full((1, 2, 3, 4), 2.0))


@pytest.mark.parametrize(
    "name,passes,words",
    [
        ("llama", (Quantize(), CalibratePrefix(), Fuse()), "needs IntactKV before it"),
        ("llama", (IntactKV((1,)), CalibratePrefix(), Quantize(), Fuse()), "must come after Quantize"),
        ("llama", (IntactKV((1,)), Quantize(), CalibratePrefix(), Fuse()), "another to judge by"),
    ],
)
def test_bad_recipes_are_refused(name, passes, words):
    model = build(name)
    with pytest.raises((RecipeError, CalibrationError), match=words):
        qcompile.quantize(model, Recipe("q", passes), [example(name)], progress=False)
    with pytest.raises(RecipeError, match="steps and lr must be positive"):
        CalibratePrefix(steps=0)
