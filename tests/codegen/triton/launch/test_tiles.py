"""Launches by M."""

from __future__ import annotations

import dataclasses

from qcompile.codegen.triton.kernels.experts_spec import GemmExpertsA8, GemmExpertsW4A8
from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8
from qcompile.codegen.triton.launch.tiles import (
    Launch,
    compiler_options,
    launch_of,
    m_regime,
    place_scales,
)


def test_regimes():
    assert [m_regime(m) for m in (1, 16, 17, 64, 65, 5000)] == [16, 16, 32, 64, 128, 256]
    assert launch_of(GemmW(bits=3, chunk=16), 64, (10, 0)) != launch_of(GemmW(bits=3, chunk=16), 64, (9, 0))


def test_wide_tiles_where_registers_allow():
    paired = GemmW(zero="int", paired=True)
    for spec in (paired, GemmW4A8(), Gemm8(), Gemm8(codes="fp8", residual=True)):
        assert [launch_of(spec, m).block_n for m in (128, 129)] == [128, 256]
        assert launch_of(spec, 2048, (8, 0)).block_n == 128 and launch_of(spec, 2048, (10, 0)).block_n <= 128
        assert launch_of(dataclasses.replace(spec, ragged=True), 2048).block_n == 128
    assert launch_of(GemmW(), 2048).block_n == launch_of(Gemm8(residual=True), 2048).block_n == 128


def test_tiles_of_gathered_codes_have_few_rows_or_few_channels():
    """Every gathered row has an address in registers."""
    for capability in ((8, 0), (9, 0), (10, 0)):
        launches = [launch_of(spec, 2048, capability) for spec in (GemmExpertsA8(), GemmExpertsW4A8())]
        assert [(launch.block_m, launch.block_n) for launch in launches] == [(128, 128), (64, 256)]


def test_a_kernel_gets_the_constants_that_it_has():
    launch = Launch(16, 64, 4, 2, block_k=256)
    assert launch.constants(["x", "BLOCK_M", "BLOCK_K"]) == {"BLOCK_M": 16, "BLOCK_K": 256}


def test_where_every_bit_is_defined_nothing_is_fused_and_integers_wrap_around():
    launch = Launch(4, 256, 8, 1)
    assert compiler_options(GemmW(), launch) == dict(num_warps=8, num_stages=1)
    exact = compiler_options(ChangeCodes(), launch)
    assert exact == dict(num_warps=8, num_stages=1, enable_fp_fusion=False, sanitize_overflow=False)


def test_scales_are_applied_where_they_cost_less():
    assert [place_scales(GemmW("bf16"), m).scaled for m in (32, 33)] == ["sums", "weights"]
    assert place_scales(GemmW("fp16"), 64).scaled == "sums"  # which could not hold a small scale
    assert place_scales(GemmW("bf16", group=0), 64).scaled == "sums"
