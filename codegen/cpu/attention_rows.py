"""Attention of few queries, as a decoded token needs it.

torch's CPU kernel (2.13) multiplies head by head and takes as long for one row as for several. Where the sizes fit,
`attention` of native_kernels.py reads every key once for all heads that share it, and a cache and what comes behind it
where they are, not copied into one. Elsewhere heads that share a key head become rows of one attention of torch's.
"""

from __future__ import annotations

from typing import cast

from torch import fx

from qcompile.codegen.cpu.cpu_op_checks import takes_attention
from qcompile.codegen.cpu.native_kernels import ops
from qcompile.codegen.sdpa_call import SDPACall, before_repeat
from qcompile.ir.aten_ops import SDPA, aten
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.program import Program

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
        if takes_attention(query, key.meta["val"], value.meta["val"]):
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
    return made


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
