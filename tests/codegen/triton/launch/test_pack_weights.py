"""Weights packed by the kernel `pack` and by torch: the same bytes."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, randn

from qcompile.codegen.triton.kernels.weight_layout import layout_of, unpack_weight
from qcompile.codegen.triton.launch import pack_weights
from qcompile.codegen.triton.launch.pack_weights import pack_by_kernel, pack_by_torch, prepare
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import pack_codes
from qcompile.numerics.rounding import quantize_tensor

STORED = ["int2/group64/zero", "int2/group16", "int3/group128", "int3/group16/zero", "int4/group128",
          "int4/group32/zero", "int4/group16/floatzero", "int8/row", "int8/group64/zero",
          "int4/group64/zero/dual"]  # fmt: skip


@pytest.mark.parametrize("form", STORED)
def test_packing_by_the_kernel_is_the_same(form):
    form = Format.parse(form)
    layout = layout_of(form)
    for n, k in ((1, 16), (3, 200), (65, 130), (70, 257), (129, 384), (0, 128)):
        codes = torch.randint(form.qmin, form.qmax + 1, (n, k), generator=torch.Generator().manual_seed(k))
        stored = pack_codes(codes.to(form.code_dtype), form).to(DEVICE)
        want = pack_by_torch(stored, form, layout, k)
        got = pack_by_kernel(stored, form, layout, k)
        assert got.dtype == want.dtype and torch.equal(got, want)
        assert torch.equal(unpack_weight(got, layout, k).int().cpu() + form.qmin, codes.int())


def test_weights_on_a_gpu_are_packed_there(monkeypatch):
    """Nothing is unpacked in torch, and the result is that of a CPU."""
    form = Format.parse("int3/group64/zero")
    parts = quantize_tensor(randn(40, 192).cpu(), form).stored_parts
    want = prepare(*parts, form, 192, torch.bfloat16)
    monkeypatch.setattr(pack_weights, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(pack_weights, "pack_by_torch", lambda *_: pytest.fail("unpacked"))
    got = prepare(*[None if t is None else t.to(DEVICE) for t in parts], form, 192, torch.bfloat16)
    assert got[2] is want[2] is None and want[1].dtype == torch.int32  # scales with their zero points
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(got[:2], want[:2], strict=True))


def test_a_format_without_a_layout_is_named():
    with pytest.raises(ValueError, match="fp8.*no kernel reads"):
        prepare(torch.zeros(2, 32), torch.ones(2, 1), None, None, Format.parse("fp8/row"), 32, torch.bfloat16)
