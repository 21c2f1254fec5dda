"""Quantizing to k6 formats: int4 in groups of 32 whose scales have six bits under two float16 of 256 columns.

    w ~ d sc q - dmin m        q 0 .. 15 of a weight, sc 1 .. 63 and m 0 .. 63 of a group, d and dmin of 256 columns

To nearest, a group's step s and offset o cover its range, and zero; d is a sixty-third of the largest s, dmin of the
largest o. The search minimizes sum v e^2, v being the importance of a column:

    1. s and o of each group by least squares on the codes of several first steps, the best of them
    2. d and dmin of the 256 columns by least squares on codes and six-bit multipliers, rounded to float16
    3. sc and m of each group: the best of the nine pairs of neighbors; 2 and 3 repeated

The best of all grids on the path is kept, the one to nearest among them: the search never loses to it.

Source of the format: Q4_K of GGUF, as the package gguf 0.19 reads it (gguf/quants.py). The search is ours.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from qcompile.numerics.format import K_BLOCK, K_GROUP, Format
from qcompile.numerics.qtensor import QTensor

MAX_MULTIPLIER = 63  # of sc and m
_MAX_CODE = 15
_TINY = 2.0**-24  # the smallest positive float16
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range that first steps cover
_SWEEPS = 3
_CHUNK = 2**18  # values searched at once: what fits into the cache of a core
_LEAST_IMPORTANCE = 1e-6  # of a column whose input is always zero, beside a mean of one


class Grid(NamedTuple):
    """Scales of rows.

    Attributes:
        d: [R, B, 1], values of float16, positive.
        dmin: [R, B, 1], values of float16, not negative.
        multiplier: sc, [R, B, 8] float of integers.
        minimum: m, [R, B, 8] float of integers.
    """

    d: Tensor
    dmin: Tensor
    multiplier: Tensor
    minimum: Tensor

    def steps(self) -> tuple[Tensor, Tensor]:
        """s and o of each group, [R, B, 8, 1]."""
        return (self.d * self.multiplier)[..., None], (self.dmin * self.minimum)[..., None]


def quantize_k6(x: Tensor, format: Format, search: bool, importance: Tensor | None = None) -> QTensor:
    """Quantize float32 values [.., K].

    Args:
        x: the values; K is a multiple of 256.
        format: int4/group32/k6.
        search: find the grid of least error, instead of the one that covers every range.
        importance: [K] v of each column, not negative; None: all alike.

    Raises:
        ValueError: another K, or a scale beyond float16.
    """
    columns = x.shape[-1]
    if columns % K_BLOCK:
        raise ValueError(
            f"the tensor has {columns} columns, and {format} is in blocks of {K_BLOCK}. "
            "Fix: use int4/group32/floatzero/f16, whose blocks have 32"
        )
    rows = torch.unflatten(x.reshape(-1, columns), -1, (-1, K_BLOCK // K_GROUP, K_GROUP))
    weight = _weights(importance, rows)
    parts = [_quantize_rows(part, format, search, weight) for part in rows.split(max(1, _CHUNK // columns))]
    codes, scale, minimum, multiplier = (torch.cat(part) for part in zip(*parts, strict=True))
    groups = (*x.shape[:-1], columns // K_GROUP)
    return QTensor(
        codes.reshape(x.shape),
        scale.reshape(*x.shape[:-1], -1),
        minimum.reshape(groups),
        multiplier.reshape(groups),
        format,
    )


def check_k6_range(x: Tensor, format: Format) -> None:
    """Refuse float32 values [.., K] whose grid to nearest is beyond float16. Raises ValueError."""
    if x.numel():
        groups = torch.unflatten(x.reshape(-1, x.shape[-1]), -1, (-1, K_BLOCK // K_GROUP, K_GROUP))
        _rounded(*_covering(groups), format)


def _covering(x: Tensor) -> tuple[Tensor, Tensor]:
    """The step and offset of each group that cover its range and zero, [R, B, 8]."""
    low = x.amin(-1).clamp_max(0)
    return (torch.maximum(x.amax(-1), low) - low) / _MAX_CODE, -low


def _weights(importance: Tensor | None, rows: Tensor) -> Tensor:
    """v of each column, [B, 8, 32], with a mean of one."""
    if importance is None:
        return rows.new_ones(rows.shape[1:])
    wide = importance.double()
    mean = wide.mean()
    even = wide / mean if bool(mean > 0) else torch.ones_like(wide)
    return even.clamp_min(_LEAST_IMPORTANCE).float().reshape(rows.shape[1:])


def _quantize_rows(x: Tensor, format: Format, search: bool, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, (d, dmin), m and sc of rows [R, B, 8, 32]."""
    step, offset = _covering(x)
    grid = _rounded(step, offset, format)
    if search:
        grid = _searched(x, weight, grid, _rounded(*_fitted_groups(x, weight, step, offset), format), format)
    codes = _nearest(x, *grid.steps()).to(torch.uint8)
    scale = torch.cat([grid.d, grid.dmin], -1).half()
    return codes, scale, grid.minimum.to(torch.uint8), grid.multiplier.to(torch.int8)


