"""What a linear layer launches: decided once for a shape, and again after a measurement."""

from __future__ import annotations

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW
from qcompile.codegen.triton.launch import gemm_plan
from qcompile.codegen.triton.launch.gemm_plan import forget_plans, plan_8_bit, plan_weight_only
from qcompile.codegen.triton.launch.tiles import Launch
from qcompile.codegen.triton.launch.tuning_cache import key, remember_launch

H200 = Gpu("H200", 132, (9, 0))
INT4 = GemmW(zero="int", paired=True, bias=True)


def test_a_plan_is_made_once_until_something_is_measured(own_cache):
    plan = plan_weight_only(H200, INT4, 16, 256, 512)
    assert plan_weight_only(H200, INT4, 16, 256, 512) is plan
    remember_launch(key(H200, INT4, 256, 512, 16), Launch(16, 64, 4, 2), 1.0)
    again = plan_weight_only(H200, INT4, 16, 256, 512)
    assert again is not plan and again.gemm.launch == Launch(16, 64, 4, 2)


def test_split_k_moves_the_epilogue_behind_the_sums(own_cache):
    plan = plan_weight_only(H200, INT4, 16, 256, 4096)
    assert plan.split_k > 1 and plan.gemm.grid == (2, plan.split_k, 1) and plan.sum_k is not None
    assert plan.gemm.spec.parts and not plan.gemm.spec.bias and plan.sum_k.spec.bias
    whole = plan_weight_only(H200, INT4, 16, 256 * 132, 4096)
    assert whole.sum_k is None and whole.gemm.spec.bias and whole.gemm.grid == (264, 1, 1)
    short = plan_weight_only(H200, INT4, 16, 256, 128)  # one block of columns
    assert short.split_k == 1 and short.gemm.spec.bias and not short.gemm.spec.parts


def test_a_split_never_has_more_ranges_than_blocks(own_cache, monkeypatch):
    monkeypatch.setattr(gemm_plan, "split_k_of", lambda *_: 16)
    forget_plans()
    assert plan_weight_only(H200, INT4, 16, 256, 384).split_k == 3
    forget_plans()


def test_8_bits(own_cache):
    corrected = plan_8_bit(H200, Gemm8(low_rank=4, bias=True), 16, 256, 4096)
    assert corrected.sum_k is not None and corrected.sum_k.spec.low_rank == 4 and corrected.sum_k.spec.bias
    assert not corrected.gemm.spec.low_rank  # integers cannot take the correction in parts
    parts = plan_8_bit(H200, Gemm8("bf16", "fp8"), 16, 256, 4096)
    assert parts.sum_k is not None and parts.sum_k.spec.codes == "fp8" and parts.sum_dtype.is_floating_point
    assert not plan_8_bit(H200, Gemm8(), 16, 256, 4096).sum_dtype.is_floating_point
    assert plan_8_bit(H200, Gemm8(), 16, 256, 4000).gemm.spec.ragged
