"""CalibratePrefix: a trained prefix is better on texts it was not trained on, and never worse."""

from __future__ import annotations

import pytest
import torch
from laws import rewrite, shape
from zoo import build, example

import qcompile
from qcompile.analysis.facts import Facts
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture
from qcompile.numerics.divergence import kl_divergence
from qcompile.numerics.format import Format
from qcompile.passes import CalibratePrefix, Fuse, IntactKV, Quantize, QuantizeKV
from qcompile.passes.kv_cache.calibrate_prefix import PrefixHeads, Trainable, calibrate_prefix
from qcompile.passes.kv_cache.intact_kv import intact_kv
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import KVConstants
from qcompile.recipe.rule import RecipeError
from qcompile.testing import Decoder

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


def small_problem(seed=0):
    """A float program, the same with weights of three bits, the prefix of the float one, and batches."""
    model = Decoder(shape(layers=1, vocabulary=31))
    program = capture(model, (model.example(),))
    start = intact_kv(program, IntactKV(PREFIX), PassContext.of(program)).constants.prefix
    quantized = program.copy()
    rewrite(quantized, Quantize(Format.parse("int3/row"), None, lm_head=None), batches=[])
    return program, quantized, start, [[torch.randint(3, 31, (2, 9))] for _ in range(4)]


def test_the_last_quarter_judges_and_the_rest_trains():
    program, quantized, start, batches = small_problem()
    seen = []

    def reference(text):
        seen.append(text)
        return program(text)

    context = PassContext(
        Facts(quantized), batches=lambda: batches, constants=KVConstants(prefix=start), reference=reference
    )
    report = calibrate_prefix(quantized, CalibratePrefix(steps=8, lr=0.02, tokens=8), context)
    texts = [torch.cat([torch.tensor(PREFIX).expand(2, -1), ids[:, :5]], 1) for (ids,) in batches]
    order = [3, 1, 2, 3, 0, 1, 3, 2, 0, 3, 1, 2, 3]  # judged before, and behind every second step
    assert len(seen) == len(order) and all(torch.equal(a, texts[i]) for a, i in zip(seen, order, strict=True))

    def divergence(prefix):
        places = {}
        for attention, k, v in zip(Facts(quantized).attentions, prefix.keys, prefix.values, strict=True):
            for node, first in ((attention.keys, k), (attention.values, v)):
                places[node] = lambda x, first=first: torch.cat([first.expand(len(x), -1, -1, -1), x[:, :, 3:]], 2)
        with torch.no_grad():
            got = Trainable(quantized, places).run(*quantized.bind([texts[3]]))[0]
        return float(kl_divergence(program(texts[3])[0][:, 3:], got[:, 3:]))

    trained = report.constants.prefix
    before, after = divergence(start), divergence(trained)
    assert after < before and torch.equal(trained.ids, start.ids) and torch.equal(trained.logits, start.logits)
    assert report.notes == [f"8 steps: divergence {before:.4f} -> {after:.4f} nats a token on validation texts"]
    assert not torch.equal(trained.keys[0], start.keys[0]) and not torch.equal(trained.values[0], start.values[0])
    for part in (*trained.keys, *trained.values):  # two heads read one
        assert torch.equal(part[:, 0], part[:, 1]) and not torch.equal(part[:, 1], part[:, 2])


def test_a_prefix_that_training_harms_is_the_one_before():
    """Each step of this size is worse on the texts that judge; the first prefix is given, bit for bit."""
    program, quantized, start, batches = small_problem()
    context = PassContext(
        Facts(quantized), batches=lambda: batches, constants=KVConstants(prefix=start), reference=program
    )
    report = calibrate_prefix(quantized, CalibratePrefix(steps=4, lr=10.0), context)
    trained = report.constants.prefix
    pairs = zip((*trained.keys, *trained.values), (*start.keys, *start.values), strict=True)
    assert all(torch.equal(now, before) for now, before in pairs)
    (note,) = report.notes
    assert note.split()[3] == note.split()[5], note


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
    ],
)
def test_bad_recipes_are_refused(name, passes, words):
    model = build(name)
    with pytest.raises((RecipeError, CalibrationError), match=words):
        qcompile.quantize(model, Recipe("q", passes), [example(name)], progress=False)


def test_impossible_trainings_are_refused():
    for bad in (dict(steps=0), dict(lr=0.0), dict(tokens=1)):
        with pytest.raises(RecipeError, match="steps and lr must be positive and tokens at least 2"):
            CalibratePrefix(**bad)
    program, quantized, start, batches = small_problem()
    context = PassContext(
        Facts(quantized), batches=lambda: batches[:1], constants=KVConstants(prefix=start), reference=program
    )
    with pytest.raises(CalibrationError, match="another to judge by"):
        calibrate_prefix(quantized, CalibratePrefix(), context)
