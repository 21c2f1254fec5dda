"""Specs of kernels as text: what reads back, and what is refused."""

from __future__ import annotations

import pytest

from qcompile.codegen.triton.kernels.parse_spec import KINDS, parse
from qcompile.codegen.triton.kernels.spec import GemmW


def test_a_spec_is_one_word_that_reads_back():
    spec = GemmW("fp16", bits=3, chunk=16, group=64, ragged=True, parts=True)
    assert str(spec) == "gemm_w/fp16/bits=3/group=64/chunk=16/ragged/parts"
    assert parse(str(spec)) == spec


def test_every_kind_reads_back():
    for kind in KINDS.values():
        assert parse(str(kind())) == kind()


@pytest.mark.parametrize(
    "text,words",
    [
        ("gemm_x/bf16", "there are gemm_w, gemm_a8"),
        ("gemm_w/fp32", "there is gemm_w for bf16, fp16"),
        ("round_values/bf16", "there is round_values for fp32"),
        ("change_codes/fp32/group=0", "at least one"),
        ("gemm_w/bf16/blob=3", "it has dtype, bits"),
        ("gemm_w/bf16/zero=some", "one of none, int, float"),
        ("gemm_w/bf16/bits=four", "is a number"),
        ("gemm_w/bf16/bits=5", "kernels for 2, 3, 4 and 8"),
        ("gemm_w/bf16/group=96/chunk=64", "crosses groups"),
        ("gemm_w/fp16/zero=int/paired", "paired for bf16"),
        ("gemm_w/bf16/paired", "with zero=int"),
        ("gemm_w/bf16/chunk=8", "at least 16"),
        ("gemm_w/bf16/parts/bias", "sum_k adds"),
        ("gemm_a8/bf16/parts/low_rank=4", "sum_k adds bias, residual and low_rank"),
        ("row_quant/bf16/codes=int8/zero", "int8 codes with zero points"),
        ("row_quant/bf16/hadamard=11008", "size k 2.m"),
        ("row_quant/bf16/group=96", "power of two"),
        ("pack/bf16/signed", "stored unsigned"),
        ("row_quant/bf16/value", "without a norm or a gate"),
    ],
)
def test_bad_kernels_are_named(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)
