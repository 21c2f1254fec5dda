"""Attention of all positions at once: the C++ operator against float64, and which attentions of a graph it takes."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.cpu import native_kernels as native
from qcompile.codegen.cpu import short_attention
from qcompile.codegen.cpu.native_kernels import load_native_kernels, ops
from qcompile.codegen.cpu.short_attention import attention_ratio, lower_short_attentions
from qcompile.ir.aten_ops import SDPA as SDPA_OP
from qcompile.ir.capture import capture

SDPA = torch.nn.functional.scaled_dot_product_attention
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 6e-3}  # of the largest value


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    load_native_kernels()


def expected(q, k, v, mask, scale):
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wide = wide if wide is None else wide.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    out = SDPA(q.double(), k.double(), v.double(), wide, scale=scale, enable_gqa=True)
    if wide is not None and wide.dtype == torch.bool:  # a row that sees nothing is zero
        out = torch.where(wide.any(-1, keepdim=True), out, 0.0)
    return out


def operands(batch, heads, positions, keys, widths, dtype, shared=None):
    """Queries, keys and values as views of projections; rows around them are NaN, so that reading one shows."""

    def rows(count, heads, width):
        whole = torch.full((batch, count + 3, heads, width), torch.nan, dtype=dtype)
        whole[:, 1:-2] = torch.randn(batch, count, heads, width).to(dtype)
        return whole[:, 1:-2].transpose(1, 2)

    shared = shared or heads
    return rows(positions, heads, widths[0]), *(rows(keys, shared, width) for width in widths)


def masks(kind, batch, heads, positions, keys, dtype):
    lowest = torch.finfo(torch.float32).min
    return {
        None: lambda: None,
        "padding": lambda: torch.where(torch.arange(keys) < keys // 2 + 1, 0.0, lowest).expand(batch, 1, 1, keys),
        "hidden": lambda: torch.where(torch.rand(batch, 1, positions, keys) < 0.8, 0.0, -torch.inf).to(dtype),
        "bool": lambda: torch.rand(batch, 1, positions, keys) < 0.7,
        "heads": lambda: torch.randn(1, heads, positions, keys).to(dtype),
        "all": lambda: torch.randn(batch, heads, positions, keys),
        "columns": lambda: torch.randn(heads, keys, positions).transpose(1, 2),
        "rows": lambda: torch.randn(positions, 1),
        "half": lambda: torch.randn(keys).half(),
    }[kind]()


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([(1, 1, 1), (2, 3, 3), (3, 2, 1), (1, 8, 2)]),
    st.sampled_from([1, 3, 4, 5, 8, 9, 11, 12, 13, 24, 49, 130]),
    st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 49, 129, 197]),
    st.sampled_from([(8, 8), (16, 16), (32, 32), (40, 24), (64, 64), (72, 128), (256, 16)]),
    st.sampled_from([None, "padding", "hidden", "bool", "heads", "all", "columns", "rows", "half"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0.2, -0.3, 0.0]),
)
def test_it_is_the_attention_of_float64(sizes, positions, keys, widths, kind, dtype, threads, scale):
    batch, heads, shared = sizes
    torch.manual_seed(positions * keys)
    q, k, v = operands(batch, heads, positions, keys, widths, dtype, shared)
    mask = masks(kind, batch, heads, positions, keys, dtype)
    if kind == "hidden":
        mask[..., 0] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = ops.short_attention(q, k, v, mask, scale)
    torch.set_num_threads(before)
    want = expected(q, k, v, mask, scale)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    assert (got.double() - want).abs().max() <= BOUNDS[dtype] * (want.abs().max() + 1e-6)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("keys", [1023, 1024, 1025, 1041, 2100])
def test_keys_in_parts(keys, dtype):
    """The largest score in the first part, in the last, and parts that a row does not see at all."""
    q, k, v = operands(1, 2, 13, keys, (24, 40), dtype)
    hidden = torch.zeros(13, keys, dtype=torch.bool)
    hidden[::3, : keys // 2 + 520] = True
    hidden[1::3, 40:] = True
    rising = torch.linspace(-30, 30, keys)
    for mask in (None, ~hidden, rising, -rising, ~hidden.all(-1, keepdim=True)):
        got, want = ops.short_attention(q, k, v, mask, 0.3), expected(q, k, v, mask, 0.3)
        assert (got.double() - want).abs().max() <= 2 * BOUNDS[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_large_scores(dtype):
    """Exponentials of differences only: nothing overflows, and one key may have all the weight."""
    q, k, v = operands(1, 2, 14, 50, (64, 64), dtype)
    q, k = q * 100, k * 10
    lowest = torch.full((50,), torch.finfo(torch.float32).min)
    for mask in (None, lowest, torch.full((50,), 3e4)):
        got, want = ops.short_attention(q, k, v, mask, 1.0), expected(q, k, v, mask, 1.0)
        assert (got.double() - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_row_that_sees_nothing_is_zero(dtype):
    q, k, v = operands(1, 2, 14, 50, (64, 64), dtype)
    sees = torch.ones(14, 50, dtype=torch.bool)
    sees[3] = sees[12] = False
    got = ops.short_attention(q, k, v, sees, 1.0)
    assert not got[:, :, [3, 12]].any() and got[:, :, [0, 13]].abs().min() > 0
    assert not ops.short_attention(q, k, v, torch.full((50,), -torch.inf), 1.0).any()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_not_a_number_spreads_to_its_own_row_only(dtype):
    q, k, v = operands(2, 2, 14, 50, (16, 16), dtype)
    want = ops.short_attention(q, k, v, None, 1.0)
    q = q.clone()
    q[0, 1, 5] = torch.nan
    got = ops.short_attention(q, k, v, None, 1.0)
    assert got[0, 1, 5].isnan().all() and int(got.isnan().sum()) == 16
    assert torch.equal(got.nan_to_num(), torch.where(got.isnan(), 0, want))


def test_nothing_to_do():
    for q, keys in (((0, 2, 5, 16), (0, 2, 7, 16)), ((2, 2, 0, 16), (2, 2, 7, 16))):
        got = ops.short_attention(torch.zeros(q), torch.zeros(keys), torch.zeros(keys), None, 1.0)
        assert got.shape == q


def test_the_operator_is_well_behaved():
    call = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 7, 32), torch.randn(2, 2, 7, 16), torch.randn(7), 0.3
    torch.library.opcheck(ops.short_attention.default, call, test_utils=("test_schema", "test_faketensor"))


# -- other instruction sets ------------------------------------------------------------------------------------

BUILDS = {  # flags, what the processor must have
    "AVX512-VNNI": (("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"), "avx512_vnni"),
    "AVX2": (("-mavx2", "-mfma"), "avx2"),
    "plain": ((), ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("lanes", BUILDS)
def test_every_instruction_set(lanes, tmp_path):
    """None of these multiplies bfloat16: words are widened."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags, needed = BUILDS[lanes]
    compiler, known = shutil.which("g++"), Path("/proc/cpuinfo")
    if compiler is None or platform.machine() != "x86_64" or (needed and needed not in known.read_text()):
        pytest.skip("needs g++ and an x86-64 processor that has the instructions")
    namespace = "qcompile_short_" + lanes.replace("-", "_").lower()
    source, library = tmp_path / "operators.cpp", tmp_path / "operators.so"
    source.write_text(native.native_source().replace("qcompile_cpu", namespace))
    fixed = ("-shared", "-fPIC", "-std=c++20", "-O1", "-fopenmp", "-ffp-contract=off", "-fno-gnu-unique")
    torch_has = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    libraries = ("-ltorch_cpu", "-lc10")
    subprocess.run(
        [compiler, str(source), "-o", str(library), *fixed, *flags, *native._COMPILER_FLAGS, *torch_has, *libraries],
        check=True,
    )
    torch.ops.load_library(str(library))
    call = getattr(torch.ops, namespace).short_attention
    for positions, keys, widths, kind in (
        (1, 1, (8, 8), None), (13, 33, (40, 24), "all"), (49, 49, (32, 32), "heads"), (30, 70, (64, 72), "bool"),
        (5, 1100, (16, 16), "padding"),
    ):  # fmt: skip
        for dtype, bound in BOUNDS.items():
            q, k, v = operands(2, 2, positions, keys, widths, dtype)
            mask = masks(kind, 2, 2, positions, keys, dtype)
            want = expected(q, k, v, mask, 0.25)
            assert (call(q, k, v, mask, 0.25).double() - want).abs().max() <= bound * want.abs().max()


