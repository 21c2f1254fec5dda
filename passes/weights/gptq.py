"""GPTQ: round column by column, and let the columns to come make up for each error.

Source: Frantar et al. 2022, arXiv:2210.17323 (algorithm 1, eq. 3); order by the Hessian's diagonal
        with static groups as in the authors' code (act_order, static_groups).
Law:    among codes on the same grid of scales and zero points, tr(E H E^T) with E = W - W^ and
        H = sum x x^T is not worse than round-to-nearest's: where it would be, nearest is kept. With
        H a multiple of the identity the result is round-to-nearest exactly. Blocks of columns change
        only the order of summation.
Needs:  the site's inputs, sequentially: upstream is already quantized (see qcompile/calibration/layerwise_run.py).
Skips:  what Quantize skips. A Hessian that stays singular at a hundred times the damping falls
        back to round-to-nearest, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.qparams import expand_qparams, fake_quantize, quantize_with_qparams
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.passes.weights.choice import Choice
from qcompile.passes.weights.sequential import quantize_sequentially
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError

_ELEMENTS, _LEAST_ROWS = 1 << 22, 1024
"""Values of a weight at once, and the fewest rows: each row is solved by itself, and all may not fit in memory."""


@dataclass(frozen=True)
class GPTQ(Quantize):
    """Quantize with GPTQ; formats, lm_head and clip as for Quantize. Names are those of the authors' code."""

    # Damping: this share of the Hessian's mean diagonal is added to its diagonal. The code's 0.01.
    damp_percent: float = 0.01
    # Round columns by falling Hessian diagonal instead of left to right; groups stay where they are.
    act_order: bool = True
    # Columns whose updates of the columns behind them are done at once. Changes speed, no codes.
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp_percent <= 0 or self.block_size < 1:
            raise RecipeError(
                f"GPTQ: damp_percent and block_size must be positive, got {self.damp_percent} and {self.block_size}"
            )


