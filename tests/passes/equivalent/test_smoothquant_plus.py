"""SmoothQuant+: an exact rewriting whose search is never worse than none."""

from __future__ import annotations

import dataclasses
import sys
import threading

import pytest
import torch
from padded_batches import decoder, padded, texts
from rank_threads import Kept, Together
from torch import nn
from zoo import build, example

import qcompile
from qcompile.api.example_inputs import flat_inputs
from qcompile.calibration import ranks as ranks_module
from qcompile.calibration.padding import TokenMask
from qcompile.calibration.ranks import Ranks
from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize, SmoothQuant, SmoothQuantPlus, Untie
from qcompile.passes.equivalent.smoothquant_plus import candidates, describe, first_output, loss_of, smoothquant_plus
from qcompile.passes.equivalent.untie import untie
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe

CONFIG = SmoothQuantPlus(Format.parse("int4/group32/zero"), step=0.25, batches=1)


def outliers(model):
    """Large activations in few channels, function kept: norm gains times 100, the columns behind them by 100."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, consumers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[:3] *= 100
                for linear in consumers:
                    linear.weight[:, :3] /= 100
    return model


def of_batch(program, batch):
    """The context of a program with one batch of calibration data."""
    return PassContext.of(program, batches=lambda: [batch], statistics=observe(program, [batch]))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_exact(name):
    model = build(name)
    report = qcompile.quantize(model, Recipe("s", (Untie(), CONFIG)), [example(name)], progress=False)
    with torch.no_grad():
        got, want = model(**example(name))[0], build(name)(**example(name))[0]
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    assert all(c.holds for c in report.certificates)


def test_the_winner_is_the_least_loss_and_outliers_make_it_smooth():
    program = capture(outliers(build("llama")), (), example("llama"))
    untie(program, Untie(), PassContext.of(program))
    batch = flat_inputs(program, example("llama"), example("llama"))
    after, context = program.copy(), of_batch(program, batch)
    report = smoothquant_plus(after, CONFIG, context.on(after))
    assert report.done and "alpha" in report.notes[-1]
    want = [first_output(program, batch)]
    own = [TokenMask(program).of(batch)]
    losses = {c: loss_of(program, CONFIG, context, c, [batch], want, own) for c in [None, *candidates(CONFIG)]}
    best = min(losses, key=losses.get)
    assert report.notes[-1].startswith(f"{describe(best)}:") and losses[best] < losses[None]


def test_every_strength_is_tried_everywhere_and_in_either_kind_of_place():
    tried = candidates(SmoothQuantPlus(step=0.5))
    assert [(c.alpha, c.norms, c.rows) for c in tried] == [
        (a, norms, rows) for norms, rows in ((True, True), (True, False), (False, True)) for a in (0.0, 0.5, 1.0)
    ]
    assert [describe(c) for c in (None, *tried[::4])] == [
        "no smoothing", "alpha 0.00", "alpha 0.50 behind norms only", "alpha 1.00 behind linear rows only"
    ]  # fmt: skip


def test_a_winner_behind_linear_rows_keeps_the_norms(monkeypatch):
    winner, module = SmoothQuant(0.5, norms=False), sys.modules[loss_of.__module__]
    monkeypatch.setattr(module, "loss_of", lambda *given: float(given[3] != winner))
    program = capture(build("llama"), (), example("llama"))
    untie(program, Untie(), PassContext.of(program))
    before = dict(program.weights)
    batch = flat_inputs(program, example("llama"), example("llama"))
    report = smoothquant_plus(program, CONFIG, of_batch(program, batch))
    assert "alpha 0.50 behind linear rows only" in report.notes[-1]
    changed = {name for name, weight in before.items() if not torch.equal(program.weights[name], weight)}
    assert {name.split(".")[-2] for name in changed} == {"v_proj", "o_proj", "up_proj", "down_proj"}


def test_the_loss_is_the_divergence_of_the_rounded_models_logits():
    """Against a model smoothed and quantized by itself: F.kl_div, no search, no program."""
    model, batch = outliers(build("llama")), example("llama")
    program = capture(model, (), batch)
    untie(program, Untie(), PassContext.of(program))
    data = [flat_inputs(program, batch, batch)]
    context, own = of_batch(program, data[0]), [TokenMask(program).of(data[0])]
    for clip in (False, True):
        config = dataclasses.replace(CONFIG, clip=clip)
        got = loss_of(program, config, context, SmoothQuant(0.5), data, [first_output(program, data[0])], own)
        rounded = outliers(build("llama"))
        passes = (Untie(), SmoothQuant(0.5), Quantize(CONFIG.weight, None, clip=clip), Fuse())
        qcompile.quantize(rounded, Recipe("same", passes), [batch], progress=False)
        with torch.no_grad():
            p, q = (m(**batch).logits.flatten(0, -2).log_softmax(-1) for m in (model, rounded))
        want = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        assert got == pytest.approx(float(want), rel=1e-3)


def test_the_finalists_are_rounded_with_the_clips_of_the_pass_behind():
    program = capture(outliers(build("llama")), (), example("llama"))
    untie(program, Untie(), PassContext.of(program))
    batch = flat_inputs(program, example("llama"), example("llama"))
    context, config = of_batch(program, batch), dataclasses.replace(CONFIG, clip=True)
    attempt = program.copy()
    note = smoothquant_plus(attempt, config, context.on(attempt)).notes[-1]
    want, own = [first_output(program, batch)], [TokenMask(program).of(batch)]
    clipped, plain = (loss_of(program, c, context, None, [batch], want, own) for c in (config, CONFIG))
    assert f"without smoothing {clipped:.4g}" in note and f"{clipped:.4g}" != f"{plain:.4g}"


def test_padding_has_no_part_in_the_loss():
    _, program = decoder()
    notes = []
    for batch in (padded(texts([7, 7])), padded(texts([7, 7]), extra=6), padded(texts([7, 7]), extra=6, left=True)):
        attempt = program.copy()
        notes += smoothquant_plus(attempt, CONFIG, of_batch(program, batch).on(attempt)).notes
    assert notes[0] == notes[1] == notes[2]


def test_bad_recipes():
    with pytest.raises(ValueError, match="0 < step"):
        SmoothQuantPlus(step=0)
    with pytest.raises(ValueError, match="the same twice"):
        Recipe("two", (SmoothQuant(), SmoothQuantPlus())).check()
    with pytest.raises(ValueError, match="needs calibration data for SmoothQuantPlus"):
        qcompile.quantize(build("llama"), "w4a16-smooth")


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_try_candidates_side_by_side_and_choose_the_same(monkeypatch, count):
    torch.manual_seed(0)
    data, group, module = [[torch.randn(4, 16, 32)] for _ in range(2)], Together(count), sys.modules[loss_of.__module__]
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[0].weight.data[:3] *= 30
    program = capture(model.requires_grad_(False), (data[0][0],))
    statistics, tried, lock = observe(program, data), [], threading.RLock()
    config = SmoothQuantPlus(Format.parse("int4/group32/zero"), step=0.5, logits=False)

    def smoothed(ranks):
        own = program.copy()
        context = PassContext.of(own, batches=lambda: data, statistics=statistics, finished=Kept(ranks))
        return smoothquant_plus(own, config, context).notes, own.weights

    def counted(*given):
        tried.append((group.place.rank, given[3]))
        with lock:  # ranks are threads here, and torch.fx is for one
            return loss_of(*given)

    def locked(*given, real=module.smoothquant):
        with lock:
            return real(*given)

    want_notes, want = smoothed(Ranks())
    monkeypatch.setattr(ranks_module, "dist", group)
    monkeypatch.setattr(module, "loss_of", counted)
    monkeypatch.setattr(module, "smoothquant", locked)
    for notes, weights in group.run(smoothed):
        assert notes == want_notes and not notes[-1].startswith("no smoothing")
        assert [name for name, weight in weights.items() if not torch.equal(weight, want[name])] == []
    assert len(tried) == 9 + 3, "candidates, and finalists on all batches"
    assert {rank for rank, _ in tried} == set(range(count))
