"""Round float32 values to codes in one pass, where a target has a kernel for it; the definitions in PyTorch otherwise.

    gradient_codes   q = clamp(g / step, -L, L), stochastically or to nearest; how many |g| are beyond the limit
    value_codes      q = clamp(round(x / step), l, L); where x is inside its clip; whether there is a NaN

A target installs its kernels for a type of device. They give the same bits as the definitions, which the tests check,
so a run may move between machines.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qcompile.numerics.counter_random import round_stochastically, uniform

_BLOCK = 1 << 16  # elements whose intermediate values stay in a CPU's cache


class RoundingKernels(Protocol):
    """What a target gives, for dense float32 tensors of its device."""

    def gradient_codes(
        self, gradient: Tensor, step: Tensor, limit: Tensor, levels: int, draw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As the function of this name."""
        ...

    def value_codes(
        self, x: Tensor, step: Tensor, clip: Tensor, low: int, high: int, signed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the function of this name."""
        ...


_installed: dict[str, RoundingKernels] = {}


def install_rounding_kernels(device_type: str, kernels: RoundingKernels | None) -> None:
    """Use kernels on a type of device ("cpu", "cuda"); None: the definitions."""
    if kernels is None:
        _installed.pop(device_type, None)
    else:
        _installed[device_type] = kernels


def gradient_codes(
    gradient: Tensor, step: Tensor, limit: Tensor, levels: int, draw: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes of a gradient.

    Args:
        gradient: [N], float32 or float64.
        step: between two codes, [], of its dtype.
        limit: levels * step before rounding of their product, [].
        levels: L, the largest code.
        draw: the stream of random values (counter_random.py), int32 []; None: round to nearest.

    Returns:
        int8 [N], 0 where there is a NaN; and how many magnitudes are beyond the limit, int64 [].
    """
    kernels = _kernels(gradient)
    if kernels is not None:
        return kernels.gradient_codes(gradient, step, limit, levels, draw)
    codes = torch.empty(gradient.shape, dtype=torch.int8, device=gradient.device)
    beyond = torch.zeros((), dtype=torch.int64, device=gradient.device)
    block = _BLOCK if gradient.device.type == "cpu" else max(gradient.numel(), 1)
    for first in range(0, gradient.numel(), block):
        part = gradient[first : first + block]
        scaled = (part / step).clamp_(-levels, levels).nan_to_num_(0.0)
        if draw is None:
            scaled = scaled.round_()
        else:
            scaled = round_stochastically(scaled, uniform(part.shape, draw, device=part.device, first=first))
        codes[first : first + block].copy_(scaled)
        beyond += (part.abs() > limit).sum()
    return codes, beyond


def value_codes(
    x: Tensor, step: Tensor, clip: Tensor, low: int, high: int, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of weights or activations.

    Args:
        x: float32 or float64 of any shape, dense.
        step: between two codes, [].
        clip: [].
        low: the smallest code.
        high: the largest.
        signed: whether values below zero are inside the clip.

    Returns:
        int8 codes, 0 where there is a NaN; bool, which values are inside the clip; and whether there is a NaN, [].
    """
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.value_codes(x, step, clip, low, high, signed)
    rounded = (x / step).round_().clamp_(low, high)
    lost = rounded.isnan().any()
    within = (x.abs() if signed else x) <= clip
    return rounded.nan_to_num_(0.0).to(torch.int8), within if signed else within & (x >= 0), lost


def _kernels(x: Tensor) -> RoundingKernels | None:
    dense = x.dtype == torch.float32 and x.is_contiguous()
    return _installed.get(x.device.type) if dense and not torch.compiler.is_compiling() else None