def inverse_factor(
    hessian: Tensor, damp_percent: float, order: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor | None:
    """Upper Cholesky factor of (H + damp_percent mean(diag H) I)^-1, [K, K]; None if singular.

    Args:
        hessian: H, symmetric [K, K].
        damp_percent: damping.
        order: of rows and columns; None: as they are.
        dtype: of the factor; it is computed in float64.
    """
    columns = torch.arange(len(hessian), device=hessian.device) if order is None else order
    # Flipped in both dimensions, H = R R^T with R upper triangular: R^-1 is the factor, no inverse is factored again.
    flipped = columns.flip(0)
    lower = hessian.double()[flipped.unsqueeze(1), flipped].t()  # of a symmetric matrix, as LAPACK works in place
    lower.diagonal().add_(damp_percent * hessian.diagonal().double().mean())
    failed = torch.empty((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed):
        return None
    invert_triangle(lower)
    if not all(bool(torch.isfinite(columns).all()) for columns in lower.t().split(256)):
        return None
    rounded = lower.to(dtype)
    del lower  # two matrices [K, K] at a time, beside the Hessian
    return rounded.flip(0, 1)


def invert_triangle(lower: Tensor) -> None:
    """Replace a lower triangular matrix [K, K] by its inverse, by halves: a third of the arithmetic of solving."""
    size = len(lower)
    if size <= 128:
        one = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
        return
    half = size // 2
    first, corner, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_triangle(first)
    invert_triangle(last)
    corner.addmm_(last, corner @ first, beta=0, alpha=-1)


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T for each row of E = W - W^, [N]."""
    error = (weight - rounded).double()
    return ((error @ hessian.double()) * error).sum(-1)


def gain(weight: Tensor, old: Tensor, new: Tensor, hessian: Tensor) -> Tensor:
    """loss(weight, old) - loss(weight, new) for each row, [N]: a H a - b H b = (a - b) H (a + b), one product."""
    found = []
    for w, a, b in zip(*(t.split(256) for t in (weight, old, new)), strict=True):
        both = (w - a).double() + (w - b).double()
        found.append((((b - a).double() @ hessian.double()) * both).sum(-1))
    return torch.cat(found)


def gptq(
    weight: Tensor, hessian: Tensor, grid: QTensor, upper: Tensor, order: Tensor, block_size: int = 128
) -> QTensor:
    """Codes on the scales and zero points of `grid` by GPTQ (the paper's algorithm 1).

    Args:
        weight: [N, K], the paper's W.
        hessian: [K, K], the paper's H = sum x x^T, float64.
        grid: `weight` rounded to nearest.
        upper: inverse_factor of the Hessian in `order`.
        order: [K] the columns, first to round first.
        block_size: columns at a time.

    Returns:
        New codes, row by row not worse than the grid's own under the Hessian.
    """
    form = grid.format
    # Transposed, so that the values of a column lie side by side.
    scale, zero, low, high = (None if t is None else t.t()[order].contiguous() for t in expand_qparams(grid))
    assert scale is not None

    def at(t: Tensor | None, where: int | slice) -> Tensor | None:
        return None if t is None else t[where]

    wide = weight.float()
    w, u = wide.t()[order].contiguous(), upper.to(wide.dtype)
    found = torch.empty(w.shape, dtype=grid.codes.dtype, device=w.device)
    columns = len(w)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        part, factor = w[first:last], u[first:last, first:last]
        rounded, errors = torch.empty_like(part), torch.empty_like(part)
        for k, diagonal in enumerate(factor.diagonal().tolist()):
            c = first + k
            rounded[k] = fake_quantize(part[k], scale[c], at(zero, c), form, at(low, c), at(high, c))
            torch.sub(part[k], rounded[k], out=errors[k]).div_(diagonal)
            part[k + 1 :].addr_(factor[k, k + 1 :], errors[k], alpha=-1)
        found[first:last] = quantize_with_qparams(rounded, scale[first:last], at(zero, slice(first, last)), form)
        w[last:].addmm_(u[first:last, last:].t(), errors, alpha=-1)
    codes = torch.empty_like(grid.codes)
    codes[:, order] = found.t()
    result = QTensor(codes, grid.scale, grid.zero, grid.group_scale, form)
    worse = gain(wide, grid.dequantize(), result.dequantize(), hessian) < 0
    codes[worse] = grid.codes[worse]
    return result


def rows_at_once(columns: int) -> int:
    """The rows of a weight [N, columns] that are solved together."""
    return max(_LEAST_ROWS, _ELEMENTS // columns)


@rewrites(GPTQ, Stage.QUANTIZE, exact=False, needs=("batches",))
def gptq_sites(program: Program, config: GPTQ, context: PassContext) -> PassReport:
    """Quantize every planned site, in the order of the graph, each on quantized upstream inputs."""

    def choose(weight: Tensor, hessian: Tensor, form: Format) -> Choice:
        return compensate(weight, hessian, grid_of(weight, hessian, form, config), config)

    return quantize_sequentially(program, config, context, PassReport("GPTQ"), choose)


def grid_of(weight: Tensor, hessian: Tensor, form: Format, config: GPTQ) -> QTensor:
    """The weight rounded to nearest; of k6 on the grid of least loss for the inputs.

    What rounding a column costs, once the others have made up for it, is e^2 / [H^-1]_kk (Optimal Brain Quantizer,
    arXiv:2208.11580): the importance of the column.
    """
    upper = inverse_factor(hessian, config.damp_percent) if form.k6 and config.clip else None
    importance = None if upper is None else upper.square().sum(0).reciprocal()
    return quantize_tensor(weight, form, clip=config.clip, importance=importance)


def compensate(weight: Tensor, hessian: Tensor, grid: QTensor, config: GPTQ) -> Choice:
    """GPTQ on the scales of `grid`, with more damping where needed; the grid itself if none helps."""
    dead = hessian.diagonal() == 0  # an input that is always 0: its column is rounded to nearest by itself
    if bool(dead.any()):
        hessian = hessian.clone()
        hessian[dead, dead] = hessian.diagonal().max().clamp_min(1)
    diagonal = hessian.diagonal()
    order = (
        diagonal.argsort(descending=True) if config.act_order else torch.arange(len(diagonal), device=diagonal.device)
    )
    for harder in (1, 10, 100):
        upper = inverse_factor(hessian, config.damp_percent * harder, order, weight.dtype)
        if upper is not None:
            sizes = [len(rows) for rows in weight.split(rows_at_once(len(order)))]
            parts = zip(weight.split(sizes), grid.split(sizes), strict=True)
            found = [gptq(rows, hessian, of_rows, upper, order, config.block_size).codes for rows, of_rows in parts]
            codes = QTensor(torch.cat(found), grid.scale, grid.zero, grid.group_scale, grid.format)
            return Choice(codes)
    return Choice(grid, fell_back=True)
