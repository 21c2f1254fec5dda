"""What `short_attention` refuses: the C++ and the fake alike, before anything is computed."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu.native_kernels import load_native_kernels, ops
from qcompile.codegen.cpu.short_attention_checks import takes_short_attention

CALL = {
    "query": torch.zeros(1, 4, 9, 64), "key": torch.zeros(1, 2, 5, 64), "value": torch.zeros(1, 2, 5, 64),
    "mask": None, "scale": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "argument,value,says",
    [
        ("query", torch.zeros(1, 4, 9, 64, dtype=torch.float16), "query is float16 .*float32 or bfloat16"),
        ("query", torch.zeros(4, 9, 64), "query is float32"),
        ("query", torch.zeros(2, 4, 9, 64), "key is float32"),
        ("query", torch.zeros(1, 3, 9, 64), "key is float32 .*H a multiple of G"),
        ("query", torch.zeros(1, 4, 9, 64, dtype=torch.bfloat16), "key is float32"),
        ("key", torch.zeros(2, 5, 64), "key is float32"),
        ("key", torch.zeros(1, 0, 5, 64), "key is float32"),
        ("key", torch.zeros(1, 2, 5, 56), "key is float32"),
        ("key", torch.zeros(1, 2, 6, 64), "value is float32"),
        ("value", torch.zeros(2, 5, 64), "value is float32"),
        ("value", torch.zeros(1, 2, 5, 64).double(), "value is float64"),
        ("value", torch.zeros(1, 2, 5, 20), "value is float32 .*multiple of 8, up to 256"),
        ("value", torch.zeros(1, 2, 5, 264), "value is float32 .*multiple of 8, up to 256"),
        ("value", torch.zeros(1, 2, 5, 0), "value is float32 .*multiple of 8, up to 256"),
        ("mask", torch.zeros(4), "mask is float32 .*broadcasts to"),
        ("mask", torch.zeros(1, 1, 1, 9, 5), "mask is float32"),
        ("mask", torch.zeros(5, dtype=torch.int64), "mask is int64"),
    ],
)
def test_what_it_does_not_take_is_refused(argument, value, says):
    load_native_kernels()
    with pytest.raises(ValueError, match=f"qcompile_cpu::short_attention: {says}"):
        ops.short_attention(**CALL | {argument: value})
    with pytest.raises(ValueError, match="qcompile_cpu::short_attention: "), torch._subclasses.FakeTensorMode() as mode:
        fake = {
            n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in (CALL | {argument: value}).items()
        }
        ops.short_attention(**fake)


def test_no_keys_are_refused():
    empty = torch.zeros(1, 2, 0, 64)
    load_native_kernels()
    with pytest.raises(ValueError, match="at least one position"):
        ops.short_attention(CALL["query"], empty, empty, None, 1.0)
    with pytest.raises(ValueError, match="at least one position"), torch._subclasses.FakeTensorMode() as mode:
        ops.short_attention(mode.from_tensor(CALL["query"]), *[mode.from_tensor(empty)] * 2, None, 1.0)


def test_what_is_taken():
    query, key, value = CALL["query"], CALL["key"], CALL["value"]
    assert takes_short_attention(query, key, value) and takes_short_attention(query, key, value[..., :8])
    assert not takes_short_attention(query[0], key, value)
    assert not takes_short_attention(query, key[0], value)
    assert not takes_short_attention(query, key, value[0])
    assert not takes_short_attention(query, key, value[..., :12])
    assert not takes_short_attention(query, key[:, :, :0], value[:, :, :0])
    assert not takes_short_attention(query, key, value[:, :1])
    assert not takes_short_attention(query.half(), key.half(), value.half())
    assert not takes_short_attention(query, key.bfloat16(), value)
    assert not takes_short_attention(query, key, value.to("meta"))
