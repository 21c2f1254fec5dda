"""A kernel that is called again: the JIT decides once for dtypes and alignments, and arguments go where they belong."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, randn

from qcompile.codegen.triton.kernels.spec import SumK
from qcompile.codegen.triton.launch import kernel_call
from qcompile.codegen.triton.launch.kernel_call import TENSORS, KernelCall
from qcompile.codegen.triton.launch.tiles import Launch

LAUNCH = Launch(1, 32, 4, 1)


def tensors(**given):
    return [given.get(name) for name in TENSORS]


def test_arguments_are_those_of_their_names():
    sums, bias, out = randn(3, 2, 40), randn(40, dtype=torch.float16), torch.empty(2, 40, device=DEVICE).half()
    call = KernelCall(SumK("fp16", bias=True), LAUNCH, (2, 2), M=2, N=40, parts=3)
    call(tensors(sums=sums, bias=bias, out=out))
    assert torch.allclose(out, (sums.sum(0) + bias.float()).half(), atol=2e-3) and call.grid == (2, 2, 1)


class Compiled:
    """What the JIT gives back: kernel[grid] launches."""

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("compiled", grid, arguments))


class Jit:
    arg_names = ("sums", "out", "M", "N", "parts", "BLOCK_N")

    def __init__(self):
        self.log = []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.log.append(("jit", grid, arguments, options))
            return Compiled(self.log)

        return launch


def test_the_jit_is_asked_once_for_each_dtype_and_alignment(monkeypatch):
    jit = Jit()
    monkeypatch.setattr(kernel_call, "kernel", lambda spec: jit)
    call = KernelCall(SumK("fp16"), LAUNCH, (2,), M=2, N=40, parts=3)
    whole = torch.zeros(241)
    aligned, shifted = whole[:240].view(3, 2, 40), whole[1:].view(3, 2, 40)
    out = torch.zeros(2, 40)
    for sums in (aligned, aligned, shifted, aligned.half(), shifted):
        call(tensors(sums=sums, out=out))
    assert [entry[0] for entry in jit.log] == ["jit", "compiled", "jit", "jit", "compiled"]
    assert all(entry[1] == (2, 1, 1) and entry[2][2:] == (2, 40, 3, 32) for entry in jit.log)
    assert jit.log[1][2][0] is aligned and jit.log[4][2][0] is shifted and jit.log[0][3]["num_warps"] == 4


def test_a_missing_tensor_is_a_mistake_of_ours(monkeypatch):
    monkeypatch.setattr(kernel_call, "kernel", lambda spec: Jit())
    with pytest.raises(AssertionError):
        KernelCall(SumK("fp16"), LAUNCH, (2,), M=2, N=40, parts=3)(tensors(out=torch.zeros(2, 40)))


def test_a_compiled_kernel_is_of_one_device(monkeypatch):
    """Two equal GPUs share a plan; what the JIT loaded on one is not launched on the other."""
    jit = Jit()
    monkeypatch.setattr(kernel_call, "kernel", lambda spec: jit)

    class On(torch.Tensor):
        index = 0

        def get_device(self):
            return self.index

    call = KernelCall(SumK("fp16"), LAUNCH, (2,), M=2, N=40, parts=3)
    sums, out = (torch.zeros(size).as_subclass(On) for size in ((3, 2, 40), (2, 40)))
    for index in (0, 0, 1, 1):
        sums.index = out.index = index
        call(tensors(sums=sums, out=out))
    assert [entry[0] for entry in jit.log] == ["jit", "compiled", "jit", "compiled"]
