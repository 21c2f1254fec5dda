"""Kernels as source: golden files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcompile.codegen.triton.kernels.parse_spec import parse
from qcompile.codegen.triton.kernels.render import padded, render
from qcompile.codegen.triton.kernels.spec import Dequant, Gemm8, GemmW, GemvW, Pack, RowQuant, SumK
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes, RoundGradient, RoundValues

GOLDEN = Path(__file__).parents[2] / "golden"
SPECS = [
    GemmW("bf16", zero="int", bias=True),
    GemmW("fp16", bits=3, chunk=16, group=64, scaled="weights", ragged=True, low_rank=8),
    GemmW("bf16", group=32, chunk=32, parts=True),
    GemvW("bf16", group=0, bits=8, zero="float", rows=2, residual=True),
    Gemm8("bf16", codes="fp8", act="tensor", residual=True),
    Gemm8("fp16", parts=True),
    SumK("bf16", codes="int8", bias=True),
    Dequant("bf16", bits=2, chunk=32, group=64, zero="int"),
    Pack(bits=3, group=0, chunk=16),
    Pack(bits=8, group=0, signed=True),
    RowQuant("bf16", first="layer", residual=True, codes="fp8"),
    RowQuant("bf16", first="gate", hadamard=14336),
    RowQuant("fp16", first="rms", smooth=True, codes="int4", group=128),
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
