"""The four-bit float e2m1, and scales that are powers of two.

    code   0    1    2    3    4    5    6    7          bit 3 is the sign
    value  0   .5    1  1.5    2    3    4    6

Source: ZeroQuant-FP, arXiv:2307.09782 sec. 3 (e2m1 weights beside e4m3 activations; M1, M2).
An e2m1 number times 2^k is an e4m3 number exactly for -8 <= k <= 6, so scales that differ by powers of
two let a kernel turn e2m1 into e4m3 by adding to an exponent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E2M1_MAX = 6.0
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEAST_EXPONENT = -8  # of the powers of two below the row's scale

# |x| above bound i rounds to code i + 1. A tie goes to the even code: where that is the upper one,
# the bound is the float32 just below the tie.
_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_BOUNDS = tuple(t - math.ulp(t) * 2**29 if code % 2 else t for code, t in enumerate(_TIES))


def encode_e2m1(x: Tensor) -> Tensor:
    """Float -> codes uint8 0..15, to nearest, ties to even, saturating at 6."""
    bounds = torch.tensor(_BOUNDS, dtype=x.dtype, device=x.device)
    magnitude = torch.bucketize(x.abs().contiguous(), bounds).to(torch.uint8)
    return magnitude | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes uint8 0..15 -> float32."""
    magnitude = (codes & 7).to(torch.float32)
    # 0 .5 1 1.5 2 are even steps; above 2 the steps are 1, 1, 2
    value = torch.where(magnitude > 4, magnitude - 2, magnitude / 2)
    value = torch.where(magnitude == 7, torch.full_like(value, E2M1_MAX), value)
    return torch.where(codes > 7, -value, value)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^k as float32, exactly, for integers -126 <= k <= 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def constrain(scale: Tensor, constraint: str) -> tuple[Tensor, Tensor]:
    """Scales [N, groups] -> a float scale of the row [N, 1] and exponents int8 [N, groups] <= 0.

    m1 makes every scale a power of two; m2 only the ratios of a row's scales to its largest.
    The paper rounds the exponents up ("m1ceil", "m2ceil"); to nearest loses less: with m2, up means
    a scale that is up to half of what the group needs, and its largest weights saturate.
    """
    rounded = torch.ceil if constraint.endswith("ceil") else torch.round
    if constraint.startswith("m1"):
        exponent = rounded(scale.double().log2())
        row = exponent.amax(-1, keepdim=True)
        steps = exponent - row
        top = power_of_two(row.clamp(-126, 127))
    else:
        top = scale.amax(-1, keepdim=True)
        steps = -rounded((top.double() / scale.double()).log2())
    return top, steps.clamp(LEAST_EXPONENT, 0).to(torch.int8)
