"""The int8 KV cache of an exported decoder, as the module computes with it: codes in, codes out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

ChannelScales = list[tuple[Tensor, Tensor]]
"""Scales of keys and of values, [G, D] each, layer by layer."""


def open_cache(past: list[Tensor], scales: ChannelScales | None, rounds: bool) -> Any:
    """A transformers cache that holds `past`.

    Args:
        past: keys and values [B, G, P, D], interleaved, layer by layer: int8 codes where there are scales, else float.
        scales: of an int8 cache.
        rounds: whether such a cache rounds what is appended to codes.
    """
    from transformers import DynamicCache

    from qcompile.modules.kv_cache import KVCache

    if scales is not None:
        past = [codes * scale for codes, scale in zip(past, _broadcast(scales), strict=True)]
    cache = KVCache(8, scales=scales) if scales is not None and rounds else DynamicCache()
    for index in range(len(past) // 2):
        cache.update(past[2 * index], past[2 * index + 1], index)
    return cache


def close_cache(cache: Any, scales: ChannelScales | None) -> list[Tensor]:
    """Keys and values [B, G, P + S, D] of each layer, float or codes (of a cache that does not round, float too)."""
    from qcompile.modules.kv_cache import KVCache

    if isinstance(cache, KVCache):
        return [part.codes.read() for layer in cache.layers for part in (layer.own_keys, layer.own_values)]
    present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    if scales is None:
        return present
    return [part / scale for part, scale in zip(present, _broadcast(scales), strict=True)]


def _broadcast(scales: ChannelScales) -> list[Tensor]:
    """[G, 1, D] for keys and values of each layer."""
    return [scale[:, None] for pair in scales for scale in pair]
