"""Attention of few queries: the C++ operator against float64, and which attentions of a graph it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.cpu.attention_rows import lower_attentions
from qcompile.codegen.cpu.native_kernels import load_native_kernels, ops
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

SDPA = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    load_native_kernels()


def expected(q, k, v, mask, scale):
    mask = mask if mask is None else mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    out = SDPA(q.double(), k.double(), v.double(), wide, scale=scale, enable_gqa=True)
    if mask is not None and mask.dtype == torch.bool:  # a row that sees nothing is zero
        out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
    return out


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([(1, 1), (3, 1), (3, 3), (2, 4), (1, 9)]),
    st.integers(1, 3),
    st.sampled_from([1, 15, 16, 31, 32, 33, 255, 256, 257, 600]),
    st.sampled_from([(16, 16), (64, 64), (80, 48), (128, 128), (256, 16)]),
    st.sampled_from([None, "float", "bool", "heads", "row"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 2]),
)
def test_attention_is_that_of_float64(batch, heads, positions, keys, widths, kind, dtype, threads):
    (shared, group), width = heads, widths[0]
    if group * positions > 16:
        positions = 1
    torch.manual_seed(keys)
    shape = (batch, positions, shared * group, width)
    q = torch.randn(shape).to(dtype).transpose(1, 2)  # as a projection leaves them
    k, v = (torch.randn(batch, keys + 3, shared, w).to(dtype).transpose(1, 2)[:, :, 1:-2] for w in widths)
    mask = {
        None: None,
        "float": torch.randn(batch, 1, positions, keys).to(dtype),
        "bool": torch.rand(batch, 1, positions, keys) < 0.7,
        "heads": torch.randn(1, shared * group, 1, keys),
        "row": torch.where(torch.arange(keys) < keys // 2 + 1, 0.0, -torch.inf),
    }[kind]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = ops.attention(q, k, v, None, None, mask, 0.2)
    halves = [part for at in (slice(0, keys // 3), slice(keys // 3, None)) for part in (k[:, :, at], v[:, :, at])]
    in_two = ops.attention(q, *halves, mask, 0.2)
    torch.set_num_threads(before)
    want = expected(q, k, v, mask, 0.2)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    bound = 2e-6 if dtype == torch.float32 else 5e-3
    for found in (got, in_two):
        assert (found.double() - want).abs().max() <= bound * (want.abs().max() + 1e-6)


CODES = {bits: Format.parse(f"int{bits}/row/zero") for bits in (8, 4)}


def quantized(x, bits):
    """The parts of a quantized cache, and what they are worth."""
    q = quantize_tensor(x, CODES[bits])
    parts = q.stored(), q.scale.half(), q.zero
    return parts, QTensor.from_stored(
        (parts[0], parts[1].float(), parts[2], None), CODES[bits], x.shape[-1]
    ).dequantize()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2]),
    st.sampled_from([(1, 1), (3, 3), (2, 4)]),
    st.integers(1, 2),
    st.sampled_from([0, 1, 31, 32, 33, 257]),
    st.sampled_from([(16, 16), (64, 64), (80, 48)]),
    st.sampled_from([8, 4]),
    st.sampled_from([0, 4]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_over_codes_is_that_of_what_they_are_worth(
    batch, heads, positions, past, widths, bits, first, rotated, masked, dtype
):
    (shared, group), width = heads, widths[0]
    torch.manual_seed(past)
    q = torch.randn(batch, shared * group, positions, width).to(dtype)
    own, new = (
        [torch.randn(batch, shared, count, w).to(dtype) for w in widths] if count else [None, None]
        for count in (first, positions)
    )
    stored, worth = zip(*(quantized(torch.randn(batch, shared, past, w) + 0.3, bits) for w in widths), strict=True)
    bias, code_query, keys = None, None, worth[0].double()
    if rotated:  # keys are stored rotated and less their mean
        rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
        center = torch.randn(shared, 1, width)
        keys = keys @ rotation.t() + center
        code_query = (q.double() @ rotation).float()
        bias = (q.float() @ center.repeat_interleave(group, 0).mT)[..., 0]
    parts = [own, (keys, worth[1].double()), new]
    k, v = (torch.cat([p[i].double() for p in parts if p[i] is not None], 2) for i in (0, 1))
    mask = torch.randn(1, 1, positions, first + past + positions) if masked else None
    got = ops.code_attention(q, code_query, bias, *own, *stored[0], *stored[1], *new, mask, 0.2)
    want = expected(q, k, v, mask, 0.2)
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert got.dtype == dtype and (got.double() - want).abs().max() <= bound * (want.abs().max() + 0.1)


def test_large_scores_and_runs_of_hidden_keys():
    """Exponentials of differences only: nothing overflows, and a run of keys that nobody sees adds nothing."""
    q, k, v = torch.randn(1, 4, 1, 64) * 100, torch.randn(1, 2, 700, 64) * 10, torch.randn(1, 2, 700, 64)
    hidden = torch.ones(700, dtype=torch.bool)
    hidden[:400] = False
    for mask in (None, hidden, torch.where(hidden, 0.0, -torch.inf)):
        got = ops.attention(q, k, v, None, None, mask, 1.0)
        assert torch.allclose(got.double(), expected(q, k, v, mask, 1.0), rtol=1e-4, atol=1e-5)
    assert not ops.attention(q, k, v, None, None, torch.zeros(700, dtype=torch.bool), 1.0).any()


def test_not_a_number_spreads_to_its_own_row_only():
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    q[0, 1] = torch.nan
    got = ops.attention(q, k, v, None, None, None, 1.0)
    assert got[0, 1].isnan().all() and not got[0, 0].isnan().any()


def test_the_operator_is_well_behaved():
    call = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 7, 32), torch.randn(2, 2, 7, 16), None, None, torch.randn(7), 0.3
    torch.library.opcheck(ops.attention.default, call, test_utils=("test_schema", "test_faketensor"))


class _Attention(torch.nn.Module):
    def __init__(self, shared, rows, width, repeat):
        super().__init__()
        self.shared, self.rows, self.width, self.repeat = shared, rows, width, repeat

    def forward(self, q, k, v, mask=None):
        q = q.reshape(-1, self.rows, 8, self.width).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.shared, self.width)).transpose(1, 2) for t in (k, v))
        if self.repeat:
            repeats = 8 // self.shared
            k, v = (t[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(len(q), 8, -1, self.width) for t in (k, v))
        return SDPA(q, k, v, mask, scale=0.3, enable_gqa=not self.repeat)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(
    "shared,rows,width,mask,made",
    [
        (2, 1, 16, None, "attention"),
        (1, 1, 32, (3, 1, 1, 13), "attention"),
        (4, 2, 16, (3, 8, 2, 13), "attention"),
        (8, 8, 16, None, "attention"),
        (1, 4, 16, None, None),  # 32 rows for one key head
        (8, 9, 16, None, None),
        (2, 1, 20, None, "rows"),
        (2, 1, 20, (1, 13), "rows"),
        (2, 1, 20, (3, 8, 1, 13), None),  # a mask for each head
        (2, 2, 20, None, None),
        (8, 1, 20, None, None),
    ],
)
def test_which_attentions_are_rewritten(shared, rows, width, mask, made, repeat):
    q, k, v = torch.randn(3, rows, 8 * width), torch.randn(3, 13, shared * width), torch.randn(3, 13, shared * width)
    model = _Attention(shared, rows, width, repeat)
    inputs = q, k, v, *([] if mask is None else [torch.randn(mask)])
    program = capture(model, inputs)
    assert lower_attentions(program) == {"attention": int(made == "attention"), "rows": int(made == "rows")}
    program.cleanup()
    assert torch.allclose(program(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-6)


class _Causal(torch.nn.Module):
    def forward(self, q, k, v):
        return SDPA(*(t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k, v)), is_causal=True)


def test_causal_attention_is_left():
    """torch counts its diagonal from the first key, not from the last."""
    inputs = tuple(torch.randn(3, 2, 32) for _ in range(3))
    assert not any(lower_attentions(capture(_Causal(), inputs)).values())


class _Cached(torch.nn.Module):
    """One token behind a quantized cache, as the decode step reads it."""

    def __init__(self, rotation, center, form):
        super().__init__()
        self.rotation, self.center, self.form = rotation, center, form

    def forward(self, q, first, key, key_scale, key_zero, value, value_scale, value_zero, new):
        read = torch.ops.qcompile.read_cache
        keys = read(key, key_scale, key_zero, self.rotation, self.center, self.form, 32, q.dtype)
        values = read(value, value_scale, value_zero, None, None, self.form, 32, q.dtype)
        k, v = (torch.cat([first, part, new], -2) for part in (keys, values))
        return SDPA(q, k, v, scale=0.3, enable_gqa=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_quantized_cache_is_read_as_codes(bits, rotated):
    rotation = torch.linalg.qr(torch.randn(32, 32))[0] if rotated else None
    model = _Cached(rotation, torch.randn(2, 1, 32) if rotated else None, f"int{bits}/row/zero")
    stored = [part for _ in range(2) for part in quantized(torch.randn(1, 2, 19, 32), bits)[0]]
    inputs = torch.randn(1, 6, 1, 32), torch.randn(1, 2, 3, 32), *stored, torch.randn(1, 2, 1, 32)
    program = capture(model, inputs, dynamic=False)
    assert lower_attentions(program)["attention"] == 1
    called = [str(node.target) for node in program.graph.nodes]
    assert "qcompile_cpu.code_attention.default" in called and "qcompile.read_cache.default" not in called
    assert torch.allclose(program(*inputs)[0], model(*inputs), rtol=1e-4, atol=1e-5)


class _WrittenLater(torch.nn.Module):
    """Keys that are overwritten between the cat that reads them and the attention."""

    def forward(self, q, k, v):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k * 2, v * 2))
        keys, values = torch.cat([k, k], dim=2), torch.cat([v, v], dim=2)
        k[:, :, 0] = 100.0
        v[:, :, 1] = 100.0
        return SDPA(q[:, :, :1], keys, values), k, v


def test_a_cat_of_what_is_written_later_is_not_undone():
    inputs = tuple(torch.randn(3, 5, 32) for _ in range(3))
    program = capture(_WrittenLater(), inputs)
    assert lower_attentions(program)["attention"] == 1
    program.cleanup()
    for got, want in zip(program(*inputs), _WrittenLater()(*inputs), strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
