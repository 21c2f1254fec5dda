"""ONNX Runtime's attentions as torch operators, with their meaning, and typed views of their calls.

Shapes: B batch, S new tokens, P cached tokens, H query heads, G KV heads, D head size.

    attention_lengths        what GroupQueryAttention reads of attention_mask
    group_query_attention    GroupQueryAttention: rotary embedding, cache, bias, soft cap, causal softmax in one
    multi_head_attention     MultiHeadAttention: no cache, padding, any bias, causal or not
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.op_calls import OpCall, Operand

ops = torch.ops.qcompile_onnx


@torch.library.custom_op("qcompile_onnx::group_query_attention", mutates_args=())
def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_length: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    scale: float,
    window: int,
    interleaved: bool,
    softcap: float,
    bias: Tensor | None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a KV cache that it extends.

    Args:
        query: [B, S, H D], or packed [B, S, (H + 2 G) D] with key and value behind it.
        key: [B, S, G D], or None where it is packed.
        value: [B, S, G D], or None where it is packed.
        past_key: [B, G, P, D], float32, or int8 with scales.
        past_value: [B, G, P, D], likewise.
        seqlens_k: [B] int32, number of valid tokens less one.
        total_length: [1] int32, P + S.
        cos: [positions, R / 2], rotary table of the first R channels of a head; None: no rotary embedding.
        sin: [positions, R / 2], likewise.
        heads: H.
        scale: of the scores.
        window: how many tokens a token attends to, itself included; -1: all.
        interleaved: whether rotary pairs are channels (2 i, 2 i + 1); else (i, i + R / 2).
        softcap: scores s become softcap tanh(s / softcap); 0: none.
        bias: [1, H, S, P + S], added to the scores, or None.
        key_scale: [1, G, 1, D], per-channel scale of an int8 KV cache; None: it is float.
        value_scale: [1, G, 1, D], likewise.

    Returns:
        [B, S, H D], and keys and values of P + S tokens, [B, G, P + S, D].
    """
    size, groups = past_key.shape[-1], past_key.shape[1]
    if key is None or value is None:
        query, key, value = query.split([heads * size, groups * size, groups * size], -1)
    q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in (query, key, value))
    past, new = past_key.shape[2], query.shape[1]
    if cos is not None and sin is not None:
        q, k = (apply_rotary(t, cos[past : past + new], sin[past : past + new], interleaved) for t in (q, k))
    if key_scale is not None and value_scale is not None:
        k, v = ((t / s).round().clamp(-128, 127).to(torch.int8) for t, s in ((k, key_scale), (v, value_scale)))
    keys, values = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    dequantized = [t if s is None else t * s for t, s in ((keys, key_scale), (values, value_scale))]
    repeated = [t.repeat_interleave(heads // groups, 1) for t in dequantized]
    scores = q @ repeated[0].transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias
    out = scores.masked_fill(~causal_mask(past, new, window), -torch.inf).softmax(-1) @ repeated[1]
    return out.transpose(1, 2).flatten(2), keys, values


@group_query_attention.register_fake
def _(
    query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    heads = rest[4]
    batch, groups, past, size = past_key.shape
    present = [t.new_empty((batch, groups, past + query.shape[1], size)) for t in (past_key, past_value)]
    return query.new_empty((batch, query.shape[1], heads * size)), present[0], present[1]


def causal_mask(past: int, new: int, window: int) -> Tensor:
    """[S, P + S] bool, true where a new token attends to a token."""
    distance = torch.arange(past, past + new)[:, None] - torch.arange(past + new)
    return (distance >= 0) & ((distance < window) | (window < 0))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [.., S, D] with the pairs of its first R channels rotated; cos, sin [S, R / 2] (RoPE, arXiv:2104.09864)."""
    rotary, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    a, b = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else rotary.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


@torch.library.custom_op("qcompile_onnx::attention_lengths", mutates_args=())
def attention_lengths(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of attention_mask [B, P + S]: seqlens_k [B] and total_length [1] of group_query_attention, int32."""
    return (mask.sum(1) - 1).to(torch.int32), torch.full((1,), mask.shape[1], dtype=torch.int32)


@attention_lengths.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape[:1], dtype=torch.int32), mask.new_empty((1,), dtype=torch.int32)


@torch.library.custom_op("qcompile_onnx::multi_head_attention", mutates_args=())
def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, qkv_bias: Tensor | None, padding_mask: Tensor | None,
    bias: Tensor | None, heads: int, scale: float, is_causal: bool,
) -> Tensor:  # fmt: skip
    """Attention of S tokens over T.

    Args:
        query: [B, S, H D].
        key: [B, T, H D].
        value: [B, T, H E].
        qkv_bias: [H D + H D + H E], added to query, key and value, or None.
        padding_mask: int32 [B, T], 0 at padding, or None.
        bias: [B or 1, H or 1, S, T], added to the scores, or None.
        heads: H.
        scale: of the scores.
        is_causal: token i attends to tokens up to i.

    Returns:
        [B, S, H E].
    """
    if qkv_bias is not None:
        sizes = [t.shape[-1] for t in (query, key, value)]
        query, key, value = (t + b for t, b in zip((query, key, value), qkv_bias.split(sizes), strict=True))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if bias is None else scores + bias
    lowest = torch.finfo(scores.dtype).min
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask[:, None, None] == 0, lowest)
    if is_causal:
        scores = scores.masked_fill(~causal_mask(0, scores.shape[-1], -1)[: scores.shape[-2]], lowest)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@multi_head_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[-1]))


@dataclass(frozen=True)
class AttentionLengthsCall(OpCall):
    """qcompile_onnx::attention_lengths."""

    target: ClassVar[Any] = ops.attention_lengths.default

    mask: fx.Node


@dataclass(frozen=True)
class GroupQueryAttentionCall(OpCall):
    """qcompile_onnx::group_query_attention."""

    target: ClassVar[Any] = ops.group_query_attention.default

    query: fx.Node
    key: Operand
    value: Operand
    past_key: fx.Node
    past_value: fx.Node
    seqlens_k: fx.Node
    total_length: fx.Node
    cos: Operand
    sin: Operand
    heads: int
    scale: float
    window: int
    interleaved: bool
    softcap: float
    bias: Operand
    key_scale: Operand = None
    value_scale: Operand = None


@dataclass(frozen=True)
class MultiHeadAttentionCall(OpCall):
    """qcompile_onnx::multi_head_attention."""

    target: ClassVar[Any] = ops.multi_head_attention.default

    query: fx.Node
    key: fx.Node
    value: fx.Node
    qkv_bias: Operand
    padding_mask: Operand
    bias: Operand
    heads: int
    scale: float
    is_causal: bool
