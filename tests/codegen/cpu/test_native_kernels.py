"""Operators of the CPU target: the exact integer sums, float64 within rounding, the same on every instruction set."""

from __future__ import annotations

import itertools
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import (
    EXACT_OPS,
    FLOATS,
    INT8_OPS,
    OPS,
    assert_right,
    assert_right_for_rows,
    assert_same,
    call,
    ints,
    operands,
)

from qcompile.codegen.cpu import native_kernels as native
from qcompile.codegen.cpu.amx_tiles import has_amx_tiles
from qcompile.codegen.cpu.weight_packing import pack_bytes, pack_group_pairs, pack_groups, pack_nibbles
from qcompile.numerics.fp4 import decode_e2m1

ROWS = [*range(1, 14), 16, 17, 25, 40]  # every panel of rows, one panel and several
SHAPES = [(1, 1), (3, 5), (64, 32), (100, 41), (264, 33), (576, 80), (2048, 96)]  # K, N
GROUPS = {1: 8, 3: 32, 64: 24, 100: 8, 264: 48, 576: 128, 2048: 248}  # odd counts, ragged ones, beyond the row


@pytest.fixture(scope="module", autouse=True)
def loaded():
    native.load_native_kernels()


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k,n", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_every_number_of_rows(op, k, n):
    assert_right_for_rows(op, ROWS, k, n, GROUPS[k])
    if op not in EXACT_OPS:
        return
    for x in FLOATS:
        assert_right_for_rows(op, (1, 7, 13), k, n, GROUPS[k], x=x)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_no_columns(op, rows):
    """Sums of nothing are zero, whatever an earlier call left in its buffers."""
    before = operands(op, rows, 64, 33)
    call(op, before)
    a = operands(op, rows, 0, 33)
    assert_right(op, a, call(op, a))


