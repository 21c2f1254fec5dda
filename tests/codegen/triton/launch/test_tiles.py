"""Launches by M, and split-K."""

from __future__ import annotations

from qcompile.codegen.triton.kernels.spec import GemmW
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes
from qcompile.codegen.triton.launch.tiles import (
    Launch,
    compiler_options,
    launch_of,
    m_regime,
    place_scales,
    split_k_of,
)


def test_regimes_and_split_k():
    assert [m_regime(m) for m in (1, 16, 17, 64, 65, 5000)] == [16, 16, 32, 64, 128, 128]
    assert launch_of(GemmW(bits=3, chunk=16), 64, (10, 0)) != launch_of(GemmW(bits=3, chunk=16), 64, (9, 0))
    launch = Launch(16, 64, 4, 4)
    assert split_k_of(16, 4096, 32, launch, 132) == 4  # 64 tiles
    assert split_k_of(16, 14336, 32, launch, 132) == 1  # 224 tiles
    assert split_k_of(16, 64, 32, launch, 132) == 8  # four steps at least
    assert split_k_of(128, 64, 32, launch, 132) == 1 and split_k_of(1, 64, 1, launch, 132) == 1


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
