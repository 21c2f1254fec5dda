"""Second moments of a site's input over all tokens of the calibration batches: sum x x^T, float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.analysis.sites import Site
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.ranks import Ranks
from qcompile.calibration.statistics import CalibrationError

_BLOCK = 256  # columns of one product; blocks below the diagonal are copied


class Gram:
    """Sums x^T x of rows x [T, K] in float64.

    Only blocks on and above the diagonal are computed, a third less work; `whole` copies the others.

    Attributes:
        sums: [K, K]; below the diagonal only `whole` fills it.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sums = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add x^T x of x [T, K], float32 or float64."""
        _add_products(self.sums, rows)

    def whole(self) -> Tensor:
        """The sum, [K, K]: the same memory, so nothing can be added afterwards."""
        for first in range(0, len(self.sums), _BLOCK):
            block = slice(first, first + _BLOCK)
            self.sums[block, :first] = self.sums[:first, block].t()
            corner = self.sums[block, block]
            corner.copy_(corner.triu() + corner.triu(1).t())
        return self.sums


def _add_products(total: Tensor, x: Tensor) -> None:
    columns = x.shape[1]
    if columns < _BLOCK:
        total += x.t() @ x
        return
    half = columns // 2
    left, right = x[:, :half], x[:, half:]
    _add_products(total[:half, :half], left)
    total[:half, half:] += left.t() @ right
    _add_products(total[half:, half:], right)


def _joined_rows(run: LayerwiseRun, site: Site) -> Iterator[Tensor]:
    """A site's input as rows [T, K], block by block."""
    rows = run.rows_of(site.input)
    for size in run.blocks:
        yield torch.cat([batch.float() for batch in itertools.islice(rows, size)])


def hessian_of(run: LayerwiseRun, site: Site, ranks: Ranks = Ranks()) -> Tensor:  # noqa: B008  it is frozen
    """The Hessian of a site: sum x x^T of its input over all tokens of all batches.

    Args:
        run: stopped at the site.
        site: a linear site.
        ranks: the processes over whose tokens it is summed.

    Returns:
        [K, K] float64.

    Raises:
        CalibrationError: NaN or Inf, with the batch and the site.
    """
    sums = Gram(site.K, run.program.weights[site.name].device)
    for x in _joined_rows(run, site):
        sums.add(x)
    ranks.add(sums.sums)
    refuse_infinite(run, site, sums.sums)
    return sums.whole()


def refuse_infinite(run: LayerwiseRun, site: Site, hessian: Tensor | None = None) -> None:
    """Refuse inputs of a site that hold NaN or Inf at tokens.

    Args:
        run: stopped at the site.
        site: whose input is checked.
        hessian: of that input, if it is known: a look at its diagonal costs less than one at all batches.

    Raises:
        CalibrationError: with the batches and the site.
    """
    if hessian is not None and bool(torch.isfinite(hessian.diagonal()).all()):
        return
    bad = [i for i, rows in enumerate(run.rows_of(site.input), 1) if not bool(torch.isfinite(rows).all())]
    if bad or hessian is not None:
        raise CalibrationError(
            f"batches {bad} bring NaN or Inf to {site.name} (node {site.input.name}). "
            "Fix: drop them, or calibrate in float32"
        )