@given(
    st.sampled_from(OPS),
    st.integers(0, 40),
    st.integers(1, 300),
    st.integers(0, 70),
    st.sampled_from([8, 16, 24, 32, 64, 128, 240, 248]),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_any_shape(op, m, k, n, group, x, dtype, codes, seed):
    torch.manual_seed(seed)
    a = operands(op, m, k, n, group, x=torch.int8 if codes and op in INT8_OPS else x, dtype=dtype, bias=bool(seed % 2))
    assert_right(op, a, call(op, a))


@pytest.mark.parametrize("zero", [None, "bytes", "floats"])
@pytest.mark.parametrize("step", ["bytes", "floats"])
@pytest.mark.parametrize("op", ["group_linear", "table_linear"])
def test_steps_and_zero_points_of_both_kinds(op, step, zero):
    for x, group in itertools.product(FLOATS, (8, 64, 2**40)):
        codes = torch.int8 if op == "group_linear" and group == 64 else x
        for m in (1, 3, 6, 20):
            a = operands(op, m, 200, 33, group, x=codes, zero=zero, step=step)
            assert_right(op, a, call(op, a))
            a["scale"] = None
            assert_right(op, a, call(op, a))


@pytest.mark.parametrize("x", FLOATS)
def test_a_table_of_small_floats(x):
    table = decode_e2m1(torch.arange(16, dtype=torch.uint8)).float()
    for m in (1, 2, 5, 12, 13, 30):
        a = operands("table_linear", m, 136, 40, 32, x=x, zero=None, table=table)
        assert_right("table_linear", a, call("table_linear", a))


def test_the_zero_bias_is_added_to_the_zero_point():
    codes, step = pack_nibbles(ints(3, 3, 1, 8)), pack_groups(torch.full((1, 1), 2.0))
    x, one = torch.ones(1, 8, dtype=torch.int8), torch.ones(())
    for zero, value in ((None, 8 * 2 * (3 - 0.25)), (pack_groups(ints(5, 5, 1, 1)), 8 * 2 * (3 - 5.25))):
        got = torch.ops.qcompile_cpu.group_linear(x, one, codes, step, zero, None, None, 0.25, 8, 1, torch.float32)
        assert float(got) == value
        table = torch.arange(16.0)
        got = torch.ops.qcompile_cpu.table_linear(
            x.float(), codes, table, step, zero, None, None, 0.25, 8, 1, torch.float32
        )
        assert float(got) == value


@pytest.mark.parametrize("rows", [2, 13, 34])  # the last by AMX tiles, where there are any
def test_the_largest_sums(rows):
    """Up to the last K where they are int32, though what is added on the way is not."""
    k = 2**17 - 1
    x = torch.tensor([-128, 127], dtype=torch.int8)[:, None].repeat(17, k)[:rows]
    w = torch.tensor([-128, 127, -127], dtype=torch.int8)[:, None].expand(3, k)
    ones = torch.ones(3)
    got = torch.ops.qcompile_cpu.int8_linear(x, torch.ones(()), pack_bytes(w), ones, None, 3, torch.float32)
    assert torch.equal(got, (x.double() @ w.double().t()).float())
    group, groups = 248, -(-k // 248)
    q = torch.tensor([15, 0, 7, 15], dtype=torch.uint8)[:, None].expand(4, k)
    z = torch.tensor([8, 7, 0, 15], dtype=torch.uint8)[:, None].expand(4, groups)
    step = torch.full((4, groups), 17, dtype=torch.uint8)
    weight = 17 * (q.double() - z[:, :1].double())
    got = torch.ops.qcompile_cpu.dual_linear(
        x, torch.ones(()), pack_nibbles(q), pack_groups(step), pack_group_pairs(step * z), torch.ones(4), None, group,
        4, torch.float32,
    )  # fmt: skip
    assert torch.equal(got, (x.double() @ weight.t()).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_are_rounded_to_even(dtype):
    """Sums of every integer of 127 a + b, many of them halfway between two results."""
    w = torch.cartesian_prod(torch.arange(-60, 60), torch.arange(-63, 64)).to(torch.int8)
    x, n = torch.tensor([[127, 1]], dtype=torch.int8), len(w)
    got = torch.ops.qcompile_cpu.int8_linear(x, torch.ones(()), pack_bytes(w), torch.ones(n), None, n, dtype)
    assert_same(got, (x.double() @ w.double().t()).to(dtype))


# -- rows that come as floats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", FLOATS)
@pytest.mark.parametrize("op", INT8_OPS)
def test_floats_are_quantized_as_the_dialect_does(op, x):
    for rows, k in ((1, 64), (5, 100), (13, 67)):
        a = operands(op, rows, k, 40, x=x)
        a["x"] = a["x"] * torch.logspace(-30, 4, rows)[:, None].to(x)
        a["x"][0, :3] = torch.tensor([127.0, 0.5, -1.5])  # ties of a scale that is one
        a["x"][0, 3:] = a["x"][0, 3:].clamp(-126, 126)
        a["x"][-1] = 0 if rows > 1 else a["x"][-1]
        codes, scale, _ = torch.ops.qcompile.quantize(a["x"], "int8/row")
        assert_same(call(op, a), call(op, a | {"x": codes, "x_scale": scale}))


@given(st.integers(1, 2**17 - 1), st.integers(-60, 60), st.integers(1, 40), st.integers(0, 2**30))
def test_ties_of_any_scale(mantissa, exponent, k, seed):
    """Values halfway between two codes, and the nearest floats on both sides: the codes of a division."""
    torch.manual_seed(seed)
    scale = torch.tensor(float(mantissa)) * 2.0**exponent  # times 127 or n + 1/2 it is a float32
    x = (torch.randint(-127, 127, (3, k)) + 0.5) * scale
    x = torch.stack(
        (x[0], torch.nextafter(x[1], torch.tensor(torch.inf)), torch.nextafter(x[2], torch.tensor(-torch.inf)))
    )
    x = torch.cat((torch.full((3, 1), 127.0) * scale, x), dim=1)
    codes, scales, _ = torch.ops.qcompile.quantize(x, "int8/row")
    k, one = x.shape[1], pack_bytes(torch.eye(x.shape[1], dtype=torch.int8))
    got = torch.ops.qcompile_cpu.int8_linear(x, None, one, torch.ones(k), None, k, torch.float32)
    assert_same(got, codes.float() * scales)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("op", OPS)
def test_a_row_of_no_finite_values_leaves_the_others_alone(op, bad):
    for x, rows in itertools.product(FLOATS, (3, 30)):
        a = operands(op, rows, 70, 33, x=x)
        want = call(op, a)
        a["x"][1, 69] = bad
        got = call(op, a)
        assert not got[1].isfinite().any()
        assert_same(torch.cat((got[:1], got[2:])), torch.cat((want[:1], want[2:])))


@pytest.mark.parametrize("dtype", FLOATS)
def test_not_a_number_stays_one(dtype):
    a = operands("int8_linear", 1, 64, 20, dtype=dtype)
    payload = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    for bad in (payload, -payload, torch.full((1, 1), torch.nan)):
        assert bool(call("int8_linear", a | {"x_scale": bad}).isnan().all())


# -- shapes and strides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (1, 1), (2, 3), (2, 1, 9)])
@pytest.mark.parametrize("op", OPS)
def test_rows_of_any_leading_shape(op, lead):
    for x in {torch.int8 if op in INT8_OPS else torch.float32, torch.bfloat16}:
        a = operands(op, lead, 72, 20, x=x)
        got = call(op, a)
        assert got.shape == (*lead, 20)
        if lead != ():
            assert_right(op, a, got)
        else:
            one = {name: a[name][None] for name in ("x", "x_scale") if a.get(name) is not None}
            assert_right(op, a | one, got[None])


@pytest.mark.parametrize("op", INT8_OPS)
def test_a_scale_for_all_rows(op):
    a = operands(op, (2, 9), 72, 20)
    one = torch.tensor(0.3)
    assert_same(call(op, a | {"x_scale": one}), call(op, a | {"x_scale": one.expand(2, 9, 1)}))


@pytest.mark.parametrize("op", OPS)
def test_no_channels(op):
    assert call(op, operands(op, 3, 64, 0)).shape == (3, 0)


@pytest.mark.parametrize("stride", [1, 7, 64])
def test_a_lone_row_with_any_stride(stride):
    a = operands("int8_linear", 1, 64, 32)
    x = torch.empty_strided((1, 64), (stride, 1), dtype=torch.int8).copy_(a["x"])
    assert_same(call("int8_linear", a | {"x": x}), call("int8_linear", a))


# -- around a call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("op", OPS)
def test_an_operator_is_well_behaved(op, rows):
    cases = [operands(op, rows, 72, 33)] + ([operands(op, rows, 72, 33, x=torch.bfloat16)] if op in INT8_OPS else [])
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for a in cases:
        torch.library.opcheck(getattr(torch.ops.qcompile_cpu, op).default, tuple(a.values()), test_utils=checks)


@pytest.mark.parametrize("op", OPS)
def test_the_state_of_torch_does_not_matter(op):
    a = operands(op, 20, 72, 33)
    want = call(op, a)
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            assert_same(call(op, a), want)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert_same(call(op, a), want)
    assert_same(call(op, a), want)
    if a["x"].is_floating_point():
        a["x"].requires_grad_()
        assert_same(call(op, a).detach(), want)


def test_two_threads_of_python_at_once():
    """Each has buffers of its own."""
    torch.manual_seed(0)
    cases = [(op, operands(op, rows, 500, 200)) for op in OPS for rows in (1, 6, 30)]
    want = [call(op, a) for op, a in cases]

    def work(order):
        return all(torch.equal(call(*cases[i]), want[i]) for _ in range(15) for i in order)

    with ThreadPoolExecutor(2) as pool:
        indices = list(range(len(cases)))
        assert all(pool.map(work, (indices, indices[::-1])))


# -- instruction sets ----------------------------------------------------------------------------------------------

VNNI = ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
BUILDS = {  # flags, a change of the text, what the processor must have
    "AMX": ((*VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"), (), "amx_int8"),
    "AVX512-VNNI": (VNNI, (), "avx512_vnni"),
    # A processor with AVX512-VNNI has these instructions too, encoded otherwise.
    "AVX-VNNI": (("-mavx2", "-mfma", "-D__AVXVNNI__=1"), ("%{vex%}", "%{evex%}"), "avx512_vnni"),
    "AVX2": (("-mavx2", "-mfma"), (), "avx2"),
    "plain": ((), (), ""),
}


def test_the_source_has_each_header_once():
    text = native.native_source()
    assert '#include "' not in text and "#pragma once" not in text
    for header in native.NATIVE.glob("*.h"):
        says = header.read_text().splitlines()[0]
        assert says.startswith("// ") and text.count(says) == 1, header.name


def processor_flags():
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


@pytest.mark.slow
@pytest.mark.parametrize("lanes", BUILDS)
def test_every_instruction_set_gives_the_same_bits(lanes, tmp_path):
    """Integers in any order; floats in the same order, while codes are read as they are stored."""
    import ctypes

    from torch.utils.cpp_extension import include_paths, library_paths

    flags, change, needed = BUILDS[lanes]
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ and an x86-64 processor")
    if needed not in processor_flags():
        pytest.skip(f"this processor has no {needed}")
    namespace = "qcompile_cpu_" + lanes.replace("-", "_").lower()
    source, library = tmp_path / "operators.cpp", tmp_path / "operators.so"
    text = native.native_source().replace("qcompile_cpu", namespace)
    source.write_text(text.replace(*change) if change else text)
    fixed = ("-shared", "-fPIC", "-std=c++20", "-O1", "-fopenmp", "-ffp-contract=off", "-fno-gnu-unique")
    torch_has = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    torch_has += ["-ltorch_cpu", "-lc10"]
    subprocess.run(
        [compiler, str(source), "-o", str(library), *fixed, *flags, *native._COMPILER_FLAGS, *torch_has], check=True
    )
    registry = torch.library.Library(namespace, "DEF")
    for op in OPS:
        registry.define(f"{op}{native._DEFINITIONS[op]} -> Tensor")
    name_of_lanes = ctypes.CDLL(str(library)).qcompile_lanes
    name_of_lanes.restype = ctypes.c_char_p
    assert name_of_lanes().decode() == lanes
    for op, (k, n) in itertools.product(OPS, SHAPES):
        for m, x in itertools.product(ROWS, (torch.int8, torch.float32)):
            if x == torch.int8 and op not in INT8_OPS:
                continue
            a = operands(op, m, k, n, GROUPS[k], x=x)
            got = call(op, a, namespace)
            if op == "table_linear" and m > 4:  # some expand codes for that M, some do not
                assert_right(op, a, got)
            else:
                assert_same(got, call(op, a))
        for x in FLOATS[1:]:  # bfloat16 products are summed otherwise where the processor has them
            a = operands(op, 9, k, n, GROUPS[k], x=x)
            assert_right(op, a, call(op, a, namespace))


def test_what_was_compiled_is_what_the_processor_has():
    assert native.lanes() in BUILDS
    if "avx512_vnni" in processor_flags():
        assert native.lanes() == ("AMX" if has_amx_tiles() else "AVX512-VNNI")


def test_the_library_of_a_package_is_used_where_none_is_loaded(tmp_path, monkeypatch):
    library, loaded = native.native_library(), []
    assert library[1:4] == b"ELF"
    native.load_native_library(b"another")  # nothing happens: ours is loaded
    monkeypatch.setattr(native, "_loaded", loaded)
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="libqcompile_cpu"):
        native.load_native_library(b"another")
    assert not loaded and not list(tmp_path.iterdir())
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: Path(path).read_bytes())
    native.load_native_library(library)
    assert loaded == [library] == [native.load_native_kernels()]


def test_the_digest_is_of_the_text():
    assert len(native.operators_digest()) == 16 and native.operators_digest() == native.operators_digest()
    assert all(f'library->def("{native._schema(name)}");' in native.native_source() for name in native._DEFINITIONS)
