"""Running a recipe: rules, undone passes, refusals before work, and the order of things."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile import NothingToQuantize, RecipeError, Rule
from qcompile.ir.capture import capture
from qcompile.passes import Fuse, Quantize, SmoothQuant, Untie
from qcompile.passes.equivalent import smoothquant
from qcompile.pipeline.run import check_data, run
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe

INT8 = Recipe("int8", (Quantize(), Fuse()))


@pytest.mark.slow
def test_rules():
    recipe = qcompile.find_recipe("int8").with_rules(
        [Rule("*.0.*", keep=True), Rule("*up_proj*", weight=qcompile.Format.parse("int4/group32"))]
    )
    model, report = build("llama"), None
    report = qcompile.quantize(model, recipe, progress=False)
    by_name = {s.name: s for s in report.sites}
    assert by_name["model.layers.0.mlp.up_proj.weight"].reason.startswith("kept float by the rule")
    assert by_name["model.layers.1.mlp.up_proj.weight"].weight == "int4/group32"
    with pytest.raises(RecipeError, match="matches no site; nearest names: .*up_proj"):
        qcompile.quantize(
            build("llama"), qcompile.find_recipe("int8").with_rules([Rule("*.upp_proj.*", keep=True)]), progress=False
        )


def test_a_broken_law_is_undone_and_named(monkeypatch):
    real = smoothquant.fold_scale

    def wrong(program, source, sites, scale):
        real(program, source, sites, scale)
        if source.norm is None:
            program.weights[sites[0].name] = program.weights[sites[0].name] * 1.5

    monkeypatch.setattr(smoothquant, "fold_scale", wrong)
    model, reference = build("llama"), build("llama")
    recipe = Recipe("broken", (Untie(), SmoothQuant(), Quantize(), Fuse()))
    with pytest.warns(UserWarning, match="SmoothQuant: BROKEN, undone; first at"):
        report = qcompile.quantize(model, recipe, [example("llama")], progress=False)
    assert not report.certificates[-1].holds
    with torch.no_grad():
        error = relative_error([model(**example("llama"))[0]], [reference(**example("llama"))[0]])
    assert error < 0.03


def mlp_program():
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10))
    return capture(model, (torch.randn(6, 48),))


def test_the_callers_program_is_not_touched():
    program = mlp_program()
    nodes, weights = [str(n) for n in program.graph.nodes], dict(program.weights)
    rewritten, _ = run(program, INT8)
    assert [str(n) for n in program.graph.nodes] == nodes
    assert program.weights.keys() == weights.keys() and all(program.weights[n] is t for n, t in weights.items())
    assert rewritten is not program and not set(weights) <= set(rewritten.weights)


def test_sites_that_the_caller_keeps_float():
    _, report = run(mlp_program(), INT8, keep_float={"2.weight": "because I say so"})
    assert [(s.name, s.quantized, s.reason) for s in report.sites] == [
        ("0.weight", True, ""), ("2.weight", False, "because I say so"), ("4.weight", True, ""),
    ]  # fmt: skip


def test_a_recipe_that_quantizes_nothing_says_why_for_every_site():
    every = {name: f"reason of {name}" for name in ("0.weight", "2.weight", "4.weight")}
    with pytest.raises(NothingToQuantize, match="'int8' quantized no site: 0.weight: reason of 0.weight; 2.weight:"):
        run(mlp_program(), INT8, keep_float=every)
    _, report = run(mlp_program(), Recipe("float"), keep_float=every)  # does not quantize, so it is no error
    assert {s.reason for s in report.sites} == {"the recipe does not quantize"}


def test_certificates_need_an_example_and_can_be_switched_off():
    inputs = [torch.randn(6, 48)]
    recipe = Recipe("smooth", (SmoothQuant(), Quantize(), Fuse()))
    for arguments, count in (({}, 0), ({"example": inputs}, 1), ({"example": inputs, "verify": False}, 0)):
        _, report = run(mlp_program(), recipe, batches=lambda: [inputs], **arguments)
        assert len(report.certificates) == count and all(c.holds for c in report.certificates)


def test_missing_data_names_passes_needs_and_the_fix():
    recipe = Recipe("smooth", (SmoothQuant(), Quantize(), Fuse()))
    check_data(recipe, True)
    check_data(INT8, False)
    with pytest.raises(RecipeError) as caught:
        run(mlp_program(), recipe)
    text = str(caught.value)
    assert "SmoothQuant (absmax)" in text and "batches = qcompile.calibration_batches(tokenizer)" in text
    assert "qcompile.quantize(model, 'smooth', batches)" in text and hasattr(qcompile, "calibration_batches")


def test_bytes_of_sites():
    program = mlp_program()
    _, report = run(program, INT8)
    assert report.bytes_before == sum(program.weights[s.name].nbytes for s in report.sites)
    for site in report.sites:  # codes of int8 and one float32 scale for each row
        assert site.bytes_after == site.N * site.K + 4 * site.N


def test_a_program_that_came_quantized_is_reported():
    quantized, report = run(mlp_program(), INT8)
    _, again = run(quantized, Recipe("already quantized"))
    assert [(s.name, s.N, s.K, s.weight, s.act, s.bytes_after) for s in again.sites] == [
        (s.name, s.N, s.K, s.weight, s.act, s.bytes_after) for s in report.sites
    ]


def test_an_untied_site_keeps_rule_and_report_of_its_name():
    program = capture(build("llama"), (), example("llama"))
    (table,) = program.aliases
    recipe = Recipe("q", (Untie(), Quantize(), Fuse()), (Rule(table, keep=True),))
    _, report = run(program, recipe)
    ((new, old),) = report.passes[0].renamed.items()
    (kept,) = [s for s in report.sites if not s.quantized]
    assert (
        old == table and kept.reason.startswith("kept float by the rule") and new not in {s.name for s in report.sites}
    )


def test_statistics_are_those_that_a_pass_needs(monkeypatch):
    from qcompile.pipeline import run as module

    observed, real = [], module.observe

    def spy(*args, **named):
        observed.append((named["sites"], named["attentions"]))
        return real(*args, **named)

    monkeypatch.setattr(module, "observe", spy)
    inputs = [torch.randn(6, 48)]
    run(mlp_program(), INT8, batches=lambda: [inputs])
    assert observed == []
    run(mlp_program(), Recipe("smooth", (SmoothQuant(), Quantize())), batches=lambda: [inputs])
    assert observed == [(True, False)]
