"""ONNX Runtime's operators as torch operators: what an exported graph is made of, with its meaning.

Each has a reference in plain torch, which is what the rewritten graph computes before it is translated
(translate.py gives the ONNX nodes). Shapes: B rows, S new tokens, P cached ones, H heads, G heads of the
cache, D their size.

    nbits_linear      MatMulNBits: codes in blocks of one scale and zero point
    int8_linear       int8 codes for each row of x, MatMulInteger, scales
    lengths           what GroupQueryAttention wants to know of the mask
    group_attention   GroupQueryAttention: rotary embedding, cache, causal softmax in one
    rms_norm          SimplifiedLayerNormalization, and with a residual SkipSimplifiedLayerNormalization
    gather_nbits      GatherBlockQuantized: rows of a table that MatMulNBits may read too
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qcompile.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.packing import unpack


@torch.library.custom_op("qcompile_onnx::nbits_linear", mutates_args=())
def nbits_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, k: int, bits: int, block: int
) -> Tensor:
    """x [.., K] @ dq(codes [N, blocks, block bits / 8]).T + bias [N].

    scales: [N, blocks] float32. zeros: uint8 [N, ceil(blocks bits / 8)] packed, or float32 [N, blocks]; None is
    the middle of the codes, 2^(bits - 1).
    """
    weight = blocks_to_numbers(codes, scales, zeros, bits, block)[:, :k]
    return torch.nn.functional.linear(x, weight, bias)


@nbits_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def blocks_to_numbers(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int) -> Tensor:
    """The weight [N, blocks * block] behind packed blocks."""
    n, blocks = scales.shape
    levels = unpack(codes.reshape(n, -1), bits, blocks * block).reshape(n, blocks, block).float()
    if zeros is None:
        z = torch.full_like(scales, 2 ** (bits - 1))
    else:
        z = zeros if zeros.is_floating_point() else unpack(zeros, bits, blocks).float()
    return ((levels - z[..., None]) * scales[..., None]).reshape(n, -1)


@torch.library.custom_op("qcompile_onnx::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, per_row: bool) -> Tensor:
    """round(x / s) @ weight [K, N] int8, times s and scale [N], plus bias; s = max|x| / 127 of a row or of all x."""
    codes, step, _ = torch.ops.qcompile.quantize(x, "int8/row" if per_row else "int8/tensor")
    out = (codes.double() @ weight.double()).float() * step * scale  # float64 sums of int8 products are exact
    return out if bias is None else out + bias


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("qcompile_onnx::dual_linear", mutates_args=())
def dual_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, k: int, bits: int, block: int,
    row: Tensor, per_row: bool,
) -> Tensor:  # fmt: skip
    """The int8 product with a dual-grained weight: row [N] its scales, scales / row its integer group scales.

    Arguments as of nbits_linear, which multiplies the same weight by activations that are not rounded.
    """
    units = blocks_to_numbers(codes, (scales / row[:, None]).round(), zeros, bits, block)[:, :k]
    return int8_linear(x, units.to(torch.int8).t(), row, bias, per_row)


@dual_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qcompile_onnx::blocked_linear", mutates_args=())
def blocked_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    """x [.., K] @ dq(codes) + bias, of a weight [K, N] in blocks of rows: the layout of DequantizeLinear.

    codes, zeros: uint8, the packed stream of [K, N] and of [blocks, N]. scales: [blocks, N] float32.
    """
    k, (blocks, n) = x.shape[-1], scales.shape
    levels = unpack(codes, bits, k * n).reshape(k, n).float()
    z = unpack(zeros, bits, blocks * n).reshape(blocks, n).float()
    weight = (levels - z.repeat_interleave(block, 0)[:k]) * scales.repeat_interleave(block, 0)[:k]
    return torch.nn.functional.linear(x, weight.t(), bias)


@blocked_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@torch.library.custom_op("qcompile_onnx::group_attention", mutates_args=())
def group_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    last: Tensor,
    total: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    scale: float,
    window: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a cache that it extends.

    Args:
        query: [B, S, H D], or [B, S, (H + 2 G) D] with key and value behind it. key, value: [B, S, G D].
        past_key, past_value: [B, G, P, D]. last: [B] int32, number of valid tokens less one. total: P + S, int32.
        cos, sin: [positions, R / 2], the rotary tables of the first R channels of a head.
        window: tokens that a token sees, itself included; -1 for all. interleaved: pairs (2i, 2i + 1), else halves.

    Returns:
        [B, S, H D], and the cache of P + S tokens.
    """
    size, groups = past_key.shape[-1], past_key.shape[1]
    if key is None or value is None:
        query, key, value = query.split([heads * size, groups * size, groups * size], -1)
    q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in (query, key, value))
    past, new = past_key.shape[2], query.shape[1]
    if cos is not None and sin is not None:
        q, k = (rotate(t, cos[past : past + new], sin[past : past + new], interleaved) for t in (q, k))
    keys, values = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    mask = causal(past, new, window)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, keys.repeat_interleave(heads // groups, 1), values.repeat_interleave(heads // groups, 1), mask, scale=scale
    )
    return out.transpose(1, 2).flatten(2), keys, values


@group_attention.register_fake
def _(
    query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    heads = rest[4]
    batch, groups, past, size = past_key.shape
    grown = [t.new_empty((batch, groups, past + query.shape[1], size)) for t in (past_key, past_value)]
    return query.new_empty((batch, query.shape[1], heads * size)), grown[0], grown[1]


def causal(past: int, new: int, window: int) -> Tensor:
    """[S, P + S], true where a new token sees a token."""
    behind = torch.arange(past, past + new)[:, None] - torch.arange(past + new)
    return (behind >= 0) & ((behind < window) | (window < 0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [.., S, D] with the pairs of its first R channels turned; cos, sin [S, R / 2]."""
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


@torch.library.custom_op("qcompile_onnx::lengths", mutates_args=())
def lengths(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What group_attention wants to know of attention_mask [B, P + S]: its `last` [B] and `total` [1], int32."""
    return (mask.sum(1) - 1).to(torch.int32), torch.full((1,), mask.shape[1], dtype=torch.int32)


@lengths.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape[:1], dtype=torch.int32), mask.new_empty((1,), dtype=torch.int32)


@torch.library.custom_op("qcompile_onnx::rms_norm", mutates_args=())
def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [.., K] / sqrt(mean x^2 + eps) * gain [K]."""
    return torch.nn.functional.rms_norm(x, gain.shape, gain, eps)


@rms_norm.register_fake
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::skip_rms_norm", mutates_args=())
def skip_rms_norm(x: Tensor, skip: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + skip, and x + skip."""
    total = x + skip
    return torch.nn.functional.rms_norm(total, gain.shape, gain, eps), total


@skip_rms_norm.register_fake
def _(x: Tensor, skip: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::gather_nbits", mutates_args=())
def gather_nbits(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, bits: int, block: int
) -> Tensor:
    """Rows `ids` of a table [N, K] in blocks (see nbits_linear): [.., K]."""
    rows = ids.flatten()
    numbers = blocks_to_numbers(codes[rows], scales[rows], None if zeros is None else zeros[rows], bits, block)[:, :k]
    return numbers.reshape(*ids.shape, k)


@gather_nbits.register_fake
def _(ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, *_: int) -> Tensor:
    return scales.new_empty((*ids.shape, k))
