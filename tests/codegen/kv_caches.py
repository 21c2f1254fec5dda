"""Random keys and values, what they are quantized to by the definition, and float64 attention to that."""

from __future__ import annotations

import torch
from kernel_cases import DEVICE

from qcompile.codegen.triton.launch.kv_attention import KVBuffers
from qcompile.modules.kv_states import PerTokenStates
from qcompile.numerics.format import Format
from qcompile.numerics.kv_words import cache_shapes, key_words, scale_words, value_words
from qcompile.numerics.qtensor import unpack_codes


def random_states(*shape, seed=0, dtype=torch.float32):
    """Values [.., D] of tokens, some channels far from zero, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + 3 * torch.randn(shape[-1], generator=generator)).to(dtype)


def quantized(values, bits):
    """Codes uint8 [.., D], scales float16 [..] and zero points uint8 [..], as the growing cache has them."""
    form = Format(f"int{bits}", "row", zero="int")
    stored, scale, zero = PerTokenStates(form, 0, False, None).quantized(values)
    return unpack_codes(stored, form, values.shape[-1]), scale.squeeze(-1), zero.squeeze(-1)


def dequantized(values, bits):
    """float64."""
    codes, scale, zero = quantized(values, bits)
    return (codes.double() - zero.double()[..., None]) * scale.double()[..., None]


def empty_cache(batch, heads, width, capacity, bits):
    keys, values, scales = cache_shapes(batch, heads, width, capacity, bits)
    made = [torch.zeros(shape, dtype=dtype) for shape, dtype in (
        (keys, torch.int16), (scales, torch.int32), (values, torch.int16), (scales, torch.int32))]  # fmt: skip
    return KVBuffers(*(t.to(DEVICE) for t in made), torch.zeros((), dtype=torch.int64, device=DEVICE), bits)


def filled_cache(keys, values, capacity, bits):
    """A cache of keys and values [B, H, T, D], packed by the layout's definition."""
    batch, heads, tokens, width = keys.shape
    cache = empty_cache(batch, heads, width, capacity, bits)

    def padded(tensor):
        extra = cache.capacity - tokens
        return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 3) + (0, extra))

    codes, scale, zero = quantized(keys, bits)
    cache.keys.copy_(key_words(padded(codes), bits))
    cache.key_scales.copy_(padded(scale_words(scale, zero, bits)))
    codes, scale, zero = quantized(values, bits)
    cache.values.copy_(value_words(padded(codes), bits))
    cache.value_scales.copy_(padded(scale_words(scale, zero, bits)))
    cache.length.fill_(tokens)
    return cache


def exact_attention(query, keys, values, scale, window=0, cap=0.0):
    """Of the last positions [B, G H, N, D] to tokens [B, H, T, D], in float64."""
    repeats, tokens, positions = query.shape[1] // keys.shape[1], keys.shape[2], query.shape[2]
    keys, values = (t.double().repeat_interleave(repeats, 1) for t in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    last = tokens - positions + torch.arange(positions)[:, None]
    token = torch.arange(tokens)
    inside = (token <= last) & (token > last - window if window else True)
    return scores.masked_fill(~inside, float("-inf")).softmax(-1) @ values
