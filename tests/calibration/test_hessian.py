"""Second moments of site inputs: what blocks sum is x^T x, and values that are not finite are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.analysis.sites import find_sites
from qcompile.calibration.hessian import Gram, hessian_of, refuse_infinite
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.ranks import Ranks
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture


@pytest.mark.parametrize("columns", [5, 255, 256, 601])
def test_gram(columns):
    x, sums = torch.randn(40, columns, dtype=torch.float64), Gram(columns, torch.device("cpu"))
    sums.add(x[:25])
    sums.add(x[25:])
    assert torch.allclose(sums.whole(), x.t() @ x)


def run_to_the_second_site(*batches, blocks=None):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    program = capture(model, (torch.randn(2, 3, 8),))
    run = LayerwiseRun(program, [[batch] for batch in batches], blocks=blocks)
    site = find_sites(program)[1]
    run.advance(site.node)
    return model, run, site


@pytest.mark.parametrize("blocks", [None, [1, 1, 1], [2, 1], [1, 2], [3]])
def test_the_hessian_of_a_site(blocks):
    """Of all tokens of all batches, however they are joined."""
    batches = [torch.randn(2, 3, 8), torch.randn(1, 5, 8), torch.randn(4, 2, 8)]
    model, run, site = run_to_the_second_site(*batches, blocks=blocks)
    with torch.no_grad():
        x = torch.cat([model[:2](batch).flatten(0, -2) for batch in batches])
    found = hessian_of(run, site)
    assert found.dtype == torch.float64 and torch.allclose(found, x.t().double() @ x.double(), rtol=1e-5)


def test_the_products_are_those_of_blocks(monkeypatch):
    """Ranks that have whole blocks each sum the same products as one process: bit for bit."""
    sizes = []
    real = Gram.add
    monkeypatch.setattr(Gram, "add", lambda sums, rows: (sizes.append(len(rows)), real(sums, rows))[1])
    batches = [torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 2, 8)]
    _, run, site = run_to_the_second_site(*batches, blocks=[2, 1])
    hessian_of(run, site)
    assert sizes == [8, 2]


class Doubling(Ranks):
    """A rank whose sums another one has, too."""

    def add(self, tensor):
        tensor.mul_(2)


def test_tokens_of_all_ranks_count():
    _, run, site = run_to_the_second_site(torch.randn(2, 3, 8))
    alone = hessian_of(run, site)
    assert torch.equal(hessian_of(run, site, Doubling(0, 2)), 2 * alone)


def test_a_model_in_bfloat16_has_a_hessian_in_float64():
    x, model = torch.randn(40, 8).bfloat16(), nn.Sequential(nn.Linear(8, 6)).bfloat16()
    program = capture(model, (x,))
    (site,) = find_sites(program)
    run = LayerwiseRun(program, [[x]])
    run.advance(site.node)
    assert torch.allclose(hessian_of(run, site), x.double().t() @ x.double(), rtol=1e-5, atol=1e-4)


def test_finite_inputs_whose_squares_are_not_are_refused():
    _, run, site = run_to_the_second_site(torch.full((2, 3, 8), 1e30))
    with pytest.raises(CalibrationError, match=r"batches \[\] bring NaN or Inf to 2.weight"):
        hessian_of(run, site)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_infinite_inputs_are_named_with_their_batch(bad):
    batches = [torch.randn(2, 3, 8) for _ in range(3)]
    batches[1][0, 0, 0] = bad
    _, run, site = run_to_the_second_site(*batches)
    for check in (hessian_of, refuse_infinite):
        with pytest.raises(
            CalibrationError, match=r"batches \[2\] bring NaN or Inf to 2.weight \(node relu\). Fix: drop"
        ):
            check(run, site)


def test_a_finite_diagonal_needs_no_look_at_the_inputs(monkeypatch):
    _, run, site = run_to_the_second_site(torch.randn(2, 3, 8))
    hessian = hessian_of(run, site)
    monkeypatch.setattr(run, "values_of", None)
    refuse_infinite(run, site, hessian)