# -- the choice --------------------------------------------------------------------------------------------------


def test_the_nearest_measured_shape_decides(monkeypatch):
    rows = [(32, 32, 64, 2.0), (512, 512, 64, 0.5), (32, 32, 256, 3.0), (32, 512, 64, 1.5)]
    table = {"float32": [short_attention.MeasuredAttention(*row) for row in rows]}
    monkeypatch.setattr(short_attention, "_table", lambda measured_on: table)
    for shape, ratio in (
        ((40, 30, 64), 2.0), ((500, 300, 64), 0.5), ((32, 32, 200), 3.0), ((20, 700, 80), 1.5), ((0, 32, 64), 2.0),
    ):  # fmt: skip
        assert attention_ratio(torch.float32, *shape) == ratio
    assert attention_ratio(torch.bfloat16, 32, 32, 64) == 0


@pytest.mark.parametrize("here,dtype,reads", [
    ("amx", torch.bfloat16, None), ("amx", torch.float32, "vnni"), ("vnni", torch.bfloat16, "vnni"),
    ("avx2", torch.float32, "avx2"), ("other", torch.float32, "avx2"),
])  # fmt: skip
def test_which_table_is_read(monkeypatch, here, dtype, reads):
    asked = []

    def table(measured_on):
        asked.append(measured_on)
        return {}

    monkeypatch.setattr(short_attention, "_table", table)
    monkeypatch.setattr(short_attention, "processor", lambda: here)
    assert attention_ratio(dtype, 32, 32, 64) == 0
    assert asked == ([] if reads is None else [reads])


