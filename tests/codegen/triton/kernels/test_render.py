"""Kernels as source: golden files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcompile.codegen.triton.kernels.attention_spec import KVDecode, KVMerge, KVRead, KVWrite
from qcompile.codegen.triton.kernels.experts_spec import GemmExperts, GemmExpertsA8, GemmExpertsW4A8, SumExperts
from qcompile.codegen.triton.kernels.group_spec import GemmFp4Fp8, GemmGroup
from qcompile.codegen.triton.kernels.parse_spec import parse
from qcompile.codegen.triton.kernels.render import padded, render
from qcompile.codegen.triton.kernels.spec import Dequant, Gemm8, GemmW, Pack, RowQuant, SumK
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes, RoundGradient, RoundValues
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8

GOLDEN = Path(__file__).parents[2] / "golden"
SPECS = [
    GemmW("bf16", zero="int", paired=True, bias=True),
    GemmW("fp16", zero="int", scaled="weights"),
    GemmW("fp16", bits=3, chunk=16, group=64, scaled="weights", ragged=True, low_rank=8),
    GemmW("bf16", group=32, zero="int", paired=True, scaled="weights", parts=True),
    GemmW("bf16", group=0, bits=8, chunk=64, zero="float", residual=True),
    Gemm8("bf16", codes="fp8", act="tensor", residual=True),
    Gemm8("fp16", parts=True),
    GemmW4A8("bf16", bias=True),
    GemmW4A8("fp16", group=32, chunk=32, ragged=True, parts=True),
    GemmW4A8("bf16", group=0, act="tensor", residual=True, low_rank=8),
    GemmExperts("bf16", zero="int", paired=True, gather=True),
    GemmExperts("fp16", group=0, bits=8, chunk=64, zero="int", ragged=True),
    GemmExpertsA8("bf16", codes="fp8", gather=True),
    GemmExpertsA8("fp16", ragged=True, parts=True),
    SumExperts("bf16", gather=True),
    SumExperts("fp16", codes="fp8"),
    GemmExpertsW4A8("bf16", gather=True),
    GemmExpertsW4A8("fp16", group=0, ragged=True),
    GemmGroup("bf16", zero=True, act="group", bias=True),
    GemmGroup("fp16", group=32, chunk=32, act="group", ragged=True, parts=True, low_rank=8),
    GemmGroup("bf16", group=256, act="tensor", residual=True),
    GemmFp4Fp8("bf16", low_rank=8),
    GemmFp4Fp8("fp16", group=32, chunk=32, act="group", ragged=True, parts=True),
    SumK("bf16", codes="int8", bias=True),
    SumK("bf16", codes="fp8", act="tensor", residual=True, low_rank=20),
    KVDecode(heads=4),
    KVDecode(bits=8, width=64, heads=6, queries=2, window=True, cap=True),
    KVDecode(heads=2, queries=3, masked=True),
    KVMerge("bf16"),
    KVRead("fp32", bits=8),
    KVWrite("bf16"),
    KVWrite("fp32", bits=8, many=True),
    Dequant("bf16", bits=2, chunk=32, group=64, zero="int"),
    Pack(bits=3, group=0, chunk=16),
    Pack(bits=4, group=0),
    Pack(bits=8, group=0, chunk=64, signed=True),
    RowQuant("bf16", first="layer", residual=True, codes="fp8"),
    RowQuant("bf16", first="gate", hadamard=14336),
    RowQuant("fp16", first="rms", smooth=True, codes="int4", group=128),
    RowQuant("bf16", hadamard=14336, codes="int4", group=128),
    RowQuant("bf16", codes="int4", group=64, zero=True),
    RowQuant("bf16", codes="int4", zero=True),
    RowQuant("bf16", first="rms", residual=True, value=True, smooth=True),
    RoundGradient(stochastic=True),
    RoundGradient(),
    RoundValues(),
    ChangeCodes(group=96),
    ChangeCodes(decay=True, stochastic=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_golden_sources(spec):
    """What is rendered is reviewed: QCOMPILE_GOLDEN=1 rewrites the files."""
    path = GOLDEN / (str(spec).replace("/", "-") + ".py.txt")
    if os.environ.get("QCOMPILE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(render(spec))
    assert render(spec) == path.read_text()
    assert parse(str(spec)) == spec
    assert max(map(len, render(spec).splitlines())) <= 160 and "if True" not in render(spec)


def test_sides_of_tensor_core_tiles():
    assert [padded(size) for size in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
