"""Attention of few queries, as a decoded token needs it.

torch's CPU kernel (2.13) multiplies head by head and takes as long for one row as for several. Where the sizes fit,
`attention` of native_kernels.py reads every key once for all heads that share it, and a cache and what comes behind it
where they are, not copied into one; a quantized cache is read as codes (`code_attention`). Elsewhere heads that share a
key head become rows of one attention of torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from qcompile.codegen.cpu.attention_checks import takes_attention
from qcompile.codegen.cpu.native_kernels import ops
from qcompile.codegen.sdpa_call import SDPACall, before_repeat
from qcompile.ir.aten_ops import SDPA, aten
from qcompile.ir.cache_op import cached_values
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.program import Program

_READ_CACHE = torch.ops.qcompile.read_cache.default
_FEW = 8  # queries of each head; beyond, torch's own products are faster


def lower_attentions(program: Program) -> dict[str, int]:
    """Rewrite every attention of few queries, in place, but for causal ones and those with dropout.

    Returns:
        What was made, "attention" or "rows", -> how many.
    """
    made = {"attention": 0, "rows": 0}
    for node in list(program.graph.find_nodes(op="call_function", target=SDPA)):
        call = SDPACall.of(node)
        query = call.query.meta["val"]
        positions = query.shape[2] if query.ndim == 4 else None
        if not isinstance(positions, int) or positions > _FEW or call.is_causal or call.dropout_p:
            continue
        key, value = before_repeat(call.key), before_repeat(call.value)
        fixed = not any(part.meta.get(WRITTEN) for part in (key, value))
        if not fixed or key.meta["val"].shape[1] != value.meta["val"].shape[1]:
            key, value = call.key, call.value
        whole = key, value
        stored = _code_operands(key, value)
        if stored is not None and takes_attention(query, key.meta["val"], value.meta["val"]):
            node.replace_all_uses_with(_over_codes(program, node, call, *stored))
            made["attention"] += 1
        elif takes_attention(query, key.meta["val"], value.meta["val"]):
            (key, new_key), (value, new_value) = _past_and_new(key), _past_and_new(value)
            if new_key is None or new_value is None:
                key, value, new_key, new_value = *whole, None, None
            operands = call.query, key, value, new_key, new_value, call.attn_mask, call.score_scale
            node.replace_all_uses_with(program.insert(ops.attention.default, operands, before=node))
            made["attention"] += 1
        elif positions == 1 and _group_heads(program, node, call, key, value):
            made["rows"] += 1
        else:
            continue
        program.graph.erase_node(node)  # it counts as random, so that nothing else would remove it
    program.cleanup()  # of caches that are read as codes only
    for node in list(program.graph.find_nodes(op="call_function", target=_READ_CACHE)):
        node.replace_all_uses_with(program.inline(cached_values, node.args, before=node))
        program.graph.erase_node(node)
    return made


@dataclass(frozen=True)
class _Cached:
    """Keys or values of a quantized cache: floats before the codes, arguments of read_cache, and what is new."""

    first: fx.Node | None
    codes: tuple[Any, ...]
    new: fx.Node

    @classmethod
    def of(cls, keys: fx.Node) -> _Cached | None:
        parts = cast(list[fx.Node], keys.args[0]) if keys.target is aten.cat.default else []
        if len(parts) not in (2, 3) or parts[-2].target is not _READ_CACHE:
            return None
        return cls(parts[0] if len(parts) == 3 else None, parts[-2].args, parts[-1])


def _code_operands(key: fx.Node, value: fx.Node) -> tuple[_Cached, _Cached] | None:
    keys, values = _Cached.of(key), _Cached.of(value)
    if keys is None or values is None or values.codes[3] is not None or values.codes[4] is not None:
        return None  # values are neither rotated nor centered
    return keys, values


def _over_codes(program: Program, node: fx.Node, call: SDPACall, keys: _Cached, values: _Cached) -> fx.Node:
    """The query is rotated in place of the keys, and their center is a number for each query."""
    _, _, _, rotation, center, *_ = keys.codes
    rotated, bias = None, None
    if rotation is not None:
        rotated = program.inline(lambda q, r: q.float() @ r, (call.query, rotation), before=node)
    if center is not None:
        bias = program.inline(_times_center, (call.query, center), before=node)
    of_floats = keys.first, values.first, *keys.codes[:3], *values.codes[:3], keys.new, values.new
    operands = call.query, rotated, bias, *of_floats, call.attn_mask, call.score_scale
    return program.insert(ops.code_attention.default, operands, before=node)


def _times_center(query: Tensor, center: Tensor) -> Tensor:
    """query [B, H, S, D], center [G, 1, D] of the head that H / G queries share -> [B, H, S]."""
    shared: Tensor = query.float().unflatten(1, (center.shape[0], -1))
    return (shared * center[:, None]).sum(-1).flatten(1, 2)


def _past_and_new(keys: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What a cache holds and what is put behind it, where one is: the two are read where they are."""
    parts = cast(list[fx.Node], keys.args[0]) if keys.target is aten.cat.default else []
    dim = keys.args[1] if len(keys.args) > 1 else 0
    if len(parts) != 2 or dim not in (2, -2) or parts[0].meta["val"].ndim != 4:
        return keys, None
    if any(part.meta.get(WRITTEN) for part in parts):  # which may hold something else where the attention reads
        return keys, None
    return parts[0], parts[1]


def _group_heads(program: Program, node: fx.Node, call: SDPACall, key: fx.Node, value: fx.Node) -> bool:
    """Make the heads of a group rows of one attention, if one mask serves them all."""
    query, mask = call.query.meta["val"], call.attn_mask
    heads, shared = query.shape[1], key.meta["val"].shape[1]
    same_mask = mask is None or mask.meta["val"].ndim < 3 or mask.meta["val"].shape[-3] == 1
    if not same_mask or not isinstance(heads, int) or heads == shared or heads % shared:
        return False
    sizes = shared, heads // shared, query.shape[3]
    rows = program.inline(lambda q: q.reshape(q.shape[0], *sizes), (call.query,), before=node)
    together = program.insert(SDPA, (rows, key, value, mask), {"scale": call.scale}, before=node)
    apart = program.inline(lambda out: out.reshape(out.shape[0], heads, 1, out.shape[3]), (together,), before=node)
    node.replace_all_uses_with(apart)
    return True
