"""Specs of gemm_group: text that reads back, what is refused, and what the kernels of the budget cost."""

from __future__ import annotations

import dataclasses

import pytest
from test_w4a8_spec import cost_of

from qcompile.codegen.triton.aot.budget import read
from qcompile.codegen.triton.aot.compile_kernels import ARCHITECTURES, KernelCost, complaints, types_of
from qcompile.codegen.triton.kernels.group_spec import GemmFp4Fp8, GemmGroup
from qcompile.codegen.triton.kernels.parse_spec import parse


@pytest.mark.parametrize(
    "spec",
    [
        GemmGroup(),
        GemmGroup("fp16", group=32, chunk=32, zero=True, parts=True),
        GemmGroup(act="group", bias=True),
        GemmFp4Fp8(group=64, low_rank=8),
    ],
)
def test_a_spec_reads_back(spec):
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text,words",
    [
        ("gemm_group/bf16/group=16/chunk=16", "chunk 16; tensor cores take 32"),
        ("gemm_group/bf16/group=0", "cross each other"),
        ("gemm_group/bf16/group=192", "cross each other"),
        ("gemm_group/bf16/parts/residual", "sum_k adds"),
        ("gemm_group/fp32", "for bf16, fp16"),
        ("gemm_fp4_fp8/bf16/zero", "floats have none"),
    ],
)
def test_what_there_is_no_kernel_for(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_types_and_complaints():
    types = types_of(GemmGroup(zero=True))
    assert (types["x"], types["steps"], types["out"]) == ("*i8", "*i64", "*bf16")
    assert types_of(GemmGroup(parts=True))["out"] == "*fp32" and types_of(GemmGroup())["scale"] == "*fp32"
    assert types_of(GemmFp4Fp8())["x"] == "*fp8e4nv" and types_of(GemmFp4Fp8())["w"] == "*u8"
    cost = KernelCost(100, 0, 20_000, 1000, {"wgmma": 8}, 8, 4, {})
    assert complaints(GemmGroup(), 90, cost) == []
    assert "through shared memory" in complaints(GemmGroup(), 90, dataclasses.replace(cost, from_registers=0))[0]
    assert "body is lost" in complaints(GemmGroup(), 80, dataclasses.replace(cost, mma={}))[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("template,least", [("gemm_group", 12), ("gemm_fp4_fp8", 10)])
def test_the_main_loop_of_every_tile(template, least, architecture):
    """Codes become int8 without byte permutes; codes and scales of the weight are fetched ahead; nothing is spilled."""
    names = [name for name in read()["kernels"][str(architecture)] if name.startswith(f"{template}/")]
    assert len(names) >= least if template == "gemm_group" or architecture > 80 else not names
    for name in names:
        cost, loop = cost_of(architecture, name)
        assert not cost["spilled"] and cost["mma"]
        other_loop = "tcgen05" in cost["mma"] and "low_rank=32" in name  # of which Triton makes another one on sm_100
        if "ragged" not in name and not other_loop:
            assert not loop.by_kind.get("permute", 0)
            assert not loop.waited_loads or "act=group" in name  # of x, whose scales lie in the caches
        if architecture == 90:
            assert cost["from_registers"] and "wgmma" in cost["mma"]


def test_a_small_tile_moves_more_than_the_memory_gives():
    """26 bytes of packed weights a cycle and multiprocessor are 6 TB/s of an H100."""
    for name in ("gemm_group/bf16", "gemm_group/bf16/zero", "gemm_group/bf16/zero/act=group", "gemm_fp4_fp8/bf16"):
        for architecture in (90, 100):
            _, loop = cost_of(architecture, f"{name} 16x128 4 warps 4 stages")
            assert 128 * 128 / 2 / loop.issue >= 26
