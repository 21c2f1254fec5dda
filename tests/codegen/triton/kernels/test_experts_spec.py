"""Specs of gemm_experts: text that reads back, what is refused, and what the kernels of the budget cost."""

from __future__ import annotations

import pytest
from test_w4a8_spec import cost_of

from qcompile.codegen.triton.aot.budget import read
from qcompile.codegen.triton.aot.compile_kernels import ARCHITECTURES, types_of
from qcompile.codegen.triton.kernels.experts_spec import GemmExperts, GemmExpertsA8, GemmExpertsW4A8, SumExperts
from qcompile.codegen.triton.kernels.parse_spec import parse


@pytest.mark.parametrize(
    "spec",
    [
        GemmExperts(),
        GemmExperts("bf16", zero="int", paired=True, gather=True),
        GemmExpertsA8("fp16", "fp8", gather=True),
        GemmExpertsW4A8(group=32, chunk=32, ragged=True),
        GemmExpertsA8(parts=True),
        SumExperts("fp16", "fp8", gather=True),
    ],
)
def test_a_spec_reads_back(spec):
    assert parse(str(spec)) == spec


@pytest.mark.parametrize("field", ["bias", "residual", "low_rank=4"])
def test_there_is_no_epilogue(field):
    for kind in ("gemm_experts", "gemm_experts_a8", "gemm_experts_w4a8"):
        with pytest.raises(ValueError, match="a stack of experts has no epilogue"):
            parse(f"{kind}/bf16/{field}")


@pytest.mark.parametrize("kind", ["gemm_experts_a8", "gemm_experts_w4a8"])
def test_rows_have_a_scale_each(kind):
    with pytest.raises(ValueError, match="act=tensor; rows of experts have a scale each"):
        parse(f"{kind}/bf16/act=tensor")


def test_types():
    types = types_of(GemmExperts(zero="int", paired=True, gather=True))
    assert (types["rows"], types["ends"], types["w"], types["scale"]) == ("*i64", "*i32", "*i16", "*i32")


def test_types_of_codes():
    types = types_of(GemmExpertsA8(codes="fp8", gather=True))
    assert (types["x"], types["w"], types["rows"], types["x_scale"]) == ("*fp8e4nv", "*fp8e4nv", "*i64", "*fp32")
    types = types_of(GemmExpertsW4A8())
    assert (types["x"], types["w"], types["steps"], types["ends"]) == ("*i8", "*u8", "*i32", "*i32")
    for spec, sums in ((SumExperts(gather=True), "*i32"), (SumExperts(codes="fp8"), "*fp32")):
        types = types_of(spec)
        assert (types["sums"], types["scale"], types["rows"], types["out"]) == (sums, "*fp32", "*i64", "*bf16")
    assert types_of(GemmExpertsW4A8(parts=True))["out"] == types_of(GemmExpertsA8(parts=True))["out"] == "*i32"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["gemm_experts_a8/", "gemm_experts_w4a8/"])
def test_codes_are_fetched_ahead(kind, architecture):
    """No load of the main loop waits, but for narrow groups' steps and where Blackwell's tensor cores multiply fp8."""
    kernels = read()["kernels"][str(architecture)]
    names = [name for name in kernels if name.startswith(kind)]
    assert len(names) >= 8
    for name in names:
        cost, loop = cost_of(architecture, name)
        assert not cost["spilled"] and cost["mma"]
        if "group=" not in name and not (architecture == 100 and "fp8" in name):
            assert loop.by_kind["async_load"] and not loop.waited_loads
        if architecture == 90:
            assert "wgmma" in cost["mma"] and bool(cost["from_registers"]) == ("w4a8" in name)


@pytest.mark.parametrize("kind,bytes", [("gemm_experts_a8", 128 * 64), ("gemm_experts_w4a8", 128 * 128 / 2)])
def test_a_decoded_token_moves_more_than_the_memory_gives(kind, bytes):
    """26 bytes of a stack a cycle and multiprocessor are 6 TB/s of an H100."""
    for experts in (8, 128):
        tile = f"16x{64 if kind.endswith('_a8') else 128} {experts} experts 4 warps 4 stages"
        _, loop = cost_of(90, f"{kind}/bf16/gather {tile}")
        assert bytes / loop.issue >= 26


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
