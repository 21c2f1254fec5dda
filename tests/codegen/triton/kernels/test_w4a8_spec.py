"""Specs of gemm_w4a8: text that reads back, what is refused, and what the kernels of the budget cost."""

from __future__ import annotations

import dataclasses
import re

import pytest

from qcompile.codegen.triton.aot.budget import read
from qcompile.codegen.triton.aot.compile_kernels import ARCHITECTURES, KernelCost, complaints, types_of
from qcompile.codegen.triton.aot.main_loop import LoopCost
from qcompile.codegen.triton.kernels.parse_spec import parse
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8


@pytest.mark.parametrize(
    "spec", [GemmW4A8(), GemmW4A8("fp16", group=32, chunk=32, parts=True), GemmW4A8(group=0, bias=True, act="tensor")]
)
def test_a_spec_reads_back(spec):
    assert parse(str(spec)) == spec


def test_a_block_is_two_chunks():
    assert [GemmW4A8(group=32, chunk=c).block for c in (32,)] == [64] and GemmW4A8().block == 128


@pytest.mark.parametrize(
    "text,words",
    [
        ("gemm_w4a8/bf16/group=16/chunk=16", "chunk 16; tensor cores take 32"),
        ("gemm_w4a8/bf16/group=96", "cross each other"),
        ("gemm_w4a8/bf16/group=192", "cross each other"),
        ("gemm_w4a8/bf16/parts/residual", "sum_k adds"),
        ("gemm_w4a8/bf16/parts/low_rank=4", "and low_rank"),
        ("gemm_w4a8/fp32", "for bf16, fp16"),
    ],
)
def test_what_there_is_no_kernel_for(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_types_and_complaints():
    assert types_of(GemmW4A8())["x"] == "*i8" and types_of(GemmW4A8())["steps"] == "*i32"
    assert types_of(GemmW4A8(parts=True))["out"] == "*i32" and types_of(GemmW4A8("fp16"))["out"] == "*fp16"
    cost = KernelCost(100, 0, 20_000, 1000, {"wgmma": 8}, 8, 4, {})
    assert complaints(GemmW4A8(), 90, cost) == []
    assert "through shared memory" in complaints(GemmW4A8(), 90, dataclasses.replace(cost, from_registers=0))[0]
    assert "not by wgmma" in complaints(GemmW4A8(), 90, dataclasses.replace(cost, mma={"mma": 8}))[0]


def cost_of(architecture, name):
    """What the budget has of a kernel, and the cycles of one trip of its main loop."""
    cost = read()["kernels"][str(architecture)][name]
    warps = int(re.search(r"(\d+) warps", name)[1])
    return cost, LoopCost(sum(cost["loop"].values()), cost["loop"], warps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_main_loop_of_every_tile(architecture):
    """Codes become int8 without byte permutes; nothing waits for memory; nothing is spilled."""
    names = [name for name in read()["kernels"][str(architecture)] if name.startswith("gemm_w4a8/")]
    assert len(names) >= 14
    for name in names:
        cost, loop = cost_of(architecture, name)
        assert not cost["spilled"] and ("wgmma" if architecture == 90 else "mma") in cost["mma"]
        if "ragged" not in name and "group=" not in name:
            assert loop.by_kind.get("permute", 0) <= 4 and not loop.waited_loads
        if architecture == 90:
            assert cost["from_registers"]


def test_a_large_tile_is_bound_by_the_tensor_cores():
    """128x128 by 128 columns take 512 cycles there; two programs share a multiprocessor, whatever the epilogue."""
    for name in ("gemm_w4a8/bf16", "gemm_w4a8/bf16/bias/residual", "gemm_w4a8/bf16/group=0"):
        cost, loop = cost_of(90, f"{name} 128x128 8 warps 3 stages")
        assert cost["together"] >= 2 and loop.issue <= 330 and loop.alu < 512


def test_a_small_tile_moves_more_than_the_memory_gives():
    """26 bytes of packed weights a cycle and multiprocessor are 6 TB/s of an H100."""
    for name in ("gemm_w4a8/bf16", "gemm_w4a8/bf16/parts", "gemm_w4a8/bf16/group=0"):
        _, loop = cost_of(90, f"{name} 16x128 4 warps 4 stages")
        assert 128 * 128 / 2 / loop.issue >= 26 and loop.alu <= 2 * 130  # of 128 channels
