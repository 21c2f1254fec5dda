"""Products by AMX tiles: the same bits as without them, or float64 within the rounding of float32 sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import FLOATS, INT8_OPS, OPS, assert_right, assert_same, call, ints, operands

from qcompile.codegen.cpu import amx_tiles, native_kernels
from qcompile.codegen.cpu.amx_tiles import has_amx_tiles, without_amx_tiles

TILED_OPS = [(op, torch.int8) for op in INT8_OPS] + [(op, torch.bfloat16) for op in OPS]
needs_tiles = pytest.mark.skipif(not has_amx_tiles(), reason="needs AMX")


@pytest.fixture(scope="module", autouse=True)
def loaded():
    native_kernels.load_native_kernels()


def both(op, a):
    """A call with tiles, checked, and the same one without."""
    got = call(op, a)
    assert_right(op, a, got)
    with without_amx_tiles():
        return got, call(op, a)


def assert_alike(op, a):
    got, other = both(op, a)
    if op in INT8_OPS:
        assert_same(got, other)
    else:
        assert_right(op, a, other)


# -- values ----------------------------------------------------------------------------------------------------------


@needs_tiles
@pytest.mark.parametrize("op,x", TILED_OPS)
def test_every_number_of_rows_in_a_tile(op, x):
    for m in [*range(4, 36), 48, 49, 50, 63, 64, 65, 80, 97]:
        assert_alike(op, operands(op, m, 136, 41, 32, x=x, dtype=FLOATS[m % 3], bias=bool(m % 5)))


@needs_tiles
@given(
    st.sampled_from(TILED_OPS),
    st.integers(5, 120),
    st.integers(1, 400),
    st.integers(1, 100),
    st.sampled_from([8, 24, 32, 40, 64, 96, 128, 200, 248]),
    st.sampled_from(FLOATS),
    st.integers(0, 2**30),
)
def test_any_shape(op, m, k, n, group, dtype, seed):
    torch.manual_seed(seed)
    assert_alike(op[0], operands(op[0], m, k, n, group, x=op[1], dtype=dtype, bias=bool(seed % 2)))


@needs_tiles
@pytest.mark.parametrize("zero", [None, "bytes", "floats"])
@pytest.mark.parametrize("step", ["bytes", "floats"])
@pytest.mark.parametrize("zero_bias", [0.0, -8.0, 8.0, 0.5])
@pytest.mark.parametrize("op,x", [("group_linear", torch.int8), ("table_linear", torch.bfloat16)])
def test_zero_points_in_the_codes_or_behind_a_group(op, x, step, zero, zero_bias):
    for group in (32, 48, 64, 128, 2**40):
        a = operands(op, 70, 200, 33, group, x=x, zero=zero, step=step) | {"zero_bias": zero_bias}
        assert_alike(op, a)
        a["scale"] = None
        assert_alike(op, a)


@needs_tiles
@pytest.mark.parametrize("largest", [64, 65, 255])
@pytest.mark.parametrize("op,x", [("group_linear", torch.int8), ("table_linear", torch.bfloat16)])
def test_zero_points_of_any_byte(op, x, largest):
    a = operands(op, 64, 136, 40, 64, x=x)
    a["zero"][0, 1, 3] = a["zero"][-1, -1, -1] = largest  # the last channel is padding
    a["zero_bias"] = 16.0
    assert_alike(op, a)


@needs_tiles
def test_a_group_whose_sums_are_beyond_float32():
    """Sums of q x are rounded before the zero point is subtracted, in both loops."""
    k = 20000  # times 7.5 times 126.5, in the mean, is beyond 2^24
    a = operands("group_linear", 64, k, 32, k, zero="bytes")
    a["x"], a["zero_bias"] = ints(126, 127, 64, k, dtype=torch.int8), 0.0
    got = call("group_linear", a)
    with without_amx_tiles():
        assert_same(got, call("group_linear", a))


@needs_tiles
@pytest.mark.parametrize(
    "table", [[0.5 * i for i in range(16)], [65.0 - i for i in range(16)], [2.0**i for i in range(16)]]
)
def test_tables_of_any_values(table):
    a = operands("table_linear", 40, 136, 40, 64, x=torch.bfloat16, table=torch.tensor(table))
    assert_alike("table_linear", a)


@needs_tiles
@pytest.mark.parametrize(
    "m,k,n,group", [(1100, 96, 40, 32), (600, 2112, 72, 64), (530, 4100, 330, 128), (64, 20000, 64, 248)]
)
@pytest.mark.parametrize("op,x", TILED_OPS)
def test_parts_of_rows_and_of_columns(op, x, m, k, n, group):
    """More rows, or more of K, than a part of x that the cache takes."""
    got, other = both(op, operands(op, m, k, n, group, x=x))
    if op in INT8_OPS:
        assert_same(got, other)


@needs_tiles
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("op", OPS)
def test_a_row_of_no_finite_values_keeps_to_itself(op, bad):
    a = operands(op, 66, 70, 33, x=torch.bfloat16)
    want = call(op, a)
    a["x"][1, 69] = bad
    got = call(op, a)
    assert not got[1].isfinite().any()
    assert_same(torch.cat((got[:1], got[2:])), torch.cat((want[:1], want[2:])))


@needs_tiles
@pytest.mark.parametrize("op,x", TILED_OPS)
def test_earlier_calls_leave_nothing_behind(op, x):
    """Buffers hold an earlier call's values where this one has none: behind K, and in front of a group."""
    full = operands(op, 128, 640, 64, 64, x=x)
    full["x"] = torch.full_like(full["x"], 127)
    for group in (32, 40, 64):
        a = operands(op, 50, 70, 33, group, x=x)
        call(op, full)
        assert_alike(op, a)


# -- permission --------------------------------------------------------------------------------------------------------


def test_tiles_are_switched_off_and_on_again():
    lib = native_kernels.load_native_kernels()
    with without_amx_tiles():
        with without_amx_tiles():
            assert not lib.qcompile_use_tiles(False)
        assert not lib.qcompile_use_tiles(False)
    assert lib.qcompile_use_tiles(True) == has_amx_tiles()


@needs_tiles
def test_without_tiles_the_other_loop_runs():
    """Their bfloat16 sums are rounded in another order: somewhere among many a bit differs."""
    got, other = both("int8_float_linear", operands("int8_float_linear", 64, 999, 64, x=torch.bfloat16))
    assert not torch.equal(got, other)


def test_tiles_need_a_processor_and_permission(monkeypatch):
    for kind, allowed in (("amx", True), ("amx", False), ("vnni", True), ("avx2", True)):
        monkeypatch.setattr(amx_tiles, "processor", lambda kind=kind: kind)
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda allowed=allowed: allowed)
        assert has_amx_tiles.__wrapped__() == (kind == "amx" and allowed)
