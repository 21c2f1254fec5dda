"""Which formats have a kernel, on which GPUs."""

from __future__ import annotations

from typing import Literal

import torch

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.group_layout import group_layout_of
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.numerics.format import CodeType, Format

Operator = Literal["linear_w", "linear_a8", "linear_w4a8", "linear_group"]
"""The operators: weight-only, 8-bit codes on both sides, 4-bit weights by int8 activations, and by 8 bits in groups."""

ExpertsOperator = Literal["experts_w", "experts_a8", "experts_w4a8"]
"""The same of stacks of experts; rows of codes have a scale each."""

ROW_BYTES = 16  # that a row of codes must be a multiple of where rows are gathered: else a byte is a load
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
    of_x = Format.parse(act)
    if not has_format(form.dtype, capability) or not has_format(of_x.dtype, capability):
        return None
    if of_x.dtype in ("int4", "int8") and of_x.per != "group" and of_x.zero == "none":  # a byte each, whatever the bits
        if byte_layout_of(form) is not None:
            return "linear_w4a8"
        if form.dual or (form.dtype == "int8" and _per_channel(form)):
            return "linear_a8"
    if form.dtype == of_x.dtype == "fp8" and of_x.per != "group" and _per_channel(form):
        return "linear_a8"
    return "linear_group" if group_layout_of(form, of_x) is not None else None


def experts_operator_for(
    form: Format, act: str, dtype: torch.dtype, columns: int, capability: tuple[int, int]
) -> ExpertsOperator | None:
    """The operator that computes a product with a stack of experts, or None where none does.

    Args:
        form: format of the stack.
        act: format of x, "" where it is float.
        dtype: of the model.
        columns: K.
        capability: of the GPU.
    """
    operator = operator_for(form, act, dtype, capability)
    if operator == "linear_w":
        return "experts_w"
    if operator is None or operator == "linear_group" or Format.parse(act).per != "row" or columns % ROW_BYTES:
        return None
    return "experts_a8" if operator == "linear_a8" else "experts_w4a8"


def why_no_experts_kernel(form: Format, act: str, dtype: torch.dtype, columns: int, capability: tuple[int, int]) -> str:
    """Why `experts_operator_for` has no operator, in words for a report; arguments as there."""
    if operator_for(form, act, dtype, capability) is None:
        return why_no_kernel(form, act, dtype, capability)
    if columns % ROW_BYTES and Format.parse(act).per == "row":
        return f"K = {columns} is no multiple of {ROW_BYTES}"
    return f"no kernel for stacks of {form} weights by {act} x"


def _per_channel(form: Format) -> bool:
    return form.per == "row" and form.zero == "none"


def why_no_kernel(form: Format, act: str, dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """Why `operator_for` has no operator, in words for a report; arguments as there."""
    if dtype not in NAMES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    need = max(_TENSOR_CORES, *(_MIN_CAPABILITY.get(part.split("/")[0], _TENSOR_CORES) for part in (str(form), act)))
    if capability < need:
        return f"needs sm_{need[0]}{need[1]}, this is sm_{capability[0]}{capability[1]}"
    return f"no kernel for {form} weights by {act or 'float'} x"


def row_quant_codes(form: Format) -> Literal["int8", "fp8", "int4"] | None:
    """The codes to which row_quant quantizes activations, by rows or in groups of a power of two; None where not."""
    codes: dict[str, Literal["int8", "fp8", "int4"]] = {"int8": "int8", "fp8": "fp8", "int4": "int4"}
    if form.per == "tensor" or form.smooth or form.dual or form.k6 or form.group & (form.group - 1):
        return None
    signed = form.zero == "none" or (form.dtype, form.zero) == ("int4", "int")
    return codes.get(form.dtype) if signed else None


def codes_of(form: Format) -> CodeType:
    """The codes that gemm_a8 multiplies: of two-level scales whose groups gemm_w4a8 does not take, int8."""
    return "int8" if form.dual else form.dtype
