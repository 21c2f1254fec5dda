"""When a kernel counts as slower than the float matmul."""

from __future__ import annotations

import pytest

from qcompile.codegen.kernel_choice import FLOOR, KernelChoice


@pytest.mark.parametrize(
    "choice,slower",
    [
        (KernelChoice("a", 2.0), False),
        (KernelChoice("a", FLOOR), False),
        (KernelChoice("a", FLOOR - 0.01), True),
        (KernelChoice("a", None), False),  # not measured is not slower
        (KernelChoice("a", 2.0, has_kernel=False), True),
    ],
)
def test_slower_than_float(choice, slower):
    assert choice.slower_than_float is slower


def test_text():
    assert str(KernelChoice("int8_linear", 1.5, "1.5x float")) == "int8_linear (1.5x float)"
    assert str(KernelChoice("dequantize")) == "dequantize"
