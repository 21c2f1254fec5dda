"""ONNX Runtime's attentions as torch operators, with their meaning; see matmul_ops.py.

Shapes: B rows, S new tokens, P cached ones, H heads, G heads of the cache, D their size.

    lengths                 what GroupQueryAttention wants to know of the mask
    group_attention         GroupQueryAttention: rotary embedding, cache, bias, soft cap, causal softmax in one
    multi_head_attention    MultiHeadAttention: no cache, padding, any bias, causal or not
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    cap: float,
    bias: Tensor | None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a cache that it extends.

    Args:
        query: [B, S, H D], or [B, S, (H + 2 G) D] with key and value behind it. key, value: [B, S, G D].
        past_key, past_value: [B, G, P, D]. last: [B] int32, number of valid tokens less one. total: P + S, int32.
        cos, sin: [positions, R / 2], the rotary tables of the first R channels of a head.
        window: tokens that a token sees, itself included; -1 for all. interleaved: pairs (2i, 2i + 1), else halves.
        cap: scores s become cap tanh(s / cap); 0 for none. bias: [1, H, S, P + S], added to the scores, or None.
        key_scale, value_scale: [1, G, 1, D], of a cache in int8 codes: all keys and values are rounded to them first.

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
    if key_scale is not None and value_scale is not None:
        k, v = ((t / s).round().clamp(-128, 127).to(torch.int8) for t, s in ((k, key_scale), (v, value_scale)))
    keys, values = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    numbers = [t if s is None else t * s for t, s in ((keys, key_scale), (values, value_scale))]
    every = [t.repeat_interleave(heads // groups, 1) for t in numbers]
    scores = q @ every[0].transpose(-1, -2) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores if bias is None else scores + bias
    out = scores.masked_fill(~causal(past, new, window), -torch.inf).softmax(-1) @ every[1]
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


@torch.library.custom_op("qcompile_onnx::multi_head_attention", mutates_args=())
def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, padding: Tensor | None, added: Tensor | None,
    heads: int, scale: float, is_causal: bool,
) -> Tensor:  # fmt: skip
    """Attention of S tokens over T.

    Args:
        query: [B, S, H D]. key: [B, T, H D]. value: [B, T, H E].
        bias: [H D + H D + H E], added to the three. padding: int32 [B, T], 0 where nobody looks.
        added: to the scores, [B or 1, H or 1, S, T]. is_causal: token i sees tokens up to i.

    Returns:
        [B, S, H E].
    """
    if bias is not None:
        sizes = [t.shape[-1] for t in (query, key, value)]
        query, key, value = (t + b for t, b in zip((query, key, value), bias.split(sizes), strict=True))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if added is None else scores + added
    least = torch.finfo(scores.dtype).min
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None] == 0, least)
    if is_causal:
        scores = scores.masked_fill(~causal(0, scores.shape[-1], -1)[: scores.shape[-2]], least)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@multi_head_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[-1]))
