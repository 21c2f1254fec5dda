"""Round float32 values to codes in one pass, where a target has a kernel for it; the definitions in PyTorch otherwise.

    gradient_codes   q = clamp(g / step, -L, L), stochastically or to nearest; how many |g| are beyond the limit
    value_codes      q = clamp(round(x / step), l, L); whether there is a NaN
    changed_codes    of a weight to which a change is added (code_update.py)

A target installs its kernels for a type of device. They give the same bits as the definitions, which the tests check,
so a run may move between machines.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qcompile.numerics.cache_blocks import cache_blocks
from qcompile.numerics.code_update import add_to_codes
from qcompile.numerics.counter_random import round_stochastically, uniform
from qcompile.numerics.qtensor import QTensor


class RoundingKernels(Protocol):
    """What a target gives, for dense float32 tensors of its device."""

    def gradient_codes(
        self, gradient: Tensor, step: Tensor, limit: Tensor, levels: int, draw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As the function of this name."""
        ...

    def value_codes(self, x: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """As the function of this name."""
        ...

    def changed_codes(self, weight: QTensor, change: Tensor, decay: float, draw: Tensor | None) -> QTensor | None:
        """As the function of this name; None for a format that the target has no kernel for."""
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
    for block in cache_blocks(gradient.numel(), gradient.device):
        part = gradient[block]
        scaled = (part / step).clamp_(-levels, levels).nan_to_num_(0.0)
        if draw is None:
            scaled = scaled.round_()
        else:
            scaled = round_stochastically(scaled, uniform(part.shape, draw, device=part.device, first=block.start))
        codes[block].copy_(scaled)
        beyond += (part.abs() > limit).sum()
    return codes, beyond


def value_codes(x: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes of weights or activations.

    Args:
        x: floats [N].
        step: between two codes, [].
        low: the smallest code.
        high: the largest.

    Returns:
        int8 [N], 0 where there is a NaN; and whether there is one, bool [].
    """
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.value_codes(x, step, low, high)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    lost = torch.zeros((), dtype=torch.bool, device=x.device)
    for block in cache_blocks(x.numel(), x.device):
        wide = x[block] if x.dtype == torch.float64 else x[block].float()
        rounded = (wide / step).round_().clamp_(low, high)
        lost |= rounded.isnan().any()
        codes[block].copy_(rounded.nan_to_num_(0.0))
    return codes, lost


def changed_codes(weight: QTensor, change: Tensor, decay: float, draw: Tensor | None) -> QTensor:
    """dq(weight) (1 - decay) + change, quantized to the same format; see `add_to_codes`.

    Args:
        weight: [N, K].
        change: float [N, K].
        decay: the share of the weight that is taken away.
        draw: the stream of random values, int32 []; None: round to nearest.

    Raises:
        ValueError: NaN or Inf in the change.
    """
    kernels = _kernels(change)
    found = None if kernels is None else kernels.changed_codes(weight, change, decay, draw)
    if found is not None:
        return found
    noise = None if draw is None else uniform(tuple(change.shape), draw, device=change.device)
    return add_to_codes(weight, change, decay, noise)


def _kernels(x: Tensor) -> RoundingKernels | None:
    dense = x.dtype == torch.float32 and x.is_contiguous()
    return _installed.get(x.device.type) if dense and not torch.compiler.is_compiling() else None
