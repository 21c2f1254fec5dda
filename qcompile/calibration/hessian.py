"""Second moments of a site's input over all calibration batches: sum x x^T, float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.analysis.sites import Site
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.statistics import CalibrationError


class Gram:
    """Sums x^T x of rows x [T, K] in float64; blocks below the diagonal are copied in the end, a third less work."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sums = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add x^T x of x [T, K], float32 or float64."""
        _add_products(self.sums, rows)

    def whole(self) -> Tensor:
        """The sum, [K, K]: the same memory, so nothing can be added afterwards."""
        for first in range(0, len(self.sums), 256):
            block = slice(first, first + 256)
            self.sums[block, :first] = self.sums[:first, block].t()
            corner = self.sums[block, block]
            corner.copy_(corner.triu() + corner.triu(1).t())
        return self.sums


def _add_products(total: Tensor, x: Tensor) -> None:
    columns = x.shape[1]
    if columns < 256:
        total += x.t() @ x
        return
    half = columns // 2
    left, right = x[:, :half], x[:, half:]
    _add_products(total[:half, :half], left)
    total[:half, half:] += left.t() @ right
    _add_products(total[half:, half:], right)


def _many_rows(walk: LayerwiseRun, site: Site, least: int = 4096) -> Iterator[Tensor]:
    """A site's input as rows [T, K], batches put together: each sum x^T x costs a pass over [K, K] as well."""
    held: list[Tensor] = []
    for value in walk.see(site.input):
        held.append(value.flatten(0, -2).float())
        if sum(map(len, held)) >= least:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def hessian_of(walk: LayerwiseRun, site: Site) -> Tensor:
    """Of a site's input over all batches: sum x x^T, float64 [K, K].

    Raises:
        CalibrationError: NaN or Inf, with the batch and the site.
    """
    sums = Gram(site.K, walk.program.weights[site.name].device)
    for x in _many_rows(walk, site):
        sums.add(x)
    refuse_infinite(walk, site, sums.sums)
    return sums.whole()


def refuse_infinite(walk: LayerwiseRun, site: Site, hessian: Tensor | None = None) -> None:
    """Raises CalibrationError, with batches and site, where inputs hold NaN or Inf; their Hessian shows it sooner."""
    if hessian is not None and bool(torch.isfinite(hessian.diagonal()).all()):
        return
    bad = [i + 1 for i, value in enumerate(walk.see(site.input)) if not bool(torch.isfinite(value).all())]
    if bad or hessian is not None:
        raise CalibrationError(
            f"batches {bad} bring NaN or Inf to {site.name} (node {site.input.name}): "
            "drop them, or calibrate in float32"
        )
