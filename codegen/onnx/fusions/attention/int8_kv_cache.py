"""The cache of an exported decoder in int8 codes, held by the attentions that gqa.py made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.tracing.onnx_linear import NoOnnxForm
from qcompile.codegen.onnx.tracing.signature import WithCache
from qcompile.ir.program import Program
from qcompile.modules.kv_constants import Scales
from qcompile.recipe.report import PassReport

ops = torch.ops.qcompile_onnx


@dataclass(frozen=True)
class CodedCache:
    """A cache in int8 codes: its scales, and whether it may stay float where no attention can read it."""

    scales: Scales
    optional: bool


def hold_codes(program: Program, wrapper: WithCache, cache: CodedCache, report: PassReport) -> None:
    """Let every attention hold its cache in codes, in place, and the wrapper give and take them.

    Args:
        program: rewritten by rewrite_cached. report: what that said; names the cache if it stays float.

    Raises:
        NoOnnxForm: it would stay float, and may not. Nothing is changed then.
    """
    scales = wrapper.for_heads(cache.scales)
    layers = _layers(program, len(scales))
    if isinstance(layers, Obstacle):
        why = [f"{place.node}: {place.reason}" for place in report.skipped if place.site == "attention"]
        reason = f"{layers.reason} ({'; '.join(why) or layers.node})"
        if not cache.optional:
            raise NoOnnxForm(f"QuantizeKV: {reason}. Leave it out, or export with float_cache")
        report.skip("cache", f"stays float32: {reason}", layers.node)
        return
    wrapper.scales = scales
    for index, ((attention, held), pair) in enumerate(zip(layers, scales, strict=True)):
        names = (f"layer_{index}_keys", f"layer_{index}_values")
        steps = [program.add_weight(n, s[None, :, None].contiguous()) for n, s in zip(names, pair, strict=True)]
        attention.args = (*attention.args, *steps)
        for value in held:
            value.meta["val"] = value.meta["val"].to(torch.int8)
    report.notes.append(f"{len(layers)} caches in int8")


def _layers(program: Program, count: int) -> list[tuple[fx.Node, list[fx.Node]]] | Obstacle:
    """The attention of each layer, and its caches as they come and go; or what else reads one."""
    attentions = program.graph.find_nodes(op="call_function", target=ops.group_attention.default)
    fused = {node.args[3]: node for node in attentions}
    layers = []
    for index in range(count):
        keys, values = program.inputs[2 + 2 * index : 4 + 2 * index]
        held = [keys, values, *program.outputs[1 + 2 * index : 3 + 2 * index]]
        node = fused.get(keys)
        if node is None or node.args[4] is not values:
            return Obstacle(keys.name, f"the attention of layer {index} is not one GroupQueryAttention")
        for user in {user for value in held for user in value.users} - {node}:
            if user.op != "output" and user.target is not torch.ops.aten.sym_size.int:
                return Obstacle(user.name, f"{user.name} reads the cache of layer {index} beside its attention")
        layers.append((node, held))
    return layers
