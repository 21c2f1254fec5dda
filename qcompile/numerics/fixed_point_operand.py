"""Weights and activations of fixed-point training: their clip, their codes, and the gradients that pass back.

    step s = c / L        q = clamp(round(x / s), l, L)        x ~ s q        L, l: the largest and smallest code

The clip c of a batch ("sigma") is three standard deviations; of values without a sign, which are taken for half of a
normal distribution, 3 std / sqrt(1 - 2 / pi). Source: arXiv:2407.12637 sec. 3.1 and the authors' code, where this is
the start of a learned clip. It is never below the root mean square, so that values far from zero are not all clipped.

The gradient for x is that of the identity inside the clip and zero outside (straight-through, arXiv:1308.3432; PACT,
arXiv:1805.06085); a learned clip gets q / L - x / c inside and q / L outside (LSQ, arXiv:1902.08153).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.numerics.code_rounding import value_codes
from qcompile.numerics.fixed_point_format import Ranges

_SIGMAS = 3.0
_HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # standard deviation of |z|, z of the standard normal distribution
_TINY = torch.finfo(torch.float32).tiny  # a smaller step is that of zeros
LEAST_CLIP = 1e-6  # where a learned clip starts whose values are all zeros: from zero it could not grow
MOMENTUM = 0.1  # of running ranges, as of the running statistics of batch norm


def batch_range(x: Tensor, ranges: Ranges, signed: bool) -> Tensor:
    """The clip of one batch (or weight) of values without state: "sigma" or "max", float32 []."""
    if not x.numel():
        return torch.ones((), dtype=torch.float32, device=x.device)
    wide = x if x.dtype == torch.float64 else x.float()
    if ranges == "max":
        return wide.abs().amax().float()
    flat = wide.reshape(-1)
    square = torch.dot(flat, flat) / flat.numel()  # six times as fast as torch.var_mean on a CPU (torch 2.13)
    sigma = _SIGMAS * (square - flat.mean().square()).clamp_min(0).sqrt() / (1.0 if signed else _HALF_NORMAL)
    return torch.maximum(sigma, square.sqrt()).float()


def step_of(clip: Tensor, levels: int) -> Tensor:
    """The step between two codes, float32 []; 1 where the clip is zero."""
    step = clip.float() / levels
    return torch.where(step < _TINY, torch.ones_like(step), step)


def operand_codes(x: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes of values.

    Args:
        x: floats of any shape.
        step: float32 [].
        low: the smallest code.
        high: the largest.

    Returns:
        int8 codes of the shape of x, and the step: NaN if there is a NaN in x, which no code shows.
    """
    wide = x if x.dtype == torch.float64 else x.float()  # kernels take float32, which holds halves exactly
    codes, lost = value_codes(wide.reshape(-1), step, low, high)
    return codes.view(x.shape), torch.where(lost, torch.full_like(step, math.nan), step)


def inside_clip(x: Tensor, clip: Tensor, signed: bool) -> Tensor:
    """Where the gradient passes, bool: values that are not clipped."""
    within = (x.abs() if signed else x) <= clip
    return within if signed else within & (x >= 0)


def clip_gradient(gradient: Tensor, x: Tensor, codes: Tensor, clip: Tensor, levels: int, signed: bool) -> Tensor:
    """The gradient of a learned clip.

    Args:
        gradient: of the dequantized values s q.
        x: what was quantized.
        codes: its codes.
        clip: [], positive.
        levels: the largest code.
        signed: whether codes go below zero.

    Returns:
        [].
    """
    ratio = torch.where(inside_clip(x, clip, signed) & (clip > 0), x / clip, torch.zeros_like(x))
    return (gradient * (codes.to(gradient.dtype) / levels - ratio)).sum()


def moved_range(running: Tensor, batch: Tensor) -> Tensor:
    """The next running range, float32 []: 0 is one that has not started; a batch that is not finite leaves it."""
    following = torch.where(running > 0, running + MOMENTUM * (batch - running), batch)
    return torch.where(torch.isfinite(batch), following, running)
