"""What passes are given: data, runs, and the reports of sites."""

from __future__ import annotations

import pytest
import torch
from rank_threads import Kept, Together
from torch import nn

from qcompile.calibration import ranks as ranks_module
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import PassReport, SiteReport


@pytest.fixture
def program():
    return capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(3, 8),))


def test_batches_are_read_anew_every_time(program):
    batches = [[torch.randn(3, 8)], [torch.randn(2, 8)]]
    context = PassContext.of(program, batches=lambda: iter(batches))
    assert list(context.data()) == list(context.data()) == batches
    run = context.layerwise_run(program)
    assert len(run.values) == 2 and run.program is program


def test_an_iterator_that_was_read_is_not_called_empty(program):
    data = iter([[torch.randn(3, 8)]])
    context = PassContext.of(program, batches=lambda: data)
    assert len(context.layerwise_run(program).values) == 1
    with pytest.raises(CalibrationError, match="one iterator twice, and a pass before has read it to its end. Fix:"):
        context.layerwise_run(program)


def test_missing_and_empty_data_are_refused(program):
    with pytest.raises(CalibrationError, match="this pass needs calibration data: give batches"):
        PassContext.of(program).data()
    with pytest.raises(CalibrationError, match="the calibration iterator is empty: give at least one batch"):
        PassContext.of(program, batches=lambda: iter(())).layerwise_run(program)


def test_a_pass_by_itself_knows_its_program(program):
    context = PassContext.of(program)
    assert context.reference is program and context.facts.program is program
    assert [site.name for site in context.facts.sites] == ["0.weight", "2.weight"]
    assert context.statistics.batches == 0 and not context.rules and not context.keep_float


def test_a_trial_on_a_copy_reports_no_site(program):
    sites = {"0.weight": SiteReport("0.weight", 8, 8)}
    context = PassContext.of(program, sites=sites, keep_float={"2.weight": "mine"})
    copy = program.copy()
    trial = context.on(copy, keep_float_weights=True)
    trial.skip(PassReport("Trial"), "0.weight", "only tried")
    assert trial.facts.program is copy and trial.keep_float == context.keep_float and trial.keep_float_weights
    assert trial.reference is program and not trial.sites and sites["0.weight"].reason == ""


def test_a_skipped_site_is_in_both_reports(program):
    sites = {"0.weight": SiteReport("0.weight", 8, 8)}
    context, report = PassContext.of(program, sites=sites), PassReport("Quantize")
    context.skip(report, "0.weight", "a reason", "linear")
    context.skip(report, "unknown", "another")
    assert [str(place) for place in report.skipped] == ["0.weight: a reason (node linear)", "unknown: another"]
    assert sites["0.weight"].reason == "a reason" and not sites["0.weight"].quantized


@pytest.mark.parametrize("progress", [False, True])
def test_bars_change_no_items(program, progress):
    context = PassContext.of(program, progress=progress)
    assert list(context.track([1, 2, 3], "working")) == [1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_ranks_share_the_figures_of_items_and_all_get_them(program, monkeypatch, count):
    group, asked = Together(count), []
    monkeypatch.setattr(ranks_module, "dist", group)

    def body(ranks):
        def number(item):
            asked.append((ranks.rank, item))
            return {"nan": torch.nan, "inf": torch.inf}.get(item, 0.1 * len(item))

        context = PassContext.of(program, finished=Kept(ranks))
        return context.figures_of(["a", "bb", "nan", "inf", "ccccc"], number, "loss")

    for found in group.run(body):
        assert list(found) == ["a", "bb", "nan", "inf", "ccccc"]
        assert (found["a"], found["bb"], found["inf"], found["ccccc"]) == (0.1, 0.2, torch.inf, 0.5)
        assert found["nan"] != found["nan"]
    assert sorted(item for _, item in asked) == ["a", "bb", "ccccc", "inf", "nan"], "each once"
    assert {rank for rank, _ in asked} == set(range(min(count, 5)))
