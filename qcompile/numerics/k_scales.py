"""What the stored scales of a k6 format stand for: a step and an offset for each group of 32 columns.

    w = s q - o        s = d sc, o = dmin m

A float16 times an integer of six bits is exact in float32, so a weight is rounded once, by the subtraction: what every
reader of GGUF's Q4_K computes, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.format import K_BLOCK, K_GROUP


def steps_and_offsets(scale: Tensor, minimum: Tensor | None, multiplier: Tensor | None) -> tuple[Tensor, Tensor]:
    """s and o of each group, float32 [.., K / 32].

    Args:
        scale: float16 [.., 2 K / 256], d and dmin alternating.
        minimum: m, uint8 [.., K / 32].
        multiplier: sc, int8 [.., K / 32].
    """
    assert minimum is not None and multiplier is not None
    pairs = torch.unflatten(scale.float(), -1, (-1, 2)).repeat_interleave(K_BLOCK // K_GROUP, -2)
    return pairs[..., 0] * multiplier.float(), pairs[..., 1] * minimum.float()


def single_level(
    stored: Tensor, scale: Tensor, minimum: Tensor | None, multiplier: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The parts of a k6 format as those of int4/group32/floatzero: the same codes, z = o / s.

    Kernels of that format compute s (q - z), whose z is rounded to float32 once.
    """
    step, offset = steps_and_offsets(scale, minimum, multiplier)
    return stored, step, offset / step, None
