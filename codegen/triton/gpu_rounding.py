"""Rounding in training on an NVIDIA GPU, by Triton: what codegen/cpu/training_kernels.py is on a CPU.

The operators that train are opaque to Inductor, so what they do inside is done here: one pass over memory in place of
ten. Without triton the definitions in PyTorch run (qcompile/numerics/code_rounding.py), with a warning.

The bits are those of the definitions on a CPU. On a GPU PyTorch multiplies by the reciprocal where a tensor is divided
by a number, so its scale of a changed weight may be one unit in the last place away from the kernel's.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from qcompile.codegen.triton.launch.round_codes import MAX_GROUP, change_codes, round_gradient, round_values
from qcompile.numerics.code_rounding import install_rounding_kernels
from qcompile.numerics.code_update import NOT_FINITE
from qcompile.numerics.qtensor import QTensor


class GpuRounding:
    """The kernels, as qcompile/numerics/code_rounding.py wants them."""

    def __init__(self, device: str = "cuda") -> None:
        """Round one value, which needs all that the others need: triton, its C compiler, and a GPU that it knows."""
        one = torch.ones(1, device=device)
        self.value_codes(one, one[0], -1, 1)

    def gradient_codes(
        self, gradient: Tensor, step: Tensor, limit: Tensor, levels: int, draw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [N] and the count beyond the limit, int64 []."""
        stream = None if draw is None else draw.to(gradient.device)
        return round_gradient(gradient, _scalar(step, gradient), _scalar(limit, gradient), levels, stream)

    def value_codes(self, x: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Codes int8 [N], and whether there is a NaN."""
        return round_values(x, _scalar(step, x), low, high)

    def changed_codes(self, weight: QTensor, change: Tensor, decay: float, draw: Tensor | None) -> QTensor | None:
        """Of int8 codes with groups and integer zero points, as Q-GaLore has them; None for others."""
        form, columns = weight.format, weight.columns
        group = min(form.group, 1 << (columns - 1).bit_length()) if columns else 0  # beyond a row, one group of it
        if (form.dtype, form.per, form.zero) != ("int8", "group", "int") or weight.zero is None:
            return None
        if not 0 < group <= MAX_GROUP:
            return None
        stream = None if draw is None else draw.to(change.device)
        old = (weight.codes.contiguous(), weight.scale.float().contiguous(), weight.zero.contiguous())
        codes, scale, zero, bad = change_codes(*old, change, group, decay, stream)
        if bool(bad):
            raise ValueError(NOT_FINITE)
        return QTensor(codes, scale, zero, None, form)


def _scalar(value: Tensor, beside: Tensor) -> Tensor:
    return value.to(beside.device, torch.float32)


@functools.cache
def install_gpu_rounding() -> None:
    """Use the kernels from now on; the first is compiled, and cached by triton on this machine.

    Warns:
        UserWarning: there is no triton, or it does not work here; training runs, and rounds some times slower.
    """
    try:
        install_rounding_kernels("cuda", GpuRounding())
    except Exception as error:  # triton and its compilers raise whatever they like
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"qcompile: the Triton kernels of fixed-point training do not run here ({reason}), so PyTorch rounds on "
            "the GPU, some times slower. Fix: pip install triton, in the version of this torch, and a C compiler",
            stacklevel=2,
        )
