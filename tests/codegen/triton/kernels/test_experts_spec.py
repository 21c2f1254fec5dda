"""Specs of gemm_experts: text that reads back, what is refused, and what the kernels of the budget cost."""

from __future__ import annotations

import pytest
from test_w4a8_spec import cost_of

from qcompile.codegen.triton.aot.budget import read
from qcompile.codegen.triton.aot.compile_kernels import ARCHITECTURES, types_of
from qcompile.codegen.triton.kernels.experts_spec import GemmExperts
from qcompile.codegen.triton.kernels.parse_spec import parse


@pytest.mark.parametrize("spec", [GemmExperts(), GemmExperts("bf16", zero="int", paired=True, gather=True)])
def test_a_spec_reads_back(spec):
    assert parse(str(spec)) == spec


@pytest.mark.parametrize("field", ["parts", "bias", "residual", "low_rank=4"])
def test_there_is_no_epilogue(field):
    with pytest.raises(ValueError, match="no split-K and no epilogue"):
        parse(f"gemm_experts/bf16/{field}")


def test_types():
    types = types_of(GemmExperts(zero="int", paired=True, gather=True))
    assert (types["rows"], types["ends"], types["w"], types["scale"]) == ("*i64", "*i32", "*i16", "*i32")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_main_loop_is_that_of_gemm_w(architecture):
    """Rows gathered by an index are fetched ahead as neighboring ones are; nothing is spilled."""
    kernels = read()["kernels"][str(architecture)]
    names = [name for name in kernels if name.startswith("gemm_experts/")]
    assert len(names) >= 9
    for name in names:
        cost, loop = cost_of(architecture, name)
        assert not cost["spilled"] and cost["mma"]
        if architecture < 100 and "ragged" not in name and "paired" in name:
            assert loop.by_kind["async_load"] and not loop.waited_loads
        if architecture == 90:
            assert cost["from_registers"] and "wgmma" in cost["mma"]


def test_finding_its_expert_costs_the_loop_nothing():
    """A tenth more at most than gemm_w, for 8 experts and for 128."""
    tile = "16x128{} 4 warps 4 stages"
    _, alone = cost_of(90, f"gemm_w/bf16/zero=int/paired {tile.format('')}")
    for experts in (8, 128):
        _, loop = cost_of(90, f"gemm_experts/bf16/zero=int/paired/gather {tile.format(f' {experts} experts')}")
        assert loop.issue <= 1.15 * alone.issue
