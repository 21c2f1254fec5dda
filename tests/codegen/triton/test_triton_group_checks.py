"""Wrong arguments of linear_group and centered are named, with what is demanded."""

from __future__ import annotations

import pytest
import torch
from test_triton_group_op import arguments

from qcompile.codegen.triton.triton_group_checks import check_centered, check_linear_group


def test_the_layout_is_that_of_the_formats():
    layout = check_linear_group(*arguments((2,), "int4/group64/zero", "int4/group64"))
    assert (layout.group, layout.chunk) == (64, 64)


@pytest.mark.parametrize(
    "at,value,says",
    [
        (-4, "int4/group16/zero", "format is 'int4/group16/zero'"),
        (-4, "int5", "format"),
        (-3, "fp8/row", "format is 'int4/group64/zero', but must be int4 or fp4 that a kernel multiplies"),
        (-3, "int4/row", "x_scale"),
        (-2, 63, "`columns` = 63"),
        (-1, torch.int32, "dtype"),
        (3, torch.zeros(2, 24), "torch.int64 \\[2, 24\\]"),
        (1, torch.zeros(2, 3), "float32 \\[2, 1\\]"),
    ],
)
def test_what_is_refused(at, value, says):
    a = arguments((2,), "int4/group64/zero", "int4/group64")
    if at == -3 and value == "int4/row":
        a[1] = torch.ones(2, 2)
    a[at] = value
    with pytest.raises(ValueError, match=says):
        check_linear_group(*a)


@pytest.mark.parametrize(
    "codes,zero,form,says",
    [
        (torch.zeros(2, 64), torch.zeros(2, 1), "int4/row/zero", "codes"),
        (torch.zeros(2, 64).byte(), torch.zeros(2, 2), "int4/row/zero", "float32 \\[2, 1\\]"),
        (torch.zeros(2, 64).byte(), torch.zeros(2, 1), "int8/row/zero", "int4 with integer zero points"),
        (torch.zeros(2, 64).byte(), torch.zeros(2, 1), "int4/row", "int4 with integer zero points"),
    ],
)
def test_what_has_no_zero_points_to_take_off(codes, zero, form, says):
    with pytest.raises(ValueError, match=f"qcompile_triton::centered: .*{says}"):
        check_centered(codes, zero, form)
