"""The meaning of ONNX Runtime's attentions, computed token by token."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.onnx.ops.attention_ops import (
    apply_rotary,
    attention_lengths,
    causal_mask,
    group_query_attention,
    multi_head_attention,
)


@pytest.mark.parametrize("window", [-1, 3])
def test_the_mask_of_the_operator(window):
    visible = causal_mask(4, 3, window)
    for new in range(3):
        for token in range(7):
            distance = 4 + new - token
            assert bool(visible[new, token]) == (distance >= 0 and (window < 0 or distance < window))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_rotary_embedding_of_the_operator_rotates_pairs(interleaved):
    angle = torch.rand(5, 4) * 3
    x = torch.randn(2, 5, 12)
    rotated = apply_rotary(x, angle.cos(), angle.sin(), interleaved)
    assert torch.equal(rotated[..., 8:], x[..., 8:])
    for pair in range(4):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
        complex_pair = torch.complex(x[..., i], x[..., j]) * torch.polar(torch.ones(5), angle[:, pair])
        assert torch.allclose(rotated[..., i], complex_pair.real, atol=1e-5)
        assert torch.allclose(rotated[..., j], complex_pair.imag, atol=1e-5)


def test_the_operator_adds_the_bias_behind_the_cap():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 16) for _ in range(3))
    past = [torch.randn(1, 1, 3, 16) for _ in range(2)]
    bias = torch.randn(1, 1, 2, 5)
    lengths = torch.tensor([4], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    got, *_ = group_query_attention(query, key, value, *past, *lengths, None, None, 1, 0.5, -1, False, 2.0, bias)
    keys, values = torch.cat([past[0][0, 0], key[0]]), torch.cat([past[1][0, 0], value[0]])
    for token in range(2):
        visible = 4 + token
        scores = 2.0 * torch.tanh(query[0, token] @ keys[:visible].t() * 0.5 / 2.0) + bias[0, 0, token, :visible]
        assert torch.allclose(got[0, token], scores.softmax(-1) @ values[:visible], atol=1e-5)


def test_packed_heads_and_an_int8_cache():
    """Four query heads over two of the cache: packed or not, in codes or not."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 32), torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    scales = [torch.rand(1, 2, 1, 8) / 20 + 0.02 for _ in range(2)]
    codes = [torch.randint(-100, 100, (1, 2, 3, 8)).to(torch.int8) for _ in range(2)]
    lengths = attention_lengths(torch.ones(1, 5, dtype=torch.long))
    options = (*lengths, None, None, 4, 0.3, -1, False, 0.0, None)
    packed = torch.cat([query, key, value], -1)
    got, *present = group_query_attention(packed, None, None, *codes, *options, *scales)
    assert all(part.dtype is torch.int8 and part.shape == (1, 2, 5, 8) for part in present)
    floats = [part[:, :, :3] * scale for part, scale in zip(present, scales, strict=True)]
    new = [(part[:, :, 3:] * s).transpose(1, 2).flatten(2) for part, s in zip(present, scales, strict=True)]
    want, *_ = group_query_attention(query, *new, *floats, *options)
    assert torch.allclose(got, want, atol=1e-5)


def test_lengths_of_texts_that_are_padded():
    seqlens_k, total = attention_lengths(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    assert seqlens_k.tolist() == [3, 1] and total.tolist() == [4] and total.dtype is torch.int32


def test_the_operator_hides_padding_and_later_tokens():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 32) for _ in range(3))
    qkv_bias, bias = torch.randn(96), torch.randn(1, 2, 4, 4)
    padding_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.int32)
    got = multi_head_attention(query, key, value, qkv_bias, padding_mask, bias, 2, 0.3, True)
    for row in range(2):
        for token in range(4):
            for head in range(2):
                own = slice(16 * head, 16 * head + 16)
                visible = [t for t in range(token + 1) if padding_mask[row, t]]
                q = query[row, token, own] + qkv_bias[:32][own]
                k = key[row, visible][:, own] + qkv_bias[32:64][own]
                v = value[row, visible][:, own] + qkv_bias[64:][own]
                weights = (q @ k.t() * 0.3 + bias[0, head, token, visible]).softmax(-1)
                assert torch.allclose(got[row, token, own], weights @ v, atol=1e-5)