@pytest.mark.parametrize("measured_on", ["vnni", "avx2"])
def test_the_committed_tables(measured_on):
    table = short_attention._table(measured_on)
    assert set(table) == {"float32", "bfloat16"}
    for rows in table.values():
        assert {row.width for row in rows} == {32, 64, 128} and {16, 49, 128, 197, 512} <= {row.keys for row in rows}
        assert all(0.01 < row.ratio < 100 for row in rows)


# -- lowering ----------------------------------------------------------------------------------------------------


class _Attention(torch.nn.Module):
    def __init__(self, heads=4, shared=None, **settings):
        super().__init__()
        self.heads, self.shared, self.settings = heads, shared or heads, settings

    def forward(self, q, k, v, mask=None):
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.shared, -1)).transpose(1, 2) for t in (k, v))
        if self.shared != self.heads:
            k, v = (
                t[:, :, None]
                .expand(-1, -1, self.heads // self.shared, -1, -1)
                .reshape(len(q), self.heads, -1, t.shape[-1])
                for t in (k, v)
            )
        return SDPA(q, k, v, mask, **self.settings).transpose(1, 2).flatten(2)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(short_attention, "attention_ratio", lambda dtype, queries, keys, width: 2.0)


@pytest.mark.parametrize(
    "heads,shared,width,mask,settings,made",
    [
        (4, 4, 16, None, {}, 1),
        (4, 4, 8, (1, 33), {"scale": 0.3}, 1),
        (4, 2, 40, (3, 4, 20, 33), {}, 1),
        (4, 4, 12, None, {}, 0),
        (1, 1, 264, None, {}, 0),
        (4, 4, 16, None, {"is_causal": True}, 0),
    ],
)
def test_which_attentions_are_rewritten(fast, heads, shared, width, mask, settings, made):
    inputs = torch.randn(3, 20, heads * width), *(torch.randn(3, 33, shared * width) for _ in range(2))
    inputs = *inputs, *([] if mask is None else [torch.randn(mask)])
    model = _Attention(heads, shared, **settings)
    program = capture(model, inputs)
    assert lower_short_attentions(program) == made
    program.cleanup()
    assert len(list(program.graph.find_nodes(op="call_function", target=SDPA_OP))) == 1 - made
    repeats = torch.ops.aten.expand.default in {node.target for node in program.graph.nodes}
    assert repeats == (shared != heads and not made), "keys are read where they are"
    assert torch.allclose(program(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype,made", [(torch.float16, 0), (torch.float64, 0), (torch.bfloat16, 1)])
def test_dtypes(fast, dtype, made):
    program = capture(_Attention(), tuple(torch.randn(3, 20, 64).to(dtype) for _ in range(3)))
    assert lower_short_attentions(program) == made


def test_what_is_not_faster_stays(monkeypatch):
    asked = []

    def ratio(*shape):
        asked.append(shape)
        return 1.0

    monkeypatch.setattr(short_attention, "attention_ratio", ratio)
    program = capture(_Attention(), (torch.randn(3, 20, 64), torch.randn(3, 33, 64), torch.randn(3, 33, 64)))
    assert lower_short_attentions(program) == 0
    assert asked == [(torch.float32, 20, 33, 16)]


class _WrittenLater(torch.nn.Module):
    """Keys that are written to between the repeat that reads them and the attention."""

    def forward(self, q, k, v):
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (q, k * 2, v * 2))
        keys, values = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(q), 4, -1, 16) for t in (k, v))
        k[:, :, 0] = 100.0
        v[:, :, 1] = 100.0
        return SDPA(q, keys, values), k, v


def test_a_repeat_of_what_is_written_later_is_not_undone(fast):
    inputs = torch.randn(3, 12, 64), torch.randn(3, 12, 32), torch.randn(3, 12, 32)
    program = capture(_WrittenLater(), inputs)
    assert lower_short_attentions(program) == 1
    program.cleanup()
    for got, want in zip(program(*inputs), _WrittenLater()(*inputs), strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_symbolic_sizes(fast):
    """One graph for all lengths, also beyond those that were measured."""
    model = _Attention()
    inputs = tuple(torch.randn(2, 20, 64) for _ in range(3))
    program = capture(model, inputs)
    assert isinstance(program.inputs[0].meta["val"].shape[1], torch.SymInt)
    assert lower_short_attentions(program) == 1
    program.cleanup()
    for n in (5, 1100):
        other = tuple(torch.randn(2, n, 64) for _ in range(3))
        assert torch.allclose(program(*other)[0], model(*other), rtol=1e-5, atol=1e-5)
