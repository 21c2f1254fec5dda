"""Every template against float64 on the same codes: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from qcompile.codegen.triton import triton_ops as _register  # noqa: F401
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.kernels.weight_layout import layout_of, pack_weight, unpack_weight
from qcompile.codegen.triton.launch import gemm as products
from qcompile.codegen.triton.launch import pack_weights as preparing
from qcompile.codegen.triton.launch import row_quant as rows
from qcompile.codegen.triton.launch.gemm import Epilogue, PackedWeight, linear_a8, linear_w
from qcompile.codegen.triton.launch.pack_weights import pack_plain, pack_stored, prepare
from qcompile.codegen.triton.launch.tiles import Launch
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard, random_signs
from qcompile.numerics.qtensor import pack_codes
from qcompile.numerics.rounding import quantize_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

if DEVICE == "cpu":
    import interpreter  # noqa: F401  a bfloat16 that is one


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def weight_of(form, n, k, seed=1):
    """A packed weight and its numbers, [N, K] float64."""
    q = quantize_tensor(randn(n, k, seed=seed).cpu(), Format.parse(form))
    parts = prepare(q.stored(), q.scale, q.zero, q.group_scale, q.format, k)
    packed, scale, zero = (None if t is None else t.to(DEVICE) for t in parts)
    return PackedWeight(packed, scale, zero, layout_of(q.format), k), q.dequantize(torch.float64).to(DEVICE)


def epilogue(names, m, n, rank, dtype):
    made = dict(
        bias=randn(n, dtype=dtype, seed=2), residual=randn(m, n, dtype=dtype, seed=3),
        low=randn(m, rank, dtype=dtype, seed=4), up=randn(n, rank, dtype=dtype, seed=5),
    )  # fmt: skip
    return Epilogue(**{name: made[name] for name in names})


def added(more):
    total = 0.0
    for tensor in (more.bias, more.residual):
        total = total if tensor is None else total + tensor.double()
    return total if more.up is None else total + more.low.double() @ more.up.double().t()


def close(got, want, size, dtype, c):
    """|got - want| <= u |want| + c |x| |W|, elementwise, and 3e-3 (bf16) of the norm."""
    error = (got.double() - want).abs()
    assert not error.isnan().any()
    bound = UNIT[dtype] * want.abs() + c * size + 1e-6
    assert bool((error <= bound).all()), float((error / bound).max())
    assert float(error.norm() / want.norm()) < UNIT[dtype]


@pytest.mark.parametrize("bits,k", [(2, 128), (3, 200), (4, 64), (4, 300), (8, 65)])
def test_packing(bits, k):
    form = Format(f"int{bits}", "group", 64, "int")
    layout = layout_of(form)
    codes = torch.randint(0, 2**bits, (7, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_weight(codes, layout)
    assert packed.shape == (7, -(-k // layout.block) * layout.block * bits // 8)
    assert torch.equal(unpack_weight(packed, layout, k), codes)


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
        want = pack_plain(stored, form, layout, k)
        got = pack_stored(stored, form, layout, k)
        assert got.dtype == want.dtype and torch.equal(got, want)
        assert torch.equal(unpack_weight(got, layout, k).int().cpu() + form.qmin, codes.int())


def test_weights_on_a_gpu_are_packed_there(monkeypatch):
    """Nothing is unpacked in torch, and the result is that of a CPU."""
    form = Format.parse("int3/group64/zero")
    q = quantize_tensor(randn(40, 192).cpu(), form)
    parts = [q.stored(), q.scale, q.zero, q.group_scale]
    want = prepare(*parts, form, 192)
    monkeypatch.setattr(preparing, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(preparing, "pack_plain", lambda *_: pytest.fail("unpacked"))
    got = prepare(*[None if t is None else t.to(DEVICE) for t in parts], form, 192)
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(got, want, strict=True))


FORMS = ["int4/group128", "int4/group128/zero", "int4/group64/floatzero", "int4/group32/zero", "int4/row",
         "int8/row", "int8/group64/zero", "int3/group128/zero", "int3/group64", "int2/group64/zero",
         "int2/group32/floatzero", "int4/group256/zero", "int4/group64/zero/dual", "int4/group64/dual"]  # fmt: skip
SHAPES = [(1, 24, 256), (3, 80, 320), (7, 70, 256), (40, 66, 272)]  # rows of gemv, and no multiples of a tile


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_weight_only(form, dtype):
    group = Format.parse(form).group or 1
    for m, n, k in SHAPES:
        k = max(k, group)
        weight, numbers = weight_of(form, n, k)
        x = randn(m, k, dtype=dtype)
        want, size = x.double() @ numbers.t(), x.double().abs() @ numbers.abs().t()
        close(
            linear_w(x, weight, Epilogue()),
            want,
            size,
            dtype,
            2**-14 if m <= 32 and "float" not in form else UNIT[dtype],
        )


@pytest.mark.parametrize(
    "names",
    [n for r in (1, 2) for n in itertools.combinations(("bias", "residual"), r)]
    + [("low", "up"), ("bias", "residual", "low", "up")],
)
@pytest.mark.parametrize("m", [2, 20, 40])
def test_epilogues(names, m, monkeypatch):
    dtype, n, k = torch.float16, 70, 512
    weight, numbers = weight_of("int4/group64/zero", n, k)
    x, more = randn(m, k, dtype=dtype), epilogue(names, m, n, 5, dtype)
    want, size = x.double() @ numbers.t() + added(more), x.double().abs() @ numbers.abs().t()
    for parts in (1, 3):
        monkeypatch.setattr(products, "parts_of", lambda *_, parts=parts: parts)
        got = linear_w(x, weight, more)
        close(got, want, size, dtype, UNIT[dtype])
        assert torch.equal(got, linear_w(x, weight, more))
    close(linear_w(x, weight, more, way="dequant"), want, size, dtype, 2 * UNIT[dtype])


@pytest.mark.parametrize("act", ["row", "tensor"])
@pytest.mark.parametrize("m,n,k", [(1, 40, 256), (20, 70, 200), (40, 130, 384)])
@pytest.mark.parametrize("parts", [1, 2])
def test_int8(act, m, n, k, parts, monkeypatch):
    monkeypatch.setattr(products, "parts_of", lambda *_: parts)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, s, dtype=torch.int8, generator=generator).to(DEVICE) for s in ((m, k), (n, k)))
    exact = x.double() @ w.double().t()
    ones = torch.ones(1, 1, device=DEVICE).expand(m if act == "row" else 1, 1).contiguous()
    got = linear_a8(x, ones, w, torch.full((n, 1), 2.0**-8, device=DEVICE), Epilogue(), torch.float16)
    assert torch.equal(got, (exact * 2.0**-8).half())  # sums below 2^24: exact until the last rounding
    steps, scale = randn(m if act == "row" else 1, 1).abs(), randn(n, 1, seed=6).abs() / k
    more = epilogue(("bias", "residual"), m, n, 0, torch.bfloat16)
    want = exact * steps.double() * scale.double().t() + added(more)
    close(linear_a8(x, steps, w, scale, more, torch.bfloat16), want, want.abs() * 0 + 1, torch.bfloat16, 2**-18)


def test_fp8():
    m, n, k = 20, 70, 256
    x, w = (randn(*s, seed=s[0]).to(torch.float8_e4m3fn) for s in ((m, k), (n, k)))
    steps, scale = randn(m, 1).abs(), randn(n, 1, seed=6).abs() / k
    more = epilogue(("low", "up"), m, n, 5, torch.bfloat16)
    size = (x.double().abs() @ w.double().abs().t()) * steps.double() * scale.double().t()
    want = (x.double() @ w.double().t()) * steps.double() * scale.double().t() + added(more)
    close(linear_a8(x, steps, w, scale, more, torch.bfloat16), want, size, torch.bfloat16, 2**-12)


@pytest.mark.skipif(DEVICE == "cuda", reason="the operators run the kernels there")
@pytest.mark.parametrize(
    "form", ["int4/group128/zero", "int3/group64", "int4/group64/floatzero", "int4/group64/zero/dual"]
)
def test_the_cpu_version_of_a_product_is_what_the_kernel_computes(form):
    weight, _ = weight_of(form, 40, 272)
    x, more = randn(7, 272, dtype=torch.float16), epilogue(("bias", "residual", "low", "up"), 7, 40, 5, torch.float16)
    extra = (more.bias, more.residual, more.low, more.up)
    got = torch.ops.qcompile_triton.linear_w(x, weight.packed, weight.scale, weight.zero, *extra, form, 272)
    assert torch.allclose(got, linear_w(x, weight, more), rtol=2e-3, atol=2e-2)


@pytest.mark.skipif(DEVICE == "cuda", reason="the operators run the kernels there")
def test_the_cpu_version_of_an_integer_product_is_what_the_kernel_computes():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, s, dtype=torch.int8, generator=generator) for s in ((7, 96), (40, 96)))
    steps, scale = randn(7, 1).abs() / 99, randn(40, 1, seed=6).abs() / 99
    more = epilogue(("bias", "residual", "low", "up"), 7, 40, 5, torch.float16)
    extra = (more.bias, more.residual, more.low, more.up)
    got = torch.ops.qcompile_triton.linear_a8(x, steps, w, scale, *extra, torch.float16)
    assert torch.allclose(got, linear_a8(x, steps, w, scale, more, torch.float16), rtol=2e-3, atol=2e-2)


def test_no_rows():
    weight, _ = weight_of("int4/group64", 24, 128)
    assert linear_w(randn(0, 128, dtype=torch.float16), weight, Epilogue()).shape == (0, 24)


# -- rows ------------------------------------------------------------------------------------------


def reference(spec, x, eps, t):
    """float64 numbers of a row before they are rounded, the sum with the residual, and what norm or gate gives."""
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
    RowQuant("bf16", first="rms", residual=True, value=True),
    RowQuant("fp16", first="layer", value=True, group=32),
    RowQuant("bf16", first="gate", value=True, smooth=True),
    RowQuant("fp16", hadamard=192, first="rms", value=True, smooth=True),
    RowQuant("bf16", hadamard=192, first="rms", residual=True),
]


@pytest.mark.parametrize("spec", CASES, ids=str)
def test_rows(spec):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[spec.dtype]
    for m, k in ((1, 64), (5, 200)):
        k = spec.hadamard or k
        x = randn(m, k, dtype=dtype) * 3
        x[m - 1] = 0  # its step would be zero
        given = dict(
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
        tensors = {name: tensor for name, tensor in tensors.items() if given[name]}
        got = rows.row_quant(spec, x, 1e-5, **tensors)
        want, total, value = reference(spec, x, 1e-5, tensors)
        if total is not None:
            assert torch.equal(got["total"], total)
        if spec.value:
            assert torch.allclose(got["value"].double(), value, rtol=UNIT[dtype], atol=1e-6)
            bare = rows.row_quant(dataclasses.replace(spec, value=False), x, 1e-5, **tensors)
            assert all(torch.equal(bare[name], got[name]) for name in bare) and "value" not in bare
        if DEVICE == "cpu":  # the operator's own version
            named = [tensors.get(name) for name in ("residual", "gate", "gain", "shift", "smooth", "signs")]
            codes, scale, *both = torch.ops.qcompile_triton.row_quant(x, *named, 1e-5, str(spec))
            assert torch.allclose(scale, got["scale"], rtol=1e-5)
            for name, tensor in zip(("total", "value"), both, strict=True):  # empty where it is not written
                assert torch.allclose(tensor, got.get(name, x[:0, 0]), rtol=4 * UNIT[dtype], atol=1e-6)
            assert float((codes.float() != got["codes"].float()).float().mean()) < 0.01  # the other side of a step
        codes, scale = got["codes"], got["scale"].double()
        if spec.codes == "int4":
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).int() - 8
        numbers = codes.double() * (scale.repeat_interleave(spec.group, 1)[:, :k] if spec.group else scale)
        max_value = {"int8": 127, "int4": 7, "fp8": 448}[spec.codes]
        padded = torch.nn.functional.pad(want, (0, -k % (spec.group or k)))
        peaks = padded.unflatten(-1, (-1, spec.group or k)).abs().amax(-1)
        steps = torch.where(peaks > 0, peaks / max_value, torch.ones_like(peaks))
        assert torch.allclose(scale, steps, rtol=1e-4)
        expand_groups = steps.repeat_interleave(spec.group or k, 1)[:, :k]
        # half a step: of e4m3 in proportion to the number, but for the smallest
        half = 2**-4 * want.abs() + 2**-10 * expand_groups if spec.codes == "fp8" else 0.5 * expand_groups
        assert bool(((numbers - want).abs() <= half * 1.002 + 1e-12).all()), float(
            ((numbers - want).abs() / expand_groups).max()
        )


def test_steps_that_halve_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0]], device=DEVICE).half()
    assert rows.row_quant(RowQuant("fp16"), x)["codes"].tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]


def test_launch_sizes_reach_the_kernel(monkeypatch):
    seen = []
    weight, _ = weight_of("int4/group64", 24, 128)
    real = products.run
    monkeypatch.setattr(
        products, "run", lambda spec, grid, how, **a: (seen.append((spec, grid, how)), real(spec, grid, how, **a))
    )
    monkeypatch.setattr(products, "launch_for", lambda *_: Launch(16, 16, 4, 2))
    linear_w(randn(17, 128, dtype=torch.float16), weight, Epilogue())
    (spec, grid, how) = seen[0]
    assert grid[0] == 2 * 2 and how.channels == 16 and dataclasses.replace(spec, parts=False).scaled == "sums"


def test_the_rows_choose_the_kernel_when_it_runs(monkeypatch, tmp_path):
    """One packed weight, any number of rows: nothing about them is fixed when a graph is lowered."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    weight, numbers = weight_of("int4/group64", 24, 128)
    seen, real = [], products.run

    def run(spec, grid, how, **arguments):
        seen.append((spec.template, how.rows))
        real(spec, grid, how, **arguments)

    monkeypatch.setattr(products, "run", run)
    for m, want in ((1, ("gemv_w", 1)), (4, ("gemv_w", 1)), (5, ("gemm_w", 16)), (33, ("gemm_w", 64)),
                    (65, ("gemm_w", 128)), (1024, ("gemm_w", 128)), (1025, ("dequant", 1))):  # fmt: skip
        x = randn(m, 128, dtype=torch.float16)
        del seen[:]
        got = linear_w(x, weight, Epilogue())
        assert seen[0] == want
        close(got, x.double() @ numbers.t(), x.double().abs() @ numbers.abs().t(), torch.float16, UNIT[torch.float16])
