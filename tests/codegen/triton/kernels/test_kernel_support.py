"""Which formats have a kernel, on which GPUs."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.triton.kernels.kernel_support import (
    codes_of,
    experts_operator_for,
    has_format,
    operator_for,
    row_quant_codes,
    why_no_experts_kernel,
    why_no_kernel,
)
from qcompile.numerics.format import Format


@pytest.mark.parametrize(
    "form,act,capability,operator",
    [
        ("int4/group128/zero", "", (8, 0), "linear_w"),
        ("int8/row", "", (8, 0), "linear_w"),
        ("fp4/group32", "", (9, 0), None),
        ("int4/group128", "", (7, 5), None),
        ("int8/row", "int8/row", (8, 0), "linear_a8"),
        ("int8/row", "int8/tensor", (8, 0), "linear_a8"),
        ("int8/group64", "int8/row", (9, 0), None),
        ("int8/row", "int8/row/zero", (9, 0), None),
        ("int4/group128/zero/dual", "int8/row", (9, 0), "linear_w4a8"),
        ("int4/group128/zero/dual", "fp8/row", (9, 0), None),
        ("int4/group16/zero/dual", "int8/row", (9, 0), "linear_a8"),  # whose groups are too narrow for it
        ("int4/row/zero", "int8/tensor", (8, 0), "linear_w4a8"),
        ("int4/row/zero", "int8/row/zero", (9, 0), None),
        ("int4/group128/zero", "int8/row", (9, 0), "linear_group"),
        ("int4/group128/zero", "int4/group128", (8, 0), "linear_group"),
        ("int4/group128/zero", "int4/group128/zero", (8, 0), "linear_group"),
        ("int4/group128", "int4/row", (7, 5), None),
        ("int4/row", "int4/row", (9, 0), "linear_w4a8"),
        ("int8/row", "int4/row", (9, 0), "linear_a8"),
        ("int8/row", "int4/group128", (9, 0), None),
        ("int4/group128/zero", "int8/row/zero", (9, 0), None),
        ("fp8/row", "fp8/group128", (9, 0), None),
        ("fp4/group128/m2", "fp8/row", (8, 9), "linear_group"),
        ("fp4/group128/m2", "fp8/row", (8, 6), None),
        ("fp4/group32", "int8/row", (9, 0), None),
        ("fp8/row", "fp8/row", (8, 9), "linear_a8"),
        ("fp8/row", "fp8/row", (8, 6), None),
        ("fp8/row", "int8/row", (9, 0), None),
    ],
)
def test_operators(form, act, capability, operator):
    assert operator_for(Format.parse(form), act, torch.bfloat16, capability) == operator
    assert operator_for(Format.parse(form), act, torch.float32, capability) is None


@pytest.mark.parametrize(
    "form,act,columns,operator,why",
    [
        ("int4/group128/zero", "", 100, "experts_w", ""),
        ("int8/row", "int8/row", 64, "experts_a8", ""),
        ("fp8/row", "fp8/row", 64, "experts_a8", ""),
        ("int4/group16/zero/dual", "int8/row", 64, "experts_a8", ""),
        ("int4/group64/zero/dual", "int8/row", 64, "experts_w4a8", ""),
        ("int4/row", "int4/row", 64, "experts_w4a8", ""),
        ("int8/row", "int8/row", 100, None, "K = 100 is no multiple of 16"),
        ("int8/row", "int8/tensor", 64, None, "no kernel for stacks of int8/row weights by int8/tensor x"),
        ("int4/group64", "int8/row", 64, None, "no kernel for stacks of int4/group64 weights by int8/row x"),
        ("fp8/row", "", 64, None, "no kernel for fp8/row weights by float x"),
    ],
)
def test_operators_of_experts(form, act, columns, operator, why):
    arguments = Format.parse(form), act, torch.bfloat16, columns, (9, 0)
    assert experts_operator_for(*arguments) == operator
    assert operator or why_no_experts_kernel(*arguments) == why


def test_two_level_scales_are_multiplied_as_int8():
    assert codes_of(Format.parse("int4/group128/zero/dual")) == "int8" and codes_of(Format("fp8")) == "fp8"


def test_fp8_needs_a_newer_gpu():
    assert has_format("int8", (8, 0)) and not has_format("fp8", (8, 8)) and has_format("fp8", (8, 9))


@pytest.mark.parametrize(
    "form,act,dtype,capability,why",
    [
        ("int8/row", "int8/row", torch.float32, (9, 0), "no kernel for float32"),
        ("int8/row", "", torch.bfloat16, (7, 5), "needs sm_80, this is sm_75"),
        ("fp8/row", "fp8/row", torch.bfloat16, (8, 6), "needs sm_89, this is sm_86"),
        ("fp4/group128/m2", "fp8/row", torch.bfloat16, (8, 0), "needs sm_89, this is sm_80"),
        ("int8/row", "int4/group128", torch.float16, (9, 0), "no kernel for int8/row weights by int4/group128 x"),
    ],
)
def test_a_report_says_why_there_is_none(form, act, dtype, capability, why):
    assert operator_for(Format.parse(form), act, dtype, capability) is None
    assert why_no_kernel(Format.parse(form), act, dtype, capability) == why


def test_what_row_quant_writes():
    takes = ("int8/row", "fp8/row", "int4/row", "int4/group128", "int4/group128/zero", "int8/group64", "int4/row/zero")
    refuses = ("int8/tensor", "int8/row/zero", "int4/group128/smooth", "int4/group96", "fp4/row", "int3/row",
               "int4/group128/floatzero")  # fmt: skip
    assert [row_quant_codes(Format.parse(text)) for text in takes] == [text.split("/")[0] for text in takes]
    assert not any(row_quant_codes(Format.parse(text)) for text in refuses)
