"""Clip search: shrinking the range of each group to the one of least error.

Source: GPTQ's `mse=True` (arXiv:2210.17323, reference code): 2.4th powers, ranges of 100 .. 80 percent.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.qparams import choose_qparams, fake_quantize

SHRINKS = range(21)  # percent taken away from a group's range
_CHUNK = 2**18  # values searched at once: what fits into the cache of a core


def search_clip(groups: Tensor, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """For each group the shrink in 1.00, 0.99 .. 0.80 of its range with the least error.

    A symmetric integer format has one code more below zero than above. Each shrink is also tried with the extreme
    on that code, which makes the scale negative where the extreme is positive (as Q4_0 of GGUF does).

    Args:
        groups: float32 [.., groups, width].
        low: the ranges, [.., groups].
        high: the ranges, [.., groups].
        format: the format.

    Returns:
        The clipped ranges; low > high says that the scale is negative.
    """
    extra_negative_code = format.zero == "none" and not format.is_float and format.bits < 8
    rows = groups.flatten(0, -3) if groups.ndim > 2 else groups[None]
    lows, highs = low.reshape(rows.shape[:-1]).clone(), high.reshape(rows.shape[:-1]).clone()
    chunk = max(1, _CHUNK // max(1, rows[0].numel()))
    for start in range(0, rows.shape[0], chunk):
        values = rows[start : start + chunk]
        full_low, full_high = lows[start : start + chunk].clone(), highs[start : start + chunk].clone()
        ranges = [(full_low, full_high)]
        if extra_negative_code:
            extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))[..., 0] * format.qmax / format.qmin
            ranges.append((-extreme, extreme))
        best = torch.full_like(full_low, torch.inf)
        for shrink, (bottom, top) in itertools.product(SHRINKS, ranges):
            clipped_low, clipped_high = bottom * (1 - shrink / 100), top * (1 - shrink / 100)
            scale, zero = choose_qparams(clipped_low, clipped_high, format)
            rounded = fake_quantize(values, scale[..., None], None if zero is None else zero[..., None], format)
            error = clip_error(rounded.sub_(values))
            better = error < best
            best = torch.where(better, error, best)
            lows[start : start + chunk][better] = clipped_low[better]
            highs[start : start + chunk][better] = clipped_high[better]
    return lows.reshape(low.shape), highs.reshape(high.shape)


def clip_error(error: Tensor) -> Tensor:
    """sum |e|^2.4 over the last dimension, in place; by exp and log, which are much faster than pow."""
    return error.abs_().log_().mul_(2.4).exp_().sum(-1)
