"""gemm_w4a8 in the interpreter: integer sums to the last bit, over ragged sizes, groups, epilogues and split-K."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, assert_close, epilogue_sum, randn, random_epilogue, random_int8
from w4a8_weights import FORMS, byte_weight

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8
from qcompile.codegen.triton.launch.gemm import Epilogue
from qcompile.codegen.triton.launch.pack_weights import pack_by_kernel, pack_by_torch
from qcompile.codegen.triton.launch.w4a8 import linear_w4a8, plan_w4a8, prepare_w4a8
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

SHAPES = [(1, 24, 256), (20, 130, 330), (40, 70, 257), (70, 24, 128), (3, 40, 40)]  # and no multiples of a tile


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_integer_sums_are_exact(form, split_k):
    for m, n, k in SHAPES:
        weight, values = byte_weight(form, n, k)
        (x,) = random_int8((m, k))
        exact = x.double() @ values.t()
        assert float(exact.abs().max()) < 2**24  # so that float32 holds it
        weight = type(weight)(weight.packed, weight.steps, torch.full((n, 1), 2.0**-8, device=DEVICE), weight.layout, k)
        ones = torch.ones(m, 1, device=DEVICE)
        got = linear_w4a8(x, ones, weight, Epilogue(), torch.float16, split_k)
        assert torch.equal(got, (exact.float() * 2.0**-8).half())


@pytest.mark.parametrize("act", ["row", "tensor"])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("names", [("bias",), ("residual",), ("bias", "residual"), ("low", "up"),
                                   ("bias", "residual", "low", "up")])  # fmt: skip
def test_scales_and_epilogues(names, split_k, act):
    for m, n, k in SHAPES[1:3]:
        weight, values = byte_weight("int4/group64/zero/dual", n, k)
        (x,) = random_int8((m, k))
        x_scale, epilogue = randn(m if act == "row" else 1, 1).abs(), random_epilogue(names, m, n, 5, torch.bfloat16)
        want = (x.double() @ values.t()) * x_scale.double() * weight.scale.double().t() + epilogue_sum(epilogue)
        got = linear_w4a8(x, x_scale, weight, epilogue, torch.bfloat16, split_k)
        assert_close(got, want, want.abs() * 0 + 1, torch.bfloat16, 2**-12)
        assert torch.equal(got, linear_w4a8(x, x_scale, weight, epilogue, torch.bfloat16, split_k))


def test_the_reach_of_a_group_is_used():
    """Products of a code and s1 beyond a byte: s1 up to 127, where |s1 (q - z)| is 127 still."""
    weight, values = byte_weight("int4/group32/zero/dual", 16, 64, extreme=True)
    assert int((weight.steps << 24 >> 24).max()) == 127 and int((weight.steps >> 8).max()) > 255
    (x,) = random_int8((5, 64))
    got = linear_w4a8(x, torch.ones(5, 1, device=DEVICE), weight, Epilogue(), torch.float16)
    assert torch.equal(got, (x.double() @ values.t()).float().mul(weight.scale.t()).half())


@pytest.mark.parametrize("form", ["int4/group64/dual", "int4/group32/zero/dual", "int4/row/zero"])
def test_packing_by_the_kernel_is_the_same(form):
    form = Format.parse(form)
    for n, k in ((3, 200), (70, 257)):
        stored = quantize_tensor(torch.randn(n, k), form).stored().to(DEVICE)
        want = pack_by_torch(stored, form, byte_layout_of(form), k)
        assert torch.equal(pack_by_kernel(stored, form, byte_layout_of(form), k), want)


def test_tiles_leave_room_for_a_correction():
    tiles = []
    for rank in (0, 64, 65, 129):
        gemm = plan_w4a8(Gpu(), GemmW4A8(low_rank=rank), 1000, 4096, 4096).gemm
        tiles.append((gemm.launch.block_m, gemm.launch.block_n, gemm.grid[0]))
    assert tiles[0] == tiles[1] and tiles[2] == (128, 128, 8 * 32) and tiles[3] == (32, 128, 32 * 32)


def test_no_rows():
    weight, _ = byte_weight("int4/group128/zero/dual", 24, 128)
    x, scale = torch.zeros(0, 128, dtype=torch.int8, device=DEVICE), torch.ones(0, 1, device=DEVICE)
    assert linear_w4a8(x, scale, weight, Epilogue(), torch.float16).shape == (0, 24)


@pytest.mark.parametrize("form", ["int4/group16/zero/dual", "int4/group128/zero", "int8/row"])
def test_other_formats_are_refused(form):
    q = quantize_tensor(torch.randn(8, 64), Format.parse(form))
    with pytest.raises(ValueError, match=f"{form}: no kernel multiplies"):
        prepare_w4a8(*q.stored_parts, q.format, 64)
