"""Operators of a quantized cache in static buffers: codes of the growing cache, attention by the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompile.ir.static_cache_ops as _register  # noqa: F401
from qcompile.modules.kv_states import PerTokenStates
from qcompile.numerics.format import Format
from qcompile.numerics.kv_words import cache_shapes, key_codes, split_words, value_codes
from qcompile.numerics.qtensor import unpack_codes

ops = torch.ops.qcompile


def buffers(batch, heads, width, tokens, bits):
    keys, values, scales = cache_shapes(batch, heads, width, tokens, bits)
    return [torch.zeros(s, dtype=t) for s, t in (
        (keys, torch.int16), (scales, torch.int32), (values, torch.int16), (scales, torch.int32))]  # fmt: skip


def write(cache, states, counts, bits):
    """Keys and values, so many at a time; the length."""
    length = torch.zeros((), dtype=torch.int64)
    for count in counts:
        at = int(length)
        ops.kv_write(*(s[:, :, at : at + count] for s in states), *cache, length, bits)
        length += count
    return length


@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.sampled_from([4, 8]), st.sampled_from([16, 80]))
def test_codes_are_those_of_the_growing_cache(counts, bits, width):
    states = [torch.randn(2, 3, sum(counts), width) * 3 for _ in range(2)]
    cache = buffers(2, 3, width, 300, bits)
    write(cache, states, counts, bits)
    form, used = Format(f"int{bits}", "row", zero="int"), slice(0, sum(counts))
    codes = key_codes(cache[0], bits), value_codes(cache[2], bits)
    read = ops.kv_read(*cache, bits, torch.float32)
    for values, got, words, back in zip(states, codes, cache[1::2], read, strict=True):
        growing = PerTokenStates(form, 0, False, None)
        growing.append(values)
        stored, scale, zero = growing.quantized(values)
        assert torch.equal(got[:, :, used], unpack_codes(stored, form, width)) and not got[:, :, sum(counts) :].any()
        got_scale, got_zero = split_words(words[:, :, used], bits)
        assert torch.equal(got_scale, scale.squeeze(-1).float()) and torch.equal(got_zero, zero.squeeze(-1).float())
        assert torch.equal(back[:, :, used], growing.read(torch.float32))


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_what_is_read(positions, masked):
    states, cache = [torch.randn(2, 2, 150, 32) for _ in range(2)], buffers(2, 2, 32, 256, 4)
    length, query = write(cache, states, [150], 4), torch.randn(2, 6, positions, 32)
    keys, values = (t[:, :, :150].repeat_interleave(3, 1) for t in ops.kv_read(*cache, 4, torch.float32))
    inside = torch.arange(150) <= 150 - positions + torch.arange(positions)[:, None]
    mask = None
    if masked:
        inside = torch.rand(2, positions, 256) < 0.7
        mask = torch.zeros(2, positions, 256).masked_fill(~inside, float("-inf"))
        inside = inside[:, None, :, :150]
    got = ops.kv_attend(query, *cache, length, mask, 0.3, 4)
    want = torch.nn.functional.scaled_dot_product_attention(query, keys, values, inside, scale=0.3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_tokens_that_do_not_fit_are_not_written_and_attention_is_no_value():
    states, cache = [torch.randn(1, 1, 130, 32) for _ in range(2)], buffers(1, 1, 32, 128, 4)
    length, query = write(cache, states, [127, 3], 4), torch.randn(1, 1, 1, 32)
    whole = buffers(1, 1, 32, 128, 4)
    write(whole, [s[:, :, :128] for s in states], [128], 4)
    assert all(torch.equal(a, b) for a, b in zip(cache, whole, strict=True))
    assert ops.kv_attend(query, *cache, length, None, 0.3, 4).isnan().all()
    assert ops.kv_attend(query, *cache, length - 2, None, 0.3, 4).isfinite().all()
    ops.kv_write(*(s[:, :, :2] for s in states), *cache, length, 4)  # nothing of it fits
    assert all(torch.equal(a, b) for a, b in zip(cache, whole, strict=True))


def arguments(op):
    cache, length = buffers(2, 2, 32, 128, 4), torch.tensor(3)
    if op == "kv_write":
        return (torch.randn(2, 2, 5, 32), torch.randn(2, 2, 5, 32), *cache, length, 4)
    if op == "kv_read":
        return (*cache, 4, torch.bfloat16)
    return (torch.randn(2, 4, 1, 32), *cache, length, torch.zeros(2, 1, 128), 0.5, 4)


@pytest.mark.parametrize("op", ["kv_write", "kv_read", "kv_attend"])
def test_opcheck(op):
    torch.library.opcheck(getattr(ops, op), arguments(op))


@given(st.sampled_from(["kv_write", "kv_read", "kv_attend"]), st.integers(0, 6),
       st.sampled_from(["none", "size", "rank", "dtype", "strides", "bits"]), st.integers(0, 4))  # fmt: skip
def test_real_and_fake_versions_refuse_the_same(op, which, kind, at):
    a = list(arguments(op))
    value = a[which % len(a)]
    if isinstance(value, torch.Tensor) and value.ndim:
        if kind == "size":
            value = value.new_zeros([n + (i == at % value.ndim) for i, n in enumerate(value.shape)])
        elif kind == "rank":
            value = value[None]
        elif kind == "dtype":
            value = value.to(torch.uint8)
        elif kind == "strides":
            value = value.transpose(0, 1).contiguous().transpose(0, 1)
        a[which % len(a)] = value
    if kind == "bits":
        a = [3 if type(v) is int else v for v in a]
    refused = ""
    try:
        getattr(ops, op)(*a)
    except ValueError as error:
        refused = str(error)
        assert f"qcompile::{op}: " in refused and "but must be" in refused, refused
    assert kind != "none" or not refused, refused
    with FakeTensorMode() as mode:
        try:
            getattr(ops, op)(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in a))
        except ValueError:
            assert refused, "only the fake version refuses"
            return
    assert not refused, f"the fake version takes what the real one refuses: {refused}"
