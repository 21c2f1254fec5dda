"""Attention of all positions at once, as an encoder has it: `short_attention` where that was measured faster.

`measured-attention-vnni.json` and `measured-attention-avx2.json` hold microseconds of the operator and of torch's own
attention over lengths, widths of a head and dtypes, measured by `benches/attention_cpu.py`. A choice takes the nearest
measured (queries, keys, width), in log distance.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from qcompile.codegen.cpu.native_kernels import ops
from qcompile.codegen.cpu.short_attention_checks import takes_short_attention
from qcompile.codegen.sdpa_call import SDPACall, before_repeat
from qcompile.ir.aten_ops import SDPA
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint
from qcompile.numerics.int8_matmul import processor


class MeasuredAttention(NamedTuple):
    """One measured attention, of S queries and T keys of heads of a width: torch's time / the operator's time."""

    queries: int
    keys: int
    width: int
    ratio: float


@functools.cache
def _table(measured_on: str) -> dict[str, list[MeasuredAttention]]:
    """dtype -> all that was measured of it."""
    data = json.loads((Path(__file__).parent / f"measured-attention-{measured_on}.json").read_text())
    table: dict[str, list[MeasuredAttention]] = {}
    for row in data["rows"]:
        ratio = row["torch_us"] / row["us"]
        table.setdefault(row["dtype"], []).append(MeasuredAttention(row["S"], row["T"], row["D"], ratio))
    return table


def attention_ratio(dtype: torch.dtype, queries: int, keys: int, width: int) -> float:
    """Time of torch's attention / time of `short_attention` at the nearest measured shape; 0 if none was measured.

    Args:
        dtype: of queries, keys and values.
        queries: S.
        keys: T.
        width: D, of a head.
    """
    here = processor()
    if here == "amx" and dtype == torch.bfloat16:  # tiles multiply bfloat16, and our operator has none
        return 0.0
    known = _table("vnni" if here in ("amx", "vnni") else "avx2").get(str(dtype).removeprefix("torch."), [])

    def distance(other: MeasuredAttention) -> float:
        return sum(abs(math.log(a / max(b, 1))) for a, b in zip(other, (queries, keys, width), strict=False))

    return min(known, key=distance).ratio if known else 0.0


def lower_short_attentions(program: Program) -> int:
    """Rewrite every attention that the operator takes and computes faster, in place; gives how many.

    Causal attentions and those with dropout stay torch's. Where sizes are symbolic, those that were traced decide.
    """
    made = 0
    for node in list(program.graph.find_nodes(op="call_function", target=SDPA)):
        call = SDPACall.of(node)
        if call.is_causal or call.dropout_p:
            continue
        key, value = before_repeat(call.key), before_repeat(call.value)
        if any(part.meta.get(WRITTEN) for part in (key, value)):
            key, value = call.key, call.value
        query, keys, values = (part.meta["val"] for part in (call.query, key, value))
        if not takes_short_attention(query, keys, values):
            continue
        sizes = int(hint(query.shape[2])), int(hint(keys.shape[2])), query.shape[3]
        if attention_ratio(query.dtype, *sizes) <= 1:
            continue
        operands = call.query, key, value, call.attn_mask, call.score_scale
        node.replace_all_uses_with(program.insert(ops.short_attention.default, operands, before=node))
        program.graph.erase_node(node)  # it counts as random, so that nothing else would remove it
        made += 1
    return made
