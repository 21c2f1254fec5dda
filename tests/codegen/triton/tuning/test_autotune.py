"""Tuning launches and measuring variants without a GPU: what is fastest is kept, and decides."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import DEVICE  # also gives the interpreter a correct bfloat16
from stand_in import STAND_IN, StandIn

from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.codegen.triton.gpu_kernel_choice import choose_gpu_kernel
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.spec import GemmW
from qcompile.codegen.triton.launch import tuning_cache
from qcompile.codegen.triton.launch.tiles import Launch, place_scales
from qcompile.codegen.triton.launch.tuning_cache import launch_for
from qcompile.codegen.triton.tuning import autotune
from qcompile.codegen.triton.tuning.baselines import random_packed_weight
from qcompile.numerics.format import Format

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in for a GPU that is there"),
    pytest.mark.usefixtures("own_cache"),
]
INT4, INT8 = Format.parse("int4/group128/zero"), Format("int8")


def test_tuning_keeps_the_fastest_launch():
    sound = [Launch(16, 64, 4, 2), Launch(16, 64, 4, 3)]

    def problems(spec, launch, architecture):
        return [] if launch in sound else ["spills"]

    found = autotune.tune_launches([(128, 64)], [7], rounds=1, timed_gpu=StandIn([9.0, 3.0]), find_problems=problems)
    assert [(launch, us) for _, launch, us in found] == [(Launch(16, 64, 4, 3), 3.0)]
    weight = random_packed_weight(INT4, 128, 64, torch.device("cpu"))
    spec = place_scales(GemmW("bf16", **weight.spec_fields), 7)
    assert launch_for(STAND_IN, spec, 64, 128, 16) == Launch(16, 64, 4, 3)


FORMATS = [(INT4, ""), (INT8, "int8/row"), (Format("fp8"), "fp8/row"), (Format.parse("int3/group128/zero"), "")]


def test_groups_by_8_bit_codes_are_measured_under_their_own_name():
    pairs = [(INT4, "int4/group128"), (Format.parse("fp4/group128/m2"), "fp8/row")]
    found = autotune.measure_variants(pairs, [(128, 64)], [16], rounds=2, timed_gpu=StandIn([2.0, 4.0, 8.0, 4.0]))
    assert len({one.layer for one in found}) == 2 and all(one.kept for one in found)
    ratios = [choose_gpu_kernel(STAND_IN, form, act, torch.bfloat16, 9, 128, 64).ratio for form, act in pairs]
    assert ratios == [2.0, 0.5]
    assert choose_gpu_kernel(STAND_IN, INT4, "int4/row", torch.bfloat16, 9, 128, 64).ratio is None


def test_variants_are_measured_and_decide(monkeypatch):
    variants, real = [], autotune.linear_w
    monkeypatch.setattr(
        autotune, "linear_w", lambda *args, variant: (variants.append(variant), real(*args, variant=variant))[1]
    )
    # of every format: kernel, [dequant,] float
    microseconds = [8.0, 2.0, 4.0, 3.0, 6.0, 6.0, 3.0, 1.0, 5.0, 2.0]
    timed_gpu = StandIn(microseconds)
    found = autotune.measure_variants(FORMATS, [(128, 64)], [15, 16], rounds=2, timed_gpu=timed_gpu)
    assert [one.m for one in found] == [16] * 4 and all(one.kept for one in found) and len(timed_gpu.copies) == 10
    copies = timed_gpu.copies[0]
    assert variants == 2 * (["kernel"] * copies + ["dequant"] * copies)

    def chosen(form, act="", m=9, n=64, dtype=torch.bfloat16, gpu=STAND_IN):
        return choose_gpu_kernel(gpu, Format.parse(str(form)), act, dtype, m, 128, n)

    assert chosen(INT4) == KernelChoice("dequant, then cuBLAS", 2.0, "2.00x cuBLAS")
    assert not chosen(INT4).slower_than_float
    assert chosen(INT8, "int8/row") == KernelChoice("gemm_a8", 2.0, "2.00x cuBLAS")
    assert str(chosen(INT8, "int8/tensor")) == "gemm_a8 (2.00x cuBLAS)"
    assert chosen("fp8", "fp8/row").ratio == 0.5 and chosen("fp8", "fp8/row").slower_than_float
    assert chosen("int3/group128/zero") == KernelChoice("gemm_w", 2.0, "2.00x cuBLAS")
    dual = chosen("int4/group16/zero/dual", "int8/row")
    assert dual == KernelChoice("gemm_a8, int8 of dual codes", 2.0, "2.00x cuBLAS")
    assert str(chosen("int4/group128/zero/dual", "int8/row")) == "gemm_w4a8 (not measured on this GPU)"
    # other M, shapes, formats, dtypes, GPUs: not measured, so the rule's
    for other in (chosen(INT4, m=17), chosen(INT4, n=65), chosen("int4/group64"), chosen("int4/group128/floatzero"),
                  chosen(INT4, dtype=torch.float16), chosen(INT4, gpu=Gpu("other"))):  # fmt: skip
        assert str(other) == "gemm_w (not measured on this GPU)" and not other.slower_than_float
    assert chosen(INT4, m=4).kernel == "gemm_w" and chosen(INT4, m=1025).kernel == "dequant, then cuBLAS"
    # no kernel: read, written and read again, which is slower than reading float once
    a100 = Gpu("A100", 108, (8, 0))
    for none in (chosen("fp4/group32"), chosen(INT4, dtype=torch.float32), chosen("fp8", "fp8/row", gpu=a100)):
        assert none.slower_than_float and none.kernel == "dequantize, then cuBLAS"


def test_4_bit_weights_by_int8_are_measured():
    form = Format.parse("int4/group64/zero/dual")
    (found,) = autotune.measure_variants([(form, "int8/row")], [(128, 64)], [16], 2, StandIn([1.0, 3.0, 1.0, 3.0]))
    assert found.kept and found.layer == "int4 weights, groups of 64, int8 x, bf16 out"
    choice = choose_gpu_kernel(STAND_IN, form, "int8/row", torch.bfloat16, 9, 128, 64)
    assert choice == KernelChoice("gemm_w4a8", 3.0, "3.00x cuBLAS")


def test_a_wide_spread_is_not_kept():
    class Noisy(StandIn):
        def timer(self, call, copies):
            rest = itertools.cycle([1.0, 2.0, 3.0])
            return lambda: next(rest)

    (found,) = autotune.measure_variants([(INT4, "")], [(128, 64)], [16], rounds=3, timed_gpu=Noisy())
    assert not found.kept and not tuning_cache.file().exists()


def test_formats_without_a_kernel_are_refused_before_work():
    timed_gpu = StandIn()
    with pytest.raises(ValueError, match="fp4.*no kernel"):
        autotune.measure_variants(
            [(INT4, ""), (Format.parse("fp4/group32"), "")], [(128, 64)], [16], timed_gpu=timed_gpu
        )
    assert not timed_gpu.copies
