"""The four-bit float e2m1, and power-of-two group scales.

    code   0    1    2    3    4    5    6    7          bit 3 is the sign
    value  0   .5    1  1.5    2    3    4    6

Source: ZeroQuant-FP, arXiv:2307.09782 sec. 3 (e2m1 weights beside e4m3 activations; M1, M2).
An e2m1 value times 2^k is exactly an e4m3 value for -8 <= k <= 6, so scales that differ by powers of
two let a kernel convert e2m1 into e4m3 by adding to the exponent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E2M1_MAX = 6.0
MIN_EXPONENT = -8  # of a group's power of two below the scale of its row

# |x| above bound i rounds to code i + 1. A tie goes to the even code: where that is the upper one,
# the bound is the float32 just below the tie.
_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_BOUNDS = tuple(t - math.ulp(t) * 2**29 if code % 2 else t for code, t in enumerate(_TIES))


def encode_e2m1(x: Tensor) -> Tensor:
    """Float values -> codes uint8 0..15, round to nearest, ties to even, saturating at 6."""
    bounds = torch.tensor(_BOUNDS, dtype=x.dtype, device=x.device)
    magnitude = torch.bucketize(x.abs().contiguous(), bounds).to(torch.uint8)
    return magnitude | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes uint8 0..15 -> float32 values."""
    magnitude = (codes & 7).to(torch.float32)
    # codes 0 .. 4 stand for 0 .5 1 1.5 2; above 2 the values are 3, 4, 6
    value = torch.where(magnitude > 4, magnitude - 2, magnitude / 2)
    value = torch.where(magnitude == 7, torch.full_like(value, E2M1_MAX), value)
    return torch.where(codes > 7, -value, value)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^k as float32, exactly, for integers -126 <= k <= 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def power_of_two_scales(scale: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Round free group scales to a float scale per row times a power of two per group.

    Args:
        scale: float32 [.., groups], positive and normal.
        scheme: "m1" makes every scale a power of two, "m2" only the ratios of a row's scales to its largest.
            The paper rounds the exponents up ("m1ceil", "m2ceil"). Rounding to nearest loses less: with m2, up means
            a scale that is down to half of what the group needs, and its largest weights saturate.

    Returns:
        The scales of rows [.., 1], float32, and the exponents of groups [.., groups], int8, MIN_EXPONENT..0.
    """
    round_exponent = torch.ceil if scheme.endswith("ceil") else torch.round
    if scheme.startswith("m1"):
        absolute = round_exponent(scale.double().log2())
        largest = absolute.amax(-1, keepdim=True)
        exponent = absolute - largest
        row_scale = power_of_two(largest)
    else:
        row_scale = scale.amax(-1, keepdim=True)
        exponent = -round_exponent((row_scale.double() / scale.double()).log2())
    return row_scale, exponent.clamp(MIN_EXPONENT, 0).to(torch.int8)
