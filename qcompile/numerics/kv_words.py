"""A quantized KV cache as its kernels read it: static buffers of 16-bit words, and one 32-bit word for a token's scale.

    keys      [B, H, T, D / c]         word j of a token = its channels j, j + D/c, .., at shifts of `bits`
    values    [B, H, T / 64, D, 64/c]  pages of 64 tokens; word j of a channel = tokens j, j + 64/c, ..
    scales    [B, H, T]                float16 scale above; below it the zero point z, of 4 bits as bfloat16 128 + z

with c = 16 / bits codes in a word. So a shift and a mask give neighboring channels of keys and neighboring tokens of
values, which are the inner sides of q K^T and of P V. T is a multiple of 128: two pages are read at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.qparams import choose_qparams, min_max, quantize_with_qparams

PAGE = 64  # tokens
TRIP = 2 * PAGE  # tokens that a kernel reads at a time
WIDTHS = (64, 128, 256)  # D of a head: sides of the kernels' tiles are powers of two

_ONE = 0x4300  # bfloat16 128, whose last bits hold a code of 4 bits


def cache_shapes(
    batch: int, heads: int, width: int, tokens: int, bits: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of keys (or their words), values and scales for a capacity of tokens, which is rounded up to 128."""
    tokens, words = -(-tokens // TRIP) * TRIP, bits / 16
    keys = (batch, heads, tokens, int(width * words))
    values = (batch, heads, tokens // PAGE, width, int(PAGE * words))
    return keys, values, (batch, heads, tokens)


def scale_words(scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """float16 scales and uint8 zero points -> int32 words of the same shape."""
    low = zero.int() | (_ONE if bits == 4 else 0)
    return scale.half().view(torch.int16).int() << 16 | low


def split_words(words: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse: scales and zero points, float32."""
    scale = (words >> 16).to(torch.int16).view(torch.float16).float()
    return scale, (words & (15 if bits == 4 else 255)).float()


def key_words(codes: Tensor, bits: int) -> Tensor:
    """Codes of keys [.., D] uint8 -> words [.., D / c] int16."""
    return _join(codes.unflatten(-1, (16 // bits, -1)), -2, bits)


def value_words(codes: Tensor, bits: int) -> Tensor:
    """Codes of values [.., T, D] uint8, T a multiple of 64 -> words [.., T / 64, D, 64 / c] int16."""
    pages = codes.unflatten(-2, (-1, 16 // bits, PAGE * bits // 16))
    return _join(pages, -3, bits).transpose(-1, -2).contiguous()


def _join(parts: Tensor, dim: int, bits: int) -> Tensor:
    chunks = parts.unbind(dim)
    words = sum((chunk.int() << bits * at for at, chunk in enumerate(chunks)), torch.zeros_like(chunks[0].int()))
    return words.to(torch.int16)


def key_codes(words: Tensor, bits: int) -> Tensor:
    """The inverse of key_words: uint8 [.., D]."""
    return _split(words, -2, bits).flatten(-2)


def value_codes(words: Tensor, bits: int) -> Tensor:
    """The inverse of value_words: uint8 [.., T, D]."""
    return _split(words.transpose(-1, -2), -3, bits).flatten(-4, -2)


def quantize_states(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [.., D], scales float16 [..] and zero points uint8 [..] of float values [.., D].

    Those of a quantized cache of any kind: (max - min) / (2^bits - 1) with an integer zero point. NaN and infinities,
    which no scale covers, give codes without a meaning.
    """
    form = Format("int4" if bits == 4 else "int8", "row", zero="int")
    wide = values.float()
    scale, zero = choose_qparams(*min_max(wide, form), form)
    assert zero is not None
    codes = quantize_with_qparams(wide, scale[..., None], zero[..., None], form)
    return codes, scale.clamp(max=torch.finfo(torch.float16).max).half(), zero.to(torch.uint8)


def dequantize_words(codes: Tensor, words: Tensor, bits: int) -> Tensor:
    """Codes [.., D] and the words of their scales [..] -> float32 [.., D]."""
    scale, zero = split_words(words, bits)
    return (codes.float() - zero[..., None]) * scale[..., None]


def _split(words: Tensor, dim: int, bits: int) -> Tensor:
    parts = [(words.int() >> bits * at & (1 << bits) - 1).to(torch.uint8) for at in range(16 // bits)]
    return torch.stack(parts, dim)
