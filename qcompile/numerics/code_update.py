"""Adding a change to a quantized weight: dequantize, add, quantize again, rounding stochastically.

    q = floor(w / s + z + u),  u ~ U[0, 1)        E[dq(q)] = w inside the range

A change far below the scale is not lost on average, while rounding to nearest would lose each one. The range of a group
always includes zero, also where all of its values have one sign; a group in which nothing changes keeps its codes,
scale and zero point bit for bit.

Source: Q-GaLore (arXiv:2407.08296, sec. 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.qparams import choose_qparams, min_max
from qcompile.numerics.qtensor import QTensor, group_columns, ungroup_columns

NOT_FINITE = "the change of a quantized weight holds NaN or Inf, which no code can hold"


def add_to_codes(weight: QTensor, change: Tensor, decay: float = 0.0, noise: Tensor | None = None) -> QTensor:
    """dq(weight) (1 - decay) + change, quantized to the same format.

    Args:
        weight: [N, K] of an integer format with a single level of scales (`takes_updates`).
        change: float [N, K].
        decay: the share of the weight that is taken away.
        noise: u of each element, [N, K] in [0, 1); None rounds to nearest (half to even).

    Raises:
        ValueError: NaN or Inf in the change.
    """
    format, columns = weight.format, weight.columns
    old = _dequantized_groups(weight)
    groups = old.mul(1.0 - decay) if decay else old.clone()
    groups += group_columns(change, format)
    kept = ~(groups != old).any(-1)
    low, high = min_max(groups, format)
    if not bool(torch.isfinite(high - low).all()):
        raise ValueError(NOT_FINITE)
    scale, zero = choose_qparams(low, high, format)
    codes = groups.div_(scale[..., None])
    if noise is None and zero is not None and format.zero == "int":
        codes.round_()  # before the zero point, as in qparams.py
    if zero is not None:
        codes.add_(zero[..., None])
    if noise is None:
        codes.round_()
    else:
        codes.add_(group_columns(noise, format)).floor_()
    codes = codes.clamp_(format.qmin, format.qmax).to(format.code_dtype)
    codes = torch.where(kept[..., None], group_columns(weight.codes, format), codes)
    scale = torch.where(kept, weight.scale, scale)
    if zero is not None:
        assert weight.zero is not None
        zero = torch.where(kept, weight.zero, zero.to(weight.zero.dtype))
    return QTensor(ungroup_columns(codes, columns).contiguous(), scale, zero, None, format)


def takes_updates(format: Format) -> bool:
    """Whether `add_to_codes` works on weights of a format."""
    return (
        not format.is_float
        and not format.two_level
        and not format.smooth
        and format.per != "tensor"
        and format.scale == "f32"
    )


def _dequantized_groups(weight: QTensor) -> Tensor:
    """[N, groups, width] float32; what pads a ragged group is zero, and no change of it."""
    values = group_columns(weight.codes, weight.format).float()
    if weight.zero is not None:
        values -= weight.zero[..., None]
    values *= weight.scale[..., None]
    width = values.shape[-1]
    if weight.columns % width:
        values[:, -1, weight.columns % width :] = 0
    return values
