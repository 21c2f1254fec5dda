"""The kernels that are compiled ahead of time: each once, with a text that reads back."""

from __future__ import annotations

from qcompile.codegen.triton.aot.budget import read
from qcompile.codegen.triton.aot.compile_kernels import ARCHITECTURES
from qcompile.codegen.triton.aot.shipped_kernels import shipped
from qcompile.codegen.triton.kernels.parse_spec import parse


def test_every_shipped_kernel_reads_back_and_none_is_there_twice():
    for arch in ARCHITECTURES:
        names = [str(kernel) for kernel in shipped(arch)]
        assert len(set(names)) == len(names)
        assert all(parse(str(kernel.spec)) == kernel.spec for kernel in shipped(arch))


def test_every_shipped_kernel_has_a_budget():
    for arch in ARCHITECTURES:
        assert {str(kernel) for kernel in shipped(arch)} == set(read()["kernels"][str(arch)])


def test_fp8_is_shipped_where_there_is_hardware():
    assert not any("fp8" in str(kernel) for kernel in shipped(80)) and any("fp8" in str(k) for k in shipped(89))
