"""Costs of a main loop from a listing, and those of the kernels that decode tokens."""

from __future__ import annotations

import pytest

from qcompile.codegen.triton.aot.budget import read
from qcompile.codegen.triton.aot.main_loop import LoopCost, main_loop, programs_together

LISTING = """
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4.64] ;
.L_x_0:
        /*0020*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0030*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   LDGSTS.E.128 [R1], [R2.64] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   LOP3.LUT R3, R2, 0xf000f, RZ, 0xc0, !PT ;
        /*0070*/                   PRMT R3, R2, 0x5410, R3 ;
        /*0080*/               @!P1 LDG.E.U8 R5, [R4.64] ;
        /*0090*/                   FFMA R6, R6, R7, R8 ;
        /*00a0*/                   IMAD R6, R6, R7, R8 ;
        /*00b0*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*00c0*/                   I2F R6, R6 ;
        /*00d0*/              @P0  BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
"""


def test_the_loop_with_the_tensor_cores_is_the_main_one():
    cost = main_loop(LISTING, warps=8)
    assert cost.instructions == 10 and sum(cost.by_kind.values()) == 10
    expected = dict(
        async_load=1, logic=1, permute=1, load=1, float32=1, multiply_integer=1, tensor=1, convert=1, other=2
    )
    assert cost.by_kind == expected  # LDGDEPBAR and BRA are others
    assert cost.issue == 20 and cost.alu == 2 * 3 * 2 and cost.fma == (1 + 2) * 2 and cost.waited_loads == 1


def test_no_loop_costs_nothing_and_without_tensor_cores_the_longest_counts():
    assert main_loop("        /*0000*/   EXIT ;\n", 4) == LoopCost(0, {}, 4)
    assert main_loop(LISTING.replace("HGMMA", "MOV"), 4).instructions == 10


@pytest.mark.parametrize(
    "registers,shared,warps,architecture,together",
    [(128, 0, 4, 90, 4), (111, 113 * 1024, 8, 90, 2), (32, 40 * 1024, 4, 90, 5), (32, 0, 8, 89, 6), (255, 0, 8, 80, 1)],
)
def test_programs_that_share_a_multiprocessor(registers, shared, warps, architecture, together):
    assert programs_together(registers, shared, warps, architecture) == together


def loop(kernel, architecture="90"):
    cost = read()["kernels"][architecture][kernel]
    return LoopCost(sum(cost["loop"].values()), cost["loop"], int(kernel.split(" warps")[0].split()[-1])), cost


WEIGHT_ONLY = "gemm_w/bf16/zero=int/paired"


def test_what_the_weight_only_kernels_may_cost_on_hopper():
    """Codes become values by one LOP3 for two: cycles of integers for a trip of a 128 x 128 tile, and two programs."""
    large, cost = loop(f"{WEIGHT_ONLY}/scaled=weights 128x128 8 warps 3 stages")
    assert large.alu <= 300 and cost["together"] == 2 and large.by_kind.get("permute", 0) == 0
    small, _ = loop(f"{WEIGHT_ONLY} 16x128 4 warps 4 stages")
    bytes_of_a_trip = 128 * 128 / 2 * 1.06
    assert bytes_of_a_trip / max(small.issue, small.alu) > 1.3 * 4.3e12 / 132 / 1.755e9  # more than an H200's memory


@pytest.mark.parametrize("architecture", ["80", "89", "90"])
@pytest.mark.parametrize(
    "kernel", [f"{WEIGHT_ONLY} 16x128 4 warps 4 stages", f"{WEIGHT_ONLY}/scaled=weights 128x128 8 warps 3 stages",
               "gemm_a8/bf16 128x128 8 warps 3 stages"],
)  # fmt: skip
def test_every_load_of_a_trip_is_fetched_ahead(kernel, architecture):
    """Scales and zero points too; and x is read by matrices, not word by word."""
    found, _ = loop(kernel, architecture)
    assert found.waited_loads == 0 and found.by_kind["async_load"] >= 8 and found.by_kind.get("shared_load", 0) <= 8
