"""Round a gradient to few bits: the clip c = gamma max|G| of the interval, the codes, and how gamma moves.

Source: arXiv:2407.12637 sec. 3, and the authors' code (cvlab-yonsei/LBT @84ab71a). With b bits, L = 2^(b-1) - 1:

    step = gamma max|G| / L        q = round(clamp(G / step, -L, L)), stochastically
    R = mean(|G| > gamma max|G|)   of the unrounded G, with the gamma that rounded it
    gamma <- clamp(gamma + beta sign(R - alpha / (2^b - 1)), 0.001, 1)

The first gamma is the fixed point of that step for the first gradient: its quantile. The authors walk there from 1
by beta without training meanwhile, which ends at the same place. Other intervals:

    quantile       that fixed point, for each gradient anew; no state
    max            gamma = 1: the range is that of the largest gradient
    least_error    the gamma of 1/20 .. 1 with the least squared error, searched on 4096 gradients
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.code_rounding import gradient_codes
from qcompile.numerics.counter_random import derived_stream
from qcompile.numerics.fixed_point_format import FixedPointFormat

MIN_GAMMA = 1e-3
_CANDIDATES = 20
_SAMPLES = 4096
_TINY = torch.finfo(torch.float32).tiny  # a smaller step rounds gradients that are zeros


def quantize_gradient(
    gradient: Tensor, gamma: Tensor, counter: Tensor, format: FixedPointFormat, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a gradient.

    Args:
        gradient: of the output of a site, any float dtype and shape.
        gamma: float32 []; 0: not started.
        counter: int64 []; of the draws so far.
        format: of the site.
        stream: of the random values.

    Returns:
        Codes int8 of the same shape within -L .. L, the step float32 [] and the next gamma float32 []. Where the
        gradient is not finite the step is not finite either and gamma stays; where it is all zeros too.
    """
    flat = gradient.detach().reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    if not flat.numel():
        return gradient.to(torch.int8), torch.ones_like(gamma), gamma.clone()
    levels = format.gradient_levels
    lowest, highest = flat.aminmax()
    top = torch.maximum(-lowest, highest)
    used = interval_of(flat, top, gamma, format)
    limit = used.to(top.dtype) * top
    step = limit / levels
    step = torch.where(step < _TINY, torch.ones_like(step), step)
    draw = derived_stream(stream, counter) if format.rounding == "stochastic" else None
    codes, beyond = gradient_codes(flat, step, limit, levels, draw)
    following = used
    if format.interval == "paper":
        following = moved_gamma(used, beyond / flat.numel(), format)
    following = torch.where(torch.isfinite(top) & (top > 0), following, gamma)
    return codes.view(gradient.shape), step.float(), following


def interval_of(flat: Tensor, top: Tensor, gamma: Tensor, format: FixedPointFormat) -> Tensor:
    """The gamma that a gradient is rounded with, float32 [].

    Args:
        flat: the gradient, float32 or float64 [N].
        top: its largest magnitude.
        gamma: of the steps before; 0: not started.
        format: of the site.
    """
    if format.interval == "max":
        return torch.ones_like(gamma)
    if format.interval == "least_error":
        return least_error_gamma(flat, top, format.gradient_levels)
    if format.interval == "quantile" or not bool(gamma > 0):
        return quantile_gamma(flat, top, format.share)
    return gamma


def quantile_gamma(flat: Tensor, top: Tensor, share: float) -> Tensor:
    """The gamma beyond which a share of the gradients [N] lies, up to 1/N: where the paper's step changes its sign."""
    beyond = min(flat.numel(), max(1, round(flat.numel() * share)))
    limit = flat.abs().topk(beyond).values[-1]
    return _within((limit / top).float())


def least_error_gamma(flat: Tensor, top: Tensor, levels: int) -> Tensor:
    """The gamma of 1/20 .. 1 with the least sum of squared errors of rounding to nearest, on a sample of [N]."""
    sample = flat[:: max(1, flat.numel() // _SAMPLES)]
    gammas = torch.arange(1, _CANDIDATES + 1, dtype=sample.dtype, device=sample.device) / _CANDIDATES
    steps = (gammas * top / levels)[:, None]
    rounded = (sample / steps).round().clamp(-levels, levels) * steps
    return _within(gammas[(rounded - sample).square().sum(1).argmin()].float())


def moved_gamma(gamma: Tensor, ratio: Tensor, format: FixedPointFormat) -> Tensor:
    """The next gamma: a step of beta towards the share of gradients beyond the clip that the paper asks for."""
    return (gamma + format.beta * torch.sign(ratio - format.share)).clamp(MIN_GAMMA, 1.0)


def _within(gamma: Tensor) -> Tensor:
    return gamma.nan_to_num(1.0).clamp(MIN_GAMMA, 1.0)