def _nearest(x: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    return ((x + offset) / step).round_().clamp_(0, _MAX_CODE)


def _errors(x: Tensor, weight: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """sum v e^2 of each group with the nearest codes, [R, B, 8]."""
    return (_nearest(x, step, offset) * step).sub_(offset).sub_(x).square_().mul_(weight).sum(-1)


def _rounded(step: Tensor, offset: Tensor, format: Format) -> Grid:
    """Steps and offsets of groups [R, B, 8] as a grid."""
    largest, lowest = step.amax(-1, keepdim=True), offset.amax(-1, keepdim=True)
    d = _half(torch.where(largest > 0, largest / MAX_MULTIPLIER, 1.0), format, _TINY)
    dmin = _half(lowest / MAX_MULTIPLIER, format, 0.0)
    minimum = (offset / torch.where(dmin > 0, dmin, 1.0)).round_().clamp_(0, MAX_MULTIPLIER)
    return Grid(d, dmin, (step / d).round_().clamp_(1, MAX_MULTIPLIER), minimum)


def _half(value: Tensor, format: Format, least: float) -> Tensor:
    """Values of float16, in float32. Raises ValueError beyond its end."""
    found = value.half().float().clamp_min(least)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"a scale of {float(value.max()):.3g} of format {format} is beyond float16, which ends at 65504. "
            "Fix: keep the weight float, or scale it down"
        )
    return found


def _fitted_groups(x: Tensor, weight: Tensor, step: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The best step and offset of each group by itself, [R, B, 8]."""
    step = torch.where(step > 0, step, _TINY)
    best, best_step, best_offset = _errors(x, weight, step[..., None], offset[..., None]), step, offset
    for share in _SHARES:
        sums = _sums(x, weight, _nearest(x, share * step[..., None], share * offset[..., None]))
        new_step, new_offset = _line(*sums)
        new_step = torch.where(new_step > 0, new_step, step)
        error = _errors(x, weight, new_step[..., None], new_offset[..., None])
        better = error < best
        best = torch.where(better, error, best)
        best_step = torch.where(better, new_step, best_step)
        best_offset = torch.where(better, new_offset, best_offset)
    return best_step, best_offset


def _sums(x: Tensor, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums of v q^2, v q, v, v x q and v x of each group."""
    weighted = codes * weight
    return (
        (weighted * codes).sum(-1),
        weighted.sum(-1),
        weight.sum(-1).expand(x.shape[:-1]),
        (weighted * x).sum(-1),
        (x * weight).sum(-1),
    )


def _line(qq: Tensor, q: Tensor, one: Tensor, xq: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The s and o >= 0 of least sum v (x - s q + o)^2; s is 0 where codes do not tell."""
    determinant = qq * one - q * q
    spread = determinant > 1e-6 * qq * one
    step = torch.where(spread, (one * xq - q * x) / torch.where(spread, determinant, 1.0), 0.0)
    offset = (step * q - x) / one
    alone = xq / torch.where(qq > 0, qq, 1.0)
    positive = offset >= 0
    return torch.where(positive, step, alone), torch.where(positive, offset, 0.0)


def _searched(x: Tensor, weight: Tensor, plain: Grid, grid: Grid, format: Format) -> Grid:
    """The best grid on the way from `grid`, or `plain` where none is better; block by block."""
    best, kept = _block_errors(x, weight, plain), plain
    for sweep in range(_SWEEPS + 1):
        if sweep:
            grid = _best_neighbors(x, weight, _fitted_blocks(x, weight, grid, format))
        error = _block_errors(x, weight, grid)
        better = error < best
        best = torch.where(better, error, best)
        kept = Grid(*(torch.where(better, new, old) for new, old in zip(grid, kept, strict=True)))
    return kept


def _block_errors(x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """[R, B, 1]."""
    return _errors(x, weight, *grid.steps()).sum(-1, keepdim=True)


def _fitted_blocks(x: Tensor, weight: Tensor, grid: Grid, format: Format) -> Grid:
    """The d and dmin of least error for the codes and multipliers at hand."""
    sc, m = grid.multiplier, grid.minimum
    qq, q, one, xq, xs = _sums(x, weight, _nearest(x, *grid.steps()))
    terms = (sc * sc * qq, sc * m * q, m * m * one, sc * xq, m * xs)
    aa, am, mm, xa, xm = (term.sum(-1, keepdim=True) for term in terms)
    determinant = aa * mm - am * am
    spread = determinant > 1e-6 * aa * mm
    alone = torch.where(aa > 0, (xa + grid.dmin * am) / torch.where(aa > 0, aa, 1.0), grid.d)  # beside the dmin at hand
    d = torch.where(spread, (xa * mm - am * xm) / torch.where(spread, determinant, 1.0), alone)
    dmin = torch.where(spread, (d * am - xm) / torch.where(spread, mm, 1.0), grid.dmin)
    fits = (d > 0) & (dmin >= 0)
    d, dmin = _half(torch.where(fits, d, grid.d), format, _TINY), _half(torch.where(fits, dmin, grid.dmin), format, 0.0)
    return Grid(d, dmin, sc, m)


def _best_neighbors(x: Tensor, weight: Tensor, grid: Grid) -> Grid:
    """Each group's best pair of sc and m, of those that differ from its own by one at most."""
    best = torch.full_like(grid.multiplier, torch.inf)
    multiplier, minimum = grid.multiplier, grid.minimum
    for more, lower in itertools.product((0, -1, 1), repeat=2):
        sc = (grid.multiplier + more).clamp(1, MAX_MULTIPLIER)
        m = (grid.minimum + lower).clamp(0, MAX_MULTIPLIER)
        error = _errors(x, weight, *grid._replace(multiplier=sc, minimum=m).steps())
        better = error < best
        best = torch.where(better, error, best)
        multiplier, minimum = torch.where(better, sc, multiplier), torch.where(better, m, minimum)
    return grid._replace(multiplier=multiplier, minimum=minimum)
