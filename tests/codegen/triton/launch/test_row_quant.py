"""row_quant against float64: every norm, gate, transform and code type."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import DEVICE, UNIT_ROUNDOFF, randn

from qcompile.codegen.triton import triton_ops as _register  # noqa: F401
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.launch.row_quant import (
    TENSORS,
    fuses_hadamard,
    num_warps,
    plan_row_quant,
    row_quant,
    row_stride,
    transform_matrices,
)
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard, random_signs
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_tensor

OPERANDS = TENSORS[1:-4]


def reference(spec, x, eps, t):
    """float64 values of a row before they are quantized, the sum with the residual, and what norm or gate gives."""
    total = None
    if spec.residual:
        total = (x.float() + t["residual"].float()).to(x.dtype)
        x = total
    v = x.double()
    if spec.first == "rms":
        v = v / (v.square().mean(-1, keepdim=True) + eps).sqrt() * t["gain"].double()
    elif spec.first == "layer":
        v = torch.nn.functional.layer_norm(v, v.shape[-1:], t["gain"].double(), t["shift"].double(), eps)
    elif spec.first == "gate":
        v = torch.nn.functional.silu(v) * t["gate"].double()
    value = v
    if spec.smooth:
        v = v / t["smooth"].double()
    if spec.hadamard:
        v = apply_hadamard(v, t["signs"].double())
    return v, total, value


CASES = [
    RowQuant("bf16"),
    RowQuant("fp16", codes="int4"),
    RowQuant("bf16", codes="fp8"),
    RowQuant("bf16", first="rms", residual=True),
    RowQuant("fp16", first="layer"),
    RowQuant("bf16", first="gate", smooth=True),
    RowQuant("fp16", group=32),
    RowQuant("bf16", group=32, codes="int4", first="rms"),
    RowQuant("fp16", group=64, codes="fp8"),
    RowQuant("bf16", hadamard=320),
    RowQuant("fp16", hadamard=256, first="gate", codes="int4"),
    RowQuant("fp16", hadamard=256, first="gate", codes="int4", group=32),
    RowQuant("bf16", hadamard=320, codes="int4", group=128),
    RowQuant("fp16", group=256),
    RowQuant("bf16", first="rms", residual=True, value=True),
    RowQuant("fp16", first="layer", value=True, group=32),
    RowQuant("bf16", first="gate", value=True, smooth=True),
    RowQuant("fp16", hadamard=192, first="rms", value=True, smooth=True),
    RowQuant("bf16", hadamard=192, first="rms", residual=True),
]


def operands_of(spec, m, k, dtype):
    needed = dict(
        residual=spec.residual, gate=spec.first == "gate", gain=spec.first in ("rms", "layer"),
        shift=spec.first == "layer", smooth=spec.smooth, signs=bool(spec.hadamard),
    )  # fmt: skip
    tensors = dict(
        residual=randn(m, k, dtype=dtype, seed=1) * (m > 1),
        gate=randn(m, k, dtype=dtype, seed=2),
        gain=randn(k, dtype=dtype, seed=3),
        shift=randn(k, dtype=dtype, seed=4),
        smooth=randn(k, seed=5).abs() + 0.1,
        signs=random_signs(k, 0).float().to(DEVICE),
    )
    found = {name: tensor for name, tensor in tensors.items() if needed[name]}
    sides = transform_matrices(spec, torch.device(DEVICE)) if spec.hadamard else ()
    return found | dict(zip(("left", "right"), sides))  # noqa: B905  none without a transform


def results_of(spec, x, tensors):
    """What a spec writes, by name."""
    results = dict(zip(TENSORS[-4:], row_quant(spec, x, 1e-5, **tensors), strict=True))
    written = dict(total=spec.residual, value=spec.value)
    assert all(results[name].numel() == 0 for name, there in written.items() if not there)
    return {name: tensor for name, tensor in results.items() if written.get(name, True)}


@pytest.mark.parametrize("spec", CASES, ids=str)
def test_rows(spec):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[spec.dtype]
    for m, k in ((1, 64), (5, 200)):
        k = spec.hadamard or k
        x = randn(m, k, dtype=dtype) * 3
        x[m - 1] = 0  # its scale would be zero
        tensors = operands_of(spec, m, k, dtype)
        got = results_of(spec, x, tensors)
        want, total, value = reference(spec, x, 1e-5, tensors)
        if total is not None:
            assert torch.equal(got["total"], total)
        if spec.value:
            assert torch.allclose(got["value"].double(), value, rtol=UNIT_ROUNDOFF[dtype], atol=1e-6)
            bare = results_of(dataclasses.replace(spec, value=False), x, tensors)
            assert all(torch.equal(bare[name], got[name]) for name in bare) and "value" not in bare
        if DEVICE == "cpu":  # the operator's own version
            named = [tensors.get(name) for name in OPERANDS]
            codes, scale, *both = torch.ops.qcompile_triton.row_quant(x, *named, 1e-5, str(spec))
            assert torch.allclose(scale, got["scale"], rtol=1e-5)
            for name, tensor in zip(("total", "value"), both, strict=True):  # empty where it is not written
                assert torch.allclose(tensor, got.get(name, x[:0, 0]), rtol=4 * UNIT_ROUNDOFF[dtype], atol=1e-6)
            assert float((codes.float() != got["codes"].float()).float().mean()) < 0.01  # rounded to the next code
        codes, scale = got["codes"], got["scale"].double()
        dequantized = codes.double() * (scale.repeat_interleave(spec.group, 1)[:, :k] if spec.group else scale)
        max_value = {"int8": 127, "int4": 7, "fp8": 448}[spec.codes]
        padded = torch.nn.functional.pad(want, (0, -k % (spec.group or k)))
        peaks = padded.unflatten(-1, (-1, spec.group or k)).abs().amax(-1)
        scales = torch.where(peaks > 0, peaks / max_value, torch.ones_like(peaks))
        assert torch.allclose(scale, scales, rtol=1e-4)
        expanded = scales.repeat_interleave(spec.group or k, 1)[:, :k]
        # half the distance of codes: of e4m3 in proportion to the value, but for the smallest
        half = 2**-4 * want.abs() + 2**-10 * expanded if spec.codes == "fp8" else 0.5 * expanded
        error = (dequantized - want).abs()
        assert bool((error <= half * 1.002 + 1e-12).all()), float((error / expanded).max())


def test_halves_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0]], device=DEVICE).half()
    assert row_quant(RowQuant("fp16"), x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]


def test_parts_of_wider_rows_are_read_where_they_are():
    """Gate and up of one product, in rows of both."""
    spec, both = RowQuant("fp16", first="gate"), randn(5, 2 * 64, dtype=torch.float16)
    plan = plan_row_quant(spec, 5, 64, 0.0, row_stride(both[:, 64:]), row_stride(both[:, :64]))
    got = plan.run((both[:, :64], None, both[:, 64:], *[None] * 6))
    want = row_quant(spec, both[:, :64].contiguous(), gate=both[:, 64:].contiguous())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[0].is_contiguous()


@pytest.mark.parametrize("spec", [RowQuant("bf16"), RowQuant("bf16", codes="fp8"), RowQuant("fp16", group=32)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
def test_nan_stays_nan_in_its_group_and_touches_no_other(spec, bad):
    x = randn(3, 64, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[spec.dtype])
    clean = row_quant(spec, x)
    x[1, 40] = bad
    codes, scale, *_ = row_quant(spec, x)
    of_cpu = torch.ops.qcompile_triton.row_quant(x.cpu(), *[None] * len(OPERANDS), 0.0, str(spec))[1]
    for found in (scale.cpu(), of_cpu):
        assert bool(found[1, -1].isnan()) and not bool(found[[0, 2]].isnan().any())
    assert torch.equal(codes[[0, 2]], clean[0][[0, 2]]) and (not spec.group or not bool(scale[1, 0].isnan()))


def test_warps_grow_with_the_row():
    assert [num_warps(RowQuant(), k) for k in (64, 512, 4096, 14336, 32768)] == [1, 1, 8, 16, 32]
    assert [num_warps(RowQuant(first="rms", value=True), k) for k in (64, 256, 4096, 14336)] == [1, 1, 16, 32]


def test_a_transform_is_fused_where_a_row_fits_into_registers():
    assert [fuses_hadamard(n, (9, 0)) for n in (4096, 14336, 16384, 32768, 11008)] == [True, True, True, False, False]
    assert fuses_hadamard(8192, (8, 0)) and not fuses_hadamard(14336, (8, 0)) and not fuses_hadamard(64, (10, 0))


def test_the_two_matrices_of_a_transform_make_it():
    spec = RowQuant(hadamard=320)
    left, right = transform_matrices(spec, torch.device("cpu"))
    whole = torch.kron(left[: spec.left, : spec.left].t().double().contiguous(), right.double()) / 320**0.5
    x = randn(3, 320).double().cpu()
    assert torch.allclose(x @ whole, apply_hadamard(x, torch.ones(320).double()))


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("name", ["none", "rms"])
def test_codes_less_their_zero_points(name, group):
    """As the format defines them, in the kernel and in the operator's own version."""
    form = Format.parse(f"int4/group{group}/zero" if group else "int4/row/zero")
    for m, k in ((1, 64), (5, 200)):
        x = randn(m, k, dtype=torch.float16) * 3 + 2
        x[m - 1] = 0
        spec = RowQuant("fp16", first=name, codes="int4", group=group, zero=True)
        tensors = operands_of(spec, m, k, torch.float16)
        want = quantize_tensor(reference(spec, x, 1e-5, tensors)[0].float().cpu(), form)
        centered = want.codes.int() - expand_groups(want.zero.int(), form, k)
        got = row_quant(spec, x, 1e-5, **tensors)
        named = [tensors.get(operand) for operand in OPERANDS]
        own = torch.ops.qcompile_triton.row_quant(x, *named, 1e-5, str(spec))
        for codes, scale, *_ in (got, own):
            assert codes.dtype == torch.int8 and int(codes.abs().max()) <= 15
            assert torch.allclose(scale.cpu(), want.scale, rtol=1e-5)
            different = codes.cpu().int() != centered
            assert float(different.float().mean()) < 0.01  # a scale one unit away moves a tie
            if name == "none" and codes is own[0]:
                assert not different.any()
