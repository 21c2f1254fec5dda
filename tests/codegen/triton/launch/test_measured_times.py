"""The variants of linear layers: as measured, else by the rule."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE  # also gives the interpreter a correct bfloat16
from stand_in import STAND_IN

from qcompile.codegen.triton.launch import gemm
from qcompile.codegen.triton.launch.measured_times import (
    a8_name,
    dequantizes,
    m_bucket,
    measured_times,
    remember_times,
    weight_only_name,
)
from qcompile.codegen.triton.tuning.baselines import INT4, random_packed_weight

LAYER = weight_only_name(4, 128, "int", "bf16")


@pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in for a GPU that is there")
def test_measured_variants_are_taken_at_run_time(monkeypatch, own_cache):
    weight = random_packed_weight(INT4, 128, 64, torch.device("cpu"))
    x, by_cublas = torch.randn(9, 128).bfloat16(), []
    monkeypatch.setattr(gemm, "gpu", lambda device: STAND_IN)
    real = gemm._by_cublas
    monkeypatch.setattr(gemm, "_by_cublas", lambda *args: by_cublas.append(1) or real(*args))
    first = gemm.linear_w(x, weight, gemm.Epilogue())
    remember_times(STAND_IN, LAYER, 64, 128, 16, {"kernel": 3.0, "dequant": 2.0})
    second = gemm.linear_w(x, weight, gemm.Epilogue())
    assert by_cublas == [1] and torch.allclose(first, second, rtol=2e-2, atol=2e-2)
    remember_times(STAND_IN, LAYER, 64, 128, 4096, {"kernel": 2.0, "dequant": 3.0})
    assert not dequantizes(STAND_IN, LAYER, 64, 128, 2000)


def test_by_the_rule_large_m_is_dequantized(own_cache):
    assert [dequantizes(STAND_IN, LAYER, 64, 128, m) for m in (1, 1024, 1025)] == [False, False, True]
    remember_times(STAND_IN, LAYER, 64, 128, 16, {"kernel": 2.0, "float": 3.0})
    assert not dequantizes(STAND_IN, LAYER, 64, 128, 16)


def test_times_hold_for_a_bucket_of_m(own_cache):
    assert [m_bucket(m) for m in (1, 2, 5, 16, 17, 1025, 9999)] == [1, 4, 16, 16, 32, 4096, 4096]
    remember_times(STAND_IN, LAYER, 64, 128, 20, {"kernel": 2.0})
    assert measured_times(STAND_IN, LAYER, 64, 128, 32) == {"kernel": 2.0}
    assert measured_times(STAND_IN, LAYER, 64, 128, 33) == measured_times(STAND_IN, LAYER, 65, 128, 32) == {}
    assert measured_times(STAND_IN, a8_name("int8", "bf16"), 64, 128, 32) == {}
