"""Wrong arguments of experts_w are named, with what is demanded."""

from __future__ import annotations

import pytest
import torch
from expert_stacks import QUANTIZED
from test_triton_experts_op import arguments
from test_triton_quantized_experts_op import arguments as quantized_arguments

from qcompile.codegen.triton.triton_experts_checks import (
    MAX_EXPERTS,
    check_experts_a8,
    check_experts_w,
    check_experts_w4a8,
)


def test_the_layout_is_that_of_the_format():
    layout = check_experts_w(*arguments("int4/group64/zero"))
    assert (layout.bits, layout.group) == (4, 64)


@pytest.mark.parametrize(
    "at,value,says",
    [
        (0, torch.zeros(2, 3, 64).half(), "float \\[T, K\\] with K = `columns` = 64"),
        (1, torch.zeros(7), "int32 or int64 \\[S\\]"),
        (2, torch.zeros(2), "int32 or int64 \\[E\\]"),
        (2, torch.zeros(MAX_EXPERTS + 1, dtype=torch.int32), "of 1 to 4095 experts"),
        (2, torch.zeros(5, dtype=torch.int32), "the same number of channels for each of the 5 experts"),
        (5, None, "zero is None.*given"),
        (6, "fp4/row", "format is 'fp4/row'"),
        (7, 63, "`columns` = 63"),
    ],
)
def test_what_is_refused(at, value, says):
    a = arguments("int4/group64/zero")
    a[at] = value
    with pytest.raises(ValueError, match=f"qcompile_triton::experts_w: .*{says}"):
        check_experts_w(*a)


@pytest.mark.parametrize(
    "at,value,says",
    [
        (0, torch.zeros(5, 100, dtype=torch.int8), "int8 or float8_e4m3fn \\[T, K\\], K a multiple of 16"),
        (1, torch.zeros(5), "float32 \\[5, 1\\]"),
        (1, torch.zeros(1, 1), "float32 \\[5, 1\\]"),
        (2, torch.zeros(7), "int32 or int64 \\[S\\]"),
        (3, torch.zeros(0, dtype=torch.int32), "of 1 to 4095 experts"),
        (4, torch.zeros(2, 24, 64, dtype=torch.int8), "int8 \\[2, N, 128\\]"),
        (5, torch.zeros(2, 23, 1), "float32 \\[2, 24, 1\\]"),
        (6, torch.int8, "dtype is torch.int8"),
    ],
)
def test_what_is_refused_of_codes(at, value, says):
    _, a = quantized_arguments(*QUANTIZED[0])
    check_experts_a8(*a)
    a[at] = value
    with pytest.raises(ValueError, match=f"qcompile_triton::experts_a8: .*{says}"):
        check_experts_a8(*a)


@pytest.mark.parametrize(
    "at,value,says",
    [
        (0, torch.zeros(5, 128).to(torch.float8_e4m3fn), "int8 \\[T, K\\], K a multiple of 16"),
        (4, torch.zeros(47, 64, dtype=torch.uint8), "the same number of channels for each of the 2 experts"),
        (5, torch.zeros(1, 48, dtype=torch.int32), "int32 \\[2, 48\\]"),
        (6, torch.zeros(2, 24, 1), "float32 \\[48, 1\\]"),
        (7, "int4/group48", "format is 'int4/group48'"),
        (8, 64, "`columns` = 64"),
    ],
)
def test_what_is_refused_of_4_bit_codes(at, value, says):
    _, a = quantized_arguments(*QUANTIZED[2])
    assert check_experts_w4a8(*a).group == 64
    a[at] = value
    with pytest.raises(ValueError, match=f"qcompile_triton::experts_w4a8: .*{says}"):
        check_experts_w4a8(*a)
