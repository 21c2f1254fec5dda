"""GPTQ: round column by column, and let the columns to come make up for each error.

Source: Frantar et al. 2022, arXiv:2210.17323 (algorithm 1, eq. 3); order by the Hessian's diagonal
        with static groups as in the authors' code (act_order, static_groups).
Law:    among codes on the same grid of scales and zeros, tr(E H E^T) with E = W - W^ and
        H = sum x x^T is not worse than round-to-nearest's: where it would be, nearest is kept. With
        H a multiple of the identity the result is round-to-nearest exactly. Blocks of columns change
        only the order of summation.
Needs:  the site's inputs, sequentially: upstream is already quantized (see qcompile/walk.py).
Leaves: what Quantize leaves. A Hessian that stays singular at a hundred times the damping falls
        back to round-to-nearest, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from qcompile.calibrate import CalibrationError, Statistics
from qcompile.formats import Format, QTensor
from qcompile.passes.quantize import BEFORE, Quantize, SitePlan, Wanted, put_codes, wanted_sites
from qcompile.program import Program
from qcompile.recipe import RecipeError, rewrites
from qcompile.report import PassReport
from qcompile.rounding import decode, encode, level_grid, quantize_tensor
from qcompile.sites import Site
from qcompile.walk import Walk


@dataclass(frozen=True)
class GPTQ(Quantize):
    """Quantize with GPTQ; formats, output and clip as for Quantize."""

    damping: float = 0.01  # of the mean diagonal, added to the diagonal
    order: bool = True  # columns by falling Hessian diagonal; groups stay where they are
    block: int = 128  # columns whose updates are done at once

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping <= 0 or self.block < 1:
            raise RecipeError(f"GPTQ: damping and block must be positive, got {self.damping} and {self.block}")


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of (H + damping mean(diag H) I)^-1, float64 [K, K]; None if singular."""
    h = hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    lower, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T for each row of E = W - W^, [N]."""
    error = (weight - rounded).double()
    return ((error @ hessian.double()) * error).sum(-1)


def gptq(weight: Tensor, hessian: Tensor, grid: QTensor, upper: Tensor, order: Tensor, block: int = 128) -> QTensor:
    """Codes on the scales and zeros of `grid` by GPTQ.

    Args:
        weight: [N, K]. hessian: [K, K]. grid: `weight` rounded to nearest.
        upper: inverse_factor of the Hessian with rows and columns in `order`.
        order: [K] the columns, first to round first. block: columns at a time.

    Returns:
        New codes, row by row not worse than the grid's own under the Hessian.
    """
    form = grid.format
    scale, zero, low, high = (None if t is None else t[:, order] for t in level_grid(grid))
    assert scale is not None
    wide = weight if weight.dtype == torch.float64 else weight.float()
    w, u = wide[:, order].clone(), upper.to(wide.dtype)
    codes = torch.empty_like(grid.codes)
    columns = w.shape[1]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part, factor = w[:, first:last].clone(), u[first:last, first:last]
        errors = torch.empty_like(part)
        for k in range(last - first):
            at = first + k
            s, z = scale[:, at], None if zero is None else zero[:, at]
            code = encode(part[:, k], s, z, form)
            if low is not None and high is not None:
                code = torch.minimum(torch.maximum(code, low[:, at]), high[:, at])
            errors[:, k] = (part[:, k] - decode(code, s, z)) / factor[k, k]
            part[:, k:].addr_(errors[:, k], factor[k, k:], alpha=-1)
            codes[:, order[at]] = code
        w[:, last:] -= errors @ u[first:last, last:]
    result = QTensor(codes, grid.scale, grid.zero, grid.group_scale, form)
    worse = loss(weight, result.dequantize(), hessian) > loss(weight, grid.dequantize(), hessian)
    codes[worse] = grid.codes[worse]
    return result


@rewrites(GPTQ, exact=False, needs=("hessian",), sitewise=True, after=BEFORE)
def gptq_sites(program: Program, how: GPTQ, seen: Statistics, plan: SitePlan) -> PassReport:
    """Quantize every wanted site, in the order of the graph, each on quantized upstream inputs."""
    report = PassReport("GPTQ")
    groups: dict[tuple[torch.fx.Node, Format], list[Wanted]] = {}
    for wanted in wanted_sites(program, how, plan, report):
        if wanted.weight == how.output != how.weight:  # the logits: the largest matrix, and 8 bits lose nothing
            q = quantize_tensor(program.weights[wanted.site.name], wanted.weight, clip=how.clip)
            put_codes(program, wanted, (q.stored(), q.scale, q.zero, q.group_scale), plan)
            report.done.append(wanted.site.name)
        else:
            groups.setdefault((wanted.site.input, wanted.weight), []).append(wanted)
    assert plan.batches is not None
    walk = Walk(program, plan.batches())
    if not walk.values:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    nearest: list[str] = []
    for (_, form), members in track(groups.items(), "GPTQ", disable=not plan.progress, transient=True):
        walk.advance(members[0].site.node)
        hessian, _ = hessian_of(walk, members[0].site)
        weights = torch.cat([program.weights[w.site.name].float() for w in members])
        results = _round(weights, hessian, form, how, [w.site.name for w in members], nearest)
        for wanted, q in zip(members, results.split([w.site.N for w in members]), strict=True):
            put_codes(program, wanted, (q.stored(), q.scale, q.zero, q.group_scale), plan)
            report.done.append(wanted.site.name)
    if nearest:
        report.notes.append(f"singular Hessian, rounded to nearest: {', '.join(nearest)}")
    return report


def gram(x: Tensor) -> Tensor:
    """x^T x [K, K] of x [T, K]; the blocks below the diagonal are copies, which saves a third."""
    columns = x.shape[1]
    if columns < 256:
        return x.t() @ x
    half = columns // 2
    left, right = x[:, :half], x[:, half:]
    corner = left.t() @ right
    return torch.cat([torch.cat([gram(left), corner], 1), torch.cat([corner.t(), gram(right)], 1)])


def hessian_of(walk: Walk, site: Site) -> tuple[Tensor, Tensor]:
    """Of a site's input over all batches: sum x x^T, float64 [K, K], and mean |x|, float64 [K].

    Raises:
        CalibrationError: NaN or Inf, with the batch and the site.
    """
    total, size, rows = torch.zeros(site.K, site.K, dtype=torch.float64), torch.zeros(site.K, dtype=torch.float64), 0
    for value in walk.see(site.input):
        x = value.flatten(0, -2).float()
        total += gram(x)
        size += x.abs().sum(0)
        rows += len(x)
    if not bool(torch.isfinite(total.diagonal()).all()):
        bad = [i + 1 for i, value in enumerate(walk.see(site.input)) if not bool(torch.isfinite(value).all())]
        raise CalibrationError(
            f"batches {bad} bring NaN or Inf to {site.name} (node {site.input.name}): "
            "drop them, or calibrate in float32"
        )
    return total, size / rows


def _round(weight: Tensor, hessian: Tensor, form: Format, how: GPTQ, names: list[str], nearest: list[str]) -> QTensor:
    grid = quantize_tensor(weight, form, clip=how.clip)
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0  # never seen: such a column is rounded to nearest by itself
    hessian[dead, dead] = hessian.diagonal().max().clamp_min(1)
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True) if how.order else torch.arange(len(diagonal))
    for harder in (1, 10, 100):
        upper = inverse_factor(hessian[order][:, order], how.damping * harder)
        if upper is not None:
            return gptq(weight, hessian, grid, upper, order, how.block)
    nearest += names
    return grid
