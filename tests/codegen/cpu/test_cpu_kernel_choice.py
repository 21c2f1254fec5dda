"""Which CPU kernel, and how fast by the committed measurements."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu import cpu_kernel_choice
from qcompile.codegen.cpu.cpu_kernel_choice import Measured, choose_cpu_kernel, kernel_of, ratio_to_float
from qcompile.numerics.format import Format

INT8 = Format("int8")
DUAL = Format.parse("int4/group128/zero/dual")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices(dtype):
    choice = choose_cpu_kernel(INT8, "int8/row", dtype, 512, 2048, 2048)
    assert choice.kernel == "int8_mm" and choice.ratio > 1
    assert choose_cpu_kernel(Format("fp8"), "fp8/row", torch.bfloat16, 8, 2048, 2048).slower_than_float
    assert kernel_of(DUAL, "int8/row") == "dual_mm"
    assert kernel_of(Format.parse("int4/group100"), "") == "dequant_mm"  # halves are not whole vectors
    assert kernel_of(Format.parse("int4/group128/zero"), "int8/row") == "dequant_mm"  # float group scales
    assert kernel_of(Format.parse("int4/group100/dual"), "int8/row") == "dequant_mm"
    assert {kernel_of(INT8, act) for act in ("int8/row/zero", "int8/group64", "fp8/row")} == {"dequant_mm"}
    assert {kernel_of(Format.parse("int8/group64"), act) for act in ("", "int8/row")} == {"dequant_mm"}
    assert [kernel_of(INT8, act) for act in ("", "int8/tensor")] == ["int8_float", "int8_mm"]


@pytest.mark.parametrize("measured_on", ["vnni", "avx2"])
def test_every_kernel_was_measured(measured_on):
    table = cpu_kernel_choice._table(measured_on)
    kernels = ("int8_mm", "dual_mm", "int8_float", "nibble_float", "dequant_mm")
    assert set(table) == {(kernel, dtype) for kernel in kernels for dtype in ("bfloat16", "float32")}
    assert all({1, 4, 32, 512} <= {one.m for one in measured} for measured in table.values())


def test_a_processor_has_its_table(monkeypatch):
    def table(measured_on):
        return {("int8_mm", "float32"): [Measured(1, 64, 64, 7.0 if measured_on == "avx2" else 3.0)]}

    monkeypatch.setattr(cpu_kernel_choice, "_table", table)
    for kind, note in (("avx2", "7.0x float)"), ("other", "7.0x float on avx2)"), ("amx", "3.0x float on vnni)")):
        monkeypatch.setattr(cpu_kernel_choice, "processor", lambda kind=kind: kind)
        assert str(choose_cpu_kernel(INT8, "int8/row", torch.float32, 4, 64, 64)).endswith(note)


def test_the_nearest_measured_shape_counts(monkeypatch):
    measured = [Measured(1, 64, 64, 1.0), Measured(32, 64, 64, 2.0), Measured(32, 1024, 1024, 3.0)]
    monkeypatch.setattr(cpu_kernel_choice, "_table", lambda measured_on: {("int8_mm", "float32"): measured})

    def ratio(m, k, n, kernel="int8_mm"):
        return ratio_to_float(kernel, torch.float32, m, k, n, "vnni")

    assert [ratio(2, 64, 64), ratio(20, 64, 64), ratio(20, 1024, 512)] == [1.0, 2.0, 3.0]
    assert ratio(1, 64, 64, "dual_mm") == 0.0  # never measured


def test_no_integer_kernel_where_sums_could_leave_int32():
    for form, act in ((Format("int8"), "int8/row"), (Format.parse("int4/group128/zero/dual"), "int8/row")):
        kernels = [choose_cpu_kernel(form, act, torch.float32, 1, k, 64).kernel for k in (2**17 - 1, 2**17)]
        assert kernels[0] in ("int8_mm", "dual_mm") and kernels[1] == "dequant_mm"
