"""HQQ: data-free zero points that shrink a robust error, found in closed form.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (blog),
        and the authors' code for its constants.
Law:    with scales fixed, alternate E = shrink(W - W^) (the proximal step of |e|^p, p < 1) and
        z = mean over the group of q - (W - E) / s. For each group the zero points with the least
        sum |W - W^| on the way are kept, so no group is worse than round-to-nearest.
        Zero points are not rounded: the format is "floatzero".
Needs:  nothing.
Skips:  what Quantize skips.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.memory.stored_tensor import loaded
from qcompile.numerics.format import Format
from qcompile.numerics.qparams import storable_zero
from qcompile.numerics.qtensor import QTensor, group_columns, ungroup_columns
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.insert_qdq import matrix_of, put_codes
from qcompile.passes.qdq.site_plan import PlannedSite, Quantize, planned_sites
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError
from qcompile.recipe.solved_sites import SolvedSites, solve_each


@dataclass(frozen=True)
class HQQ(Quantize):
    """Quantize with HQQ's zero points; lm_head and clip as for Quantize."""

    # A format of groups with float zero points. The authors' 4 bits in groups of 64.
    weight: Format = Format("int4", "group", 64, "float")
    # Format of activations; None: they stay float, as in the paper.
    act: Format | None = None
    # The paper's p of the robust norm |e|^p, between 0 and 1: the smaller, the less outliers matter. The code's 0.7.
    norm: float = 0.7
    # The paper's beta, weight of the splitting; the code's first value, kept constant.
    beta: float = 10.0
    # Alternations at most; it stops where no group gets better. The code's 20.
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _moves_zero_points(self.weight):
            raise RecipeError(
                f"HQQ finds float zero points for groups, and the format is {self.weight}. Fix: int4/group64/floatzero"
            )
        if not 0 < self.norm < 1 or self.beta <= 0 or self.steps < 1:
            raise RecipeError(
                f"HQQ: 0 < norm < 1, beta > 0 and steps >= 1 are needed, got {self.norm}, {self.beta} and {self.steps}"
            )


def _moves_zero_points(form: Format) -> bool:
    """Whether a format stores a float zero point for each group."""
    return form.zero == "float" and form.per == "group" and not form.two_level


def shrink(error: Tensor, norm: float, beta: float) -> Tensor:
    """The proximal step of |e|^p: sign(e) max(0, |e| - |e|^(p - 1) / beta)."""
    size = error.abs()
    return error.sign() * (size - size.clamp_min(1e-8).pow(norm - 1) / beta).clamp_min(0)


def best_zero(target: Tensor, codes: Tensor, scale: Tensor, inside: Tensor) -> Tensor:
    """The z of each group that minimizes sum (target - s (q - z))^2: the mean of q - target / s.

    Args:
        target: [N, groups, G], what should be met.
        codes: q, [N, groups, G].
        scale: s, [N, groups, 1].
        inside: [N, groups, G], 1 where a column exists, else 0.

    Returns:
        [N, groups, 1].
    """
    return ((codes - target / scale) * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)


def hqq(weight: Tensor, grid: QTensor, *, norm: float = 0.7, beta: float = 10.0, steps: int = 20) -> QTensor:
    """Better zero points, and the codes that go with them.

    Args:
        weight: [N, K], the paper's W.
        grid: `weight` rounded to nearest, with float zero points.
        norm: p of |e|^p.
        beta: weight of the splitting.
        steps: alternations at most.
    """
    form, columns = grid.format, weight.shape[1]
    assert grid.zero is not None
    w = group_columns(weight.float(), form)  # [N, groups, G]
    inside = group_columns(torch.ones_like(weight, dtype=torch.float32), form)  # a ragged end does not count
    s, z = grid.scale.float()[..., None], grid.zero[..., None].clone()

    def rounded(zero: Tensor) -> Tensor:
        return (w / s + zero).round_().clamp_(form.qmin, form.qmax)

    def size(error: Tensor) -> Tensor:
        return (error.abs() * inside).sum(-1, keepdim=True)

    codes = rounded(z)
    kept_zero, kept_codes, best = z.clone(), codes, size(w - (codes - z) * s)
    for _ in range(steps):
        error = shrink(w - (codes - z) * s, norm, beta)
        z = storable_zero(best_zero(w - error, codes, s, inside), s, form)
        codes = rounded(z)
        now = size(w - (codes - z) * s)
        better = now < best
        if not bool(better.any()):
            break
        kept_zero, best = torch.where(better, z, kept_zero), torch.where(better, now, best)
        kept_codes = torch.where(better, codes, kept_codes)
    codes = ungroup_columns(kept_codes, columns).to(torch.uint8).contiguous()
    return QTensor(codes, grid.scale, kept_zero.squeeze(-1), None, form)


@rewrites(HQQ, Stage.QUANTIZE, exact=False)
def hqq_sites(program: Program, config: HQQ, context: PassContext) -> PassReport:
    """Quantize every planned site, in place; sites in another format are rounded to nearest."""
    report = PassReport("HQQ")
    sites = planned_sites(config, context, report)
    plain = [planned.site.name for planned in sites if not _moves_zero_points(planned.weight)]
    work = [([planned.site.name], functools.partial(_solve, program, planned, config)) for planned in sites]
    for planned, solved in zip(sites, solve_each(context.finished, work), strict=True):
        put_codes(program, planned, solved.parts[0], context)
        report.done.append(planned.site.name)
    if plain:
        report.notes.append(f"rounded to nearest, their format has no float zero points in groups: {', '.join(plain)}")
    return report


def _solve(program: Program, planned: PlannedSite, config: HQQ) -> SolvedSites:
    weight = loaded(matrix_of(program, planned.site))
    q = quantize_tensor(weight, planned.weight, clip=config.clip)
    if _moves_zero_points(planned.weight):
        q = hqq(weight, q, norm=config.norm, beta=config.beta, steps=config.steps)
    return SolvedSites([q.stored_parts])
