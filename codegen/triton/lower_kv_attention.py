"""Attention to a quantized cache in static buffers, over the codes: no key or value is dequantized in memory.

    kv_write, length += N, kv_read, [repeat of heads], attention with a mask    ->    kv_write, length += N, kv_attend

where the query has few positions and a kernel takes its heads (triton_kv_ops.py). Longer ones, prompts, keep kv_read:
there dequantizing once is little beside the products.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.codegen.sdpa_call import SDPACall, before_repeat
from qcompile.codegen.triton.triton_kv_ops import has_kv_kernel
from qcompile.ir.aten_ops import SDPA
from qcompile.ir.program import Program

_READ = torch.ops.qcompile.kv_read.default
_WRITE = torch.ops.qcompile.kv_write.default
_ATTEND = torch.ops.qcompile.kv_attend.default


def lower_kv_attentions(program: Program) -> int:
    """Rewrite every attention that reads a whole cache for few positions, in place; gives how many."""
    made = 0
    for node in list(program.graph.find_nodes(op="call_function", target=SDPA)):
        call = SDPACall.of(node)
        read = _cache_of(call)
        if read is None or call.attn_mask is None or call.is_causal or call.dropout_p:
            continue
        length, mask = _length_of(read), call.attn_mask.meta["val"]
        query = call.query.meta["val"]
        sizes = query.shape[0], query.shape[2]
        fits = mask.ndim == 4 and mask.shape[1] == 1 and isinstance(sizes[1], int)
        if length is None or not fits or not has_kv_kernel(query.shape[3], sizes[1], query.dtype):
            continue
        added = program.inline(_added, (call.query, call.attn_mask), before=node)
        *buffers, bits, _ = read.args
        operands = (call.query, *buffers, length, added, call.score_scale, bits)
        node.replace_all_uses_with(program.insert(_ATTEND, operands, before=node))
        program.graph.erase_node(node)  # it counts as random, so that nothing else would remove it
        made += 1
    if made:
        program.cleanup()  # of caches that nothing reads any more
    return made


def _cache_of(call: SDPACall) -> fx.Node | None:
    """The kv_read that gives both keys and values of an attention."""
    parts = before_repeat(call.key), before_repeat(call.value)
    if any(part.target is not operator.getitem for part in parts):
        return None
    reads = {part.args[0] for part in parts}
    read = reads.pop()
    if reads or not isinstance(read, fx.Node) or read.target is not _READ:
        return None
    return read if [part.args[1] for part in parts] == [0, 1] else None


def _length_of(read: fx.Node) -> fx.Node | None:
    """The count of tokens, a tensor that is counted up behind the one write into these buffers; None for others."""
    keys = read.args[0]
    assert isinstance(keys, fx.Node)
    writes = [user for user in keys.users if user.target is _WRITE]
    if len(writes) != 1 or not writes[0] < read:
        return None
    new, length = writes[0].args[0], writes[0].args[6]
    if not isinstance(length, fx.Node) or not isinstance(new, fx.Node):
        return None
    counted = [user for user in length.users if user.target is torch.ops.aten.add_.Tensor and user.args[0] is length]
    tokens = new.meta["val"].shape[2]
    right = len(counted) == 1 and writes[0] < counted[0] < read and _same(counted[0].args[1], tokens)
    return length if right else None


def _same(found: Any, tokens: Any) -> bool:
    """Whether an operand of a graph is a number of tokens."""
    value = found.meta.get("val") if isinstance(found, fx.Node) else found
    return bool(value == tokens) if isinstance(value, (int, torch.SymInt)) else False


def _added(query: Tensor, mask: Tensor) -> Tensor:
    """A mask [.., 1, N, T] of booleans, or of floats that are added, -> float32 [B, N, T]."""
    one_head = mask[:, 0].expand(query.shape[0], query.shape[2], mask.shape[-1])
    if mask.dtype == torch.bool:
        zeros = torch.zeros(one_head.shape, dtype=torch.float32, device=mask.device)
        return zeros.masked_fill(~one_head, float("-inf"))
    return one_head.float().contiguous()
