"""What the attentions of few queries do not take is refused by C++ and by the fakes: the argument and its value."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.cpu.attention_checks import MAX_HEAD_SIZE, MAX_QUERY_ROWS, takes_attention
from qcompile.codegen.cpu.native_kernels import load_native_kernels, ops

NONE = {"new_key": None, "new_value": None, "mask": None, "scale": 1.0}


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    load_native_kernels()


def test_which_sizes_are_taken():
    def takes(heads, positions, width, shared, value_width=64, dtype=torch.float32):
        query = torch.zeros(1, heads, positions, width, dtype=dtype)
        return takes_attention(query, torch.zeros(1, shared, 3, width), torch.zeros(1, shared, 3, value_width))

    assert takes(8, 2, 64, 1) and takes(1, MAX_QUERY_ROWS, MAX_HEAD_SIZE, 1)
    assert not takes(8, 3, 64, 1) and not takes(8, 1, 64, 3) and not takes(8, 1, MAX_HEAD_SIZE + 16, 8)
    assert not takes(8, 1, 64, 8, value_width=24) and not takes(8, 1, 64, 8, dtype=torch.float16)


@pytest.mark.parametrize(
    "argument,value,says",
    [
        ("query", torch.zeros(1, 4, 1, 64, dtype=torch.float16), "query is float16"),
        ("query", torch.zeros(4, 1, 64), "query is float32"),
        ("query", torch.zeros(1, 4, 9, 64), "up to 16 rows"),
        ("key", torch.zeros(1, 3, 5, 64), "key is float32"),
        ("new_key", torch.zeros(1, 2, 1, 64), "new_value"),
        ("key", torch.zeros(1, 2, 5, 63), "key is float32"),
        ("value", torch.zeros(1, 2, 6, 64), "value is float32"),
        ("value", torch.zeros(1, 2, 5, 8), "E a multiple of 16"),
        ("mask", torch.zeros(4), "mask is float32"),
        ("mask", torch.zeros(5, dtype=torch.int64), "mask is int64"),
    ],
)
def test_what_it_does_not_take_is_refused(argument, value, says):
    call = {"query": torch.zeros(1, 4, 1, 64), "key": torch.zeros(1, 2, 5, 64), "value": torch.zeros(1, 2, 5, 64)}
    with pytest.raises(ValueError, match=f"qcompile_cpu::attention: .*{says}"):
        ops.attention(**call | NONE | {argument: value})
    with pytest.raises(ValueError, match="qcompile_cpu::attention: "), torch._subclasses.FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) for n, t in (call | {argument: value}).items()}
        ops.attention(**NONE | fake)


def code_call():
    """Arguments of code_attention that fit."""
    codes = torch.zeros(1, 2, 5, 64, dtype=torch.uint8)
    scale, zero = torch.zeros(1, 2, 5, 1).half(), torch.zeros(1, 2, 5, 1, dtype=torch.uint8)
    floats = torch.zeros(1, 2, 1, 64)
    of_codes = dict(key=codes, key_scale=scale, key_zero=zero, value=codes, value_scale=scale, value_zero=zero)
    absent = dict(code_query=None, code_bias=None, first_key=None, first_value=None, mask=None)
    return dict(query=torch.zeros(1, 4, 1, 64), new_key=floats, new_value=floats, scale=1.0, **of_codes, **absent)


@pytest.mark.parametrize(
    "argument,value",
    [
        ("key", torch.zeros(1, 2, 5, 64)),
        ("key", torch.zeros(1, 2, 5, 16, dtype=torch.uint8)),
        ("value", torch.zeros(1, 2, 4, 64, dtype=torch.uint8)),
        ("key_scale", torch.zeros(1, 2, 5, 1)),
        ("key_zero", torch.zeros(1, 2, 5, 1, dtype=torch.int8)),
        ("value_scale", torch.zeros(1, 2, 4, 1).half()),
        ("code_query", torch.zeros(1, 4, 1, 32)),
        ("code_bias", torch.zeros(1, 4, 1, dtype=torch.bfloat16)),
        ("first_key", torch.zeros(1, 2, 1, 64)),
        ("new_key", torch.zeros(1, 2, 1, 64).bfloat16()),
        ("mask", torch.zeros(5)),
    ],
)
def test_codes_that_it_does_not_take_are_refused(argument, value):
    with pytest.raises(ValueError, match="qcompile_cpu::code_attention: "):
        ops.code_attention(**code_call() | {argument: value})
    with pytest.raises(ValueError, match="qcompile_cpu::code_attention: "), FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in code_call().items()}
        ops.code_attention(**fake | {argument: mode.from_tensor(value)})
