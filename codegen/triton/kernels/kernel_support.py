"""Which formats have a kernel, on which GPUs."""

from __future__ import annotations

from typing import Literal

import torch

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.numerics.format import CodeType, Format

Operator = Literal["linear_w", "linear_a8", "linear_w4a8"]
"""The operators: weight-only, 8-bit codes on both sides, and 4-bit weights by int8 activations."""

_TENSOR_CORES = (8, 0)  # compute capability from which there are tensor cores for bf16 and int8
_MIN_CAPABILITY = {"fp8": (8, 9)}  # of formats that need more


def has_format(dtype: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU multiplies codes of a type (int8, fp8), and casts to it."""
    return capability >= _MIN_CAPABILITY.get(dtype, _TENSOR_CORES)


def operator_for(form: Format, act: str, dtype: torch.dtype, capability: tuple[int, int]) -> Operator | None:
    """The operator that computes a linear layer, or None for formats without a kernel.

    Args:
        form: format of the weight.
        act: format of x, "" where it is float.
        dtype: of the model.
        capability: of the GPU.
    """
    if dtype not in NAMES or capability < _TENSOR_CORES:
        return None
    if not act:
        return "linear_w" if layout_of(form) is not None else None
    if not has_format(form.dtype, capability):
        return None
    if act in ("int8/row", "int8/tensor") and byte_layout_of(form) is not None:
        return "linear_w4a8"
    per_channel = form.dtype in ("int8", "fp8") and form.per == "row" and form.zero == "none"
    codes = codes_of(form)
    return "linear_a8" if (form.dual or per_channel) and act in (f"{codes}/row", f"{codes}/tensor") else None


def codes_of(form: Format) -> CodeType:
    """The codes that gemm_a8 multiplies: of two-level scales whose groups gemm_w4a8 does not take, int8."""
    return "int8" if form.dual else form.dtype
