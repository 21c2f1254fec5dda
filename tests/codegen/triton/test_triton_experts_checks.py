"""Wrong arguments of experts_w are named, with what is demanded."""

from __future__ import annotations

import pytest
import torch
from test_triton_experts_op import arguments

from qcompile.codegen.triton.triton_experts_checks import MAX_EXPERTS, check_experts_w


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
