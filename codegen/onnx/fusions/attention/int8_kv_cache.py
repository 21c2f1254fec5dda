"""An int8 KV cache of an exported decoder, held by the attentions that gqa.py fused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.ops.attention_ops import GroupQueryAttentionCall
from qcompile.codegen.onnx.tracing.cached_decoder import CachedDecoder
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError
from qcompile.ir.aten_ops import SIZES
from qcompile.ir.program import Program
from qcompile.modules.kv_constants import Scales
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class Int8KVCache:
    """What a recipe says of the KV cache.

    Attributes:
        scales: of the channels of keys and values.
        optional: whether the cache may stay float where an attention cannot read codes.
    """

    scales: Scales
    optional: bool


@dataclass(frozen=True)
class CachedLayer:
    """One layer of a decoder: its attention, and the nodes of its cache, inputs and outputs."""

    attention: fx.Node
    cache: list[fx.Node]


def quantize_kv_cache(program: Program, decoder: CachedDecoder, cache: Int8KVCache, report: PassReport) -> None:
    """Let every attention hold its cache in int8, in place, and the decoder take and return codes.

    Args:
        program: with the attentions that fuse_group_query_attentions fused.
        decoder: what the program was traced from.
        cache: what the recipe says.
        report: of the fusions; names the cache if it stays float.

    Raises:
        OnnxUnsupportedError: it would stay float, and may not. Nothing is changed then.
    """
    scales = decoder.expand_scales(cache.scales)
    layers = _find_layers(program, len(scales))
    if isinstance(layers, Obstacle):
        skipped = [f"{place.node}: {place.reason}" for place in report.skipped if place.site == "attention"]
        reason = f"{layers.reason} ({'; '.join(skipped) or layers.node})"
        if not cache.optional:
            raise OnnxUnsupportedError(f"QuantizeKV: {reason}. Fix: omit it, or export with float_cache")
        report.skip("cache", f"stays float32: {reason}", layers.node)
        return
    decoder.int8_scales = scales
    for index, (layer, (of_keys, of_values)) in enumerate(zip(layers, scales, strict=True)):
        key_scale = program.add_weight(f"layer_{index}_keys", of_keys[None, :, None].contiguous())
        value_scale = program.add_weight(f"layer_{index}_values", of_values[None, :, None].contiguous())
        call = GroupQueryAttentionCall.of(layer.attention)
        layer.attention.args = replace(call, key_scale=key_scale, value_scale=value_scale).arguments
        for node in layer.cache:
            node.meta["val"] = node.meta["val"].to(torch.int8)
    report.notes.append(f"{len(layers)} caches in int8")


def _find_layers(program: Program, count: int) -> list[CachedLayer] | Obstacle:
    """The layers, or what else than a GroupQueryAttention reads a cache."""
    by_past_key = {call.past_key: (node, call) for node, call in GroupQueryAttentionCall.find(program)}
    layers = []
    for index in range(count):
        keys, values = program.inputs[2 + 2 * index : 4 + 2 * index]
        cache = [keys, values, *program.outputs[1 + 2 * index : 3 + 2 * index]]
        node, call = by_past_key.get(keys, (None, None))
        if node is None or call is None or call.past_value is not values:
            return Obstacle(keys.name, f"the attention of layer {index} is not one GroupQueryAttention")
        for user in {user for value in cache for user in value.users} - {node}:
            if user.op != "output" and user.target not in SIZES:
                return Obstacle(user.name, f"{user.name} reads the cache of layer {index} beside its attention")
        layers.append(CachedLayer(node, cache))
    return layers
