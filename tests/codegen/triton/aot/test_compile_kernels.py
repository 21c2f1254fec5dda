"""What must not be in a compiled kernel is found."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from qcompile.codegen.triton.aot.compile_kernels import KernelCost, compile_kernel, complaints, types_of
from qcompile.codegen.triton.kernels.spec import Dequant, Gemm8, GemmW, SumK
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes, RoundGradient, RoundValues
from qcompile.codegen.triton.launch.tiles import launch_of

GOOD = KernelCost(100, 0, 50_000, 600, {"wgmma": 8}, from_registers=8, together=4, loop={"tensor": 8})


@pytest.mark.parametrize(
    "change,words",
    [
        ({}, ""),
        (dict(spilled=8), "spilled"),
        (dict(shared=240_000), "shared memory"),
        (dict(mma={}), "body is lost"),
        (dict(mma={"mma": 16}), "not by wgmma"),
        (dict(from_registers=0), "through shared memory"),
    ],
)
def test_what_must_not_be(change, words):
    found = complaints(GemmW(), 90, dataclasses.replace(GOOD, **change))
    assert words in "".join(found) and bool(found) == bool(words)


def test_a_lost_body_of_a_kernel_without_tensor_cores():
    tiny = dataclasses.replace(GOOD, mma={}, instructions=16)
    assert "body is lost" in complaints(Dequant(), 90, tiny)[0]


def test_interpreted_kernels_are_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="Fix: unset it"):
        compile_kernel(GemmW(), launch_of(GemmW()), 90)


FUSED = """
from qcompile.codegen.triton.aot import compile_kernels
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes
from qcompile.codegen.triton.launch.round_codes import change_launch

spec = ChangeCodes(decay=True, stochastic=True)
print(compile_kernels.compile_kernel(spec, change_launch(spec), 90).spilled)
compile_kernels.compiler_options = lambda spec, launch: dict(num_warps=4)
compile_kernels.compile_kernel(spec, change_launch(spec), 90)
"""


def test_fused_roundings_are_found_where_bits_are_defined():
    """Compiled with our options there are none; with triton's own there are, and the kernel is refused."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", FUSED], env=plain, capture_output=True, text=True)
    assert done.stdout == "0\n" and "a product and a sum are rounded once" in done.stderr


def test_types_of_what_rounds_in_training():
    assert types_of(RoundGradient())["codes"] == types_of(RoundValues())["codes"] == "*i8"
    assert types_of(ChangeCodes())["codes"] == "*u8" and types_of(ChangeCodes())["zero"] == "*u8"
    assert types_of(RoundGradient())["x"] == "*fp32" and types_of(RoundGradient())["beyond"] == "*i64"


def test_types_follow_the_codes():
    assert types_of(GemmW())["w"] == "*i16" and types_of(GemmW(bits=8))["w"] == "*u8"
    assert types_of(GemmW(zero="int", paired=True))["scale"] == "*i32"
    assert types_of(GemmW())["scale"] == "*fp32" and types_of(GemmW(zero="float"))["zero"] == "*fp32"
    assert types_of(Gemm8(codes="fp8"))["x"] == "*fp8e4nv" and types_of(Gemm8(parts=True))["out"] == "*i32"
    assert types_of(SumK(codes="int8"))["sums"] == "*i32" and types_of(SumK("fp16"))["sums"] == "*fp32"
