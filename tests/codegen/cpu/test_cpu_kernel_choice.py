"""Which CPU kernel, and how fast by the committed measurements."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu import cpu_kernel_choice
from qcompile.codegen.cpu.cpu_kernel_choice import Measured, choose_cpu_kernel, kernel_of, ratio_to_float
from qcompile.numerics.format import Format

INT8 = Format("int8")
DUAL = Format.parse("int4/group128/zero/dual")
KERNELS = ("int8_linear", "dual_linear", "group_linear", "table_linear", "int8_float_linear")


@pytest.mark.parametrize(
    "weight,act,kernel",
    [
        ("int8", "int8/row", "int8_linear"),
        ("int8", "int8/tensor", "int8_linear"),
        ("int8", "", "int8_float_linear"),
        ("int4/group128/zero/dual", "int8/row", "dual_linear"),
        ("int4/group8/dual", "int8/row", "dual_linear"),
        ("int4/group128/zero/dual", "", "table_linear"),
        ("int4/group128/zero", "int8/row", "group_linear"),
        ("int4/group32/floatzero", "int8/tensor", "group_linear"),
        ("int3/row", "int8/row", "group_linear"),
        ("int4/group128", "", "table_linear"),
        ("int2/row/zero", "", "table_linear"),
        ("fp4/group32/m2", "", "table_linear"),
        ("fp4/group32", "int8/row", "dequant_mm"),  # whose values are no integers
        ("int4/group100", "", "dequant_mm"),  # a group is not whole octets
        ("int4/group100", "int8/row", "dequant_mm"),
        ("int4/group100/dual", "int8/row", "dequant_mm"),
        ("int4/tensor", "", "dequant_mm"),
        ("int8/group64", "", "dequant_mm"),
        ("int8/group64", "int8/row", "dequant_mm"),
        ("int8", "int8/row/zero", "dequant_mm"),
        ("int8", "int8/group64", "dequant_mm"),
        ("int8", "fp8/row", "dequant_mm"),
        ("int4/group128/zero", "int4/row", "dequant_mm"),
        ("int4/group128/dual", "fp8/row", "dequant_mm"),
        ("fp8", "", "dequant_mm"),
        ("fp8", "fp8/row", "dequant_mm"),
    ],
)
def test_the_kernel_of_a_site(weight, act, kernel):
    assert kernel_of(Format.parse(weight), act) == kernel


def test_every_kernel_has_a_lowering():
    from qcompile.codegen.cpu import cpu_lowering

    assert set(cpu_lowering._INSERT) == set(KERNELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices(dtype):
    choice = choose_cpu_kernel(INT8, "int8/row", dtype, 512, 2048, 2048)
    assert choice.kernel == "int8_linear" and choice.ratio > 1
    assert choose_cpu_kernel(Format("fp8"), "fp8/row", torch.bfloat16, 8, 2048, 2048).slower_than_float
    assert choose_cpu_kernel(INT8, "int8/row", torch.float64, 512, 2048, 2048).kernel == "dequant_mm"


@pytest.mark.parametrize("measured_on", ["amx", "vnni", "avx2"])
def test_every_kernel_was_measured(measured_on):
    table = cpu_kernel_choice._table(measured_on)
    assert set(table) == {(kernel, dtype) for kernel in KERNELS for dtype in ("bfloat16", "float32")}
    assert all({1, 4, 32, 512} <= {one.m for one in measured} for measured in table.values())


def test_a_ratio_is_float_time_over_kernel_time():
    import json
    from pathlib import Path

    path = Path(cpu_kernel_choice.__file__).parent / "measured-vnni.json"
    row = next(row for row in json.loads(path.read_text())["rows"] if row["M"] != row["N"] != row["K"])
    known = cpu_kernel_choice._table("vnni")[row["kernel"], row["dtype"]]
    assert Measured(row["M"], row["K"], row["N"], row["float_us"] / row["us"]) in known


def test_a_processor_has_its_table(monkeypatch):
    def table(measured_on):
        ratios = {"avx2": 7.0, "vnni": 3.0, "amx": 5.0}
        return {("int8_linear", "float32"): [Measured(1, 64, 64, ratios[measured_on])]}

    monkeypatch.setattr(cpu_kernel_choice, "_table", table)
    for kind, tiles, note in (
        ("avx2", False, "7.0x float)"),
        ("other", False, "7.0x float on avx2)"),
        ("vnni", False, "3.0x float)"),
        ("amx", True, "5.0x float)"),
        ("amx", False, "3.0x float on vnni)"),  # the system refuses tiles
    ):
        monkeypatch.setattr(cpu_kernel_choice, "processor", lambda kind=kind: kind)
        monkeypatch.setattr(cpu_kernel_choice, "has_amx_tiles", lambda tiles=tiles: tiles)
        assert str(choose_cpu_kernel(INT8, "int8/row", torch.float32, 4, 64, 64)).endswith(note)


def test_the_nearest_measured_shape_counts(monkeypatch):
    measured = [Measured(1, 64, 64, 1.0), Measured(32, 64, 64, 2.0), Measured(32, 1024, 1024, 3.0)]
    monkeypatch.setattr(cpu_kernel_choice, "_table", lambda measured_on: {("int8_linear", "float32"): measured})

    def ratio(m, k, n, kernel="int8_linear"):
        return ratio_to_float(kernel, torch.float32, m, k, n, "vnni")

    assert [ratio(2, 64, 64), ratio(20, 64, 64), ratio(20, 1024, 512)] == [1.0, 2.0, 3.0]
    assert ratio(1, 64, 64, "dual_linear") == 0.0  # never measured


def test_no_kernel_of_ours_where_sums_could_leave_int32():
    for form, act, kernel in ((INT8, "int8/row", "int8_linear"), (DUAL, "int8/row", "dual_linear")):
        kernels = [choose_cpu_kernel(form, act, torch.float32, 1, k, 64).kernel for k in (2**17 - 1, 2**17)]
        assert kernels == [kernel, "dequant_mm"]


def test_an_amx_machine_takes_a_kernel_for_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(cpu_kernel_choice, "processor", lambda: "amx")
    monkeypatch.setattr(cpu_kernel_choice, "has_amx_tiles", lambda: True)
    for m in (1, 8, 64, 512):
        for dtype in (torch.bfloat16, torch.float32):
            assert not choose_cpu_kernel(INT8, "int8/row", dtype, m, 2048, 2048).slower_than_float
        weight_only = choose_cpu_kernel(INT8, "", torch.bfloat16, m, 2048, 2048)
        assert weight_only.has_kernel and weight_only.ratio > 0 and "amx" not in str(weight_only)
