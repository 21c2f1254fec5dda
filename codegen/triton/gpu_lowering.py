"""Lower the dialect of a Program to the operators of triton_ops.py, and fuse what stands around them.

    qlinear, x float             linear_w       int2, int3, int4, int8 weights, per channel or in groups
    qlinear, x quantized         linear_w4a8    int8 x int4 with two-level scales, or one a channel
                                 linear_a8      int8 x int8, fp8 x fp8; two-level scales of other groups as int8
                                 linear_group   int4 with scales of groups x int8 or int4, also with groups; fp4 x fp8
    qexperts, x float            experts_w      formats of linear_w, rows gathered inside (lower_experts.py)
    qexperts, x quantized        experts_w4a8   as linear_w4a8, of rows with a scale each
                                 experts_a8     as linear_a8
    any other                    plain ATen     dequantize and multiply (aten_fallback.py)
    linear + low-rank correction, + residual    the kernel's epilogue
    what stands before a quantize               row_quant, with it (fuse_row_quant.py)
    attention to a quantized static cache       kv_attend (lower_kv_attention.py)

Consumers decide: a linear layer whose result has other consumers keeps its own node.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from qcompile.codegen import aten_fallback
from qcompile.codegen.rows import rows_label
from qcompile.codegen.sibling_products import share_quantizations
from qcompile.codegen.triton.fuse_row_quant import fuse_into_row_quant, same_type
from qcompile.codegen.triton.gpu_linear_layers import LinearLayers, merged_siblings
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.lower_experts import lower_experts
from qcompile.codegen.triton.lower_kv_attention import lower_kv_attentions
from qcompile.codegen.triton.quantize_before_views import quantize_before_views
from qcompile.codegen.triton.triton_op_calls import LinearA8Call, LinearGroupCall, LinearW4A8Call, LinearWCall
from qcompile.ir.aten_ops import LINEAR
from qcompile.ir.op_calls import site_name
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember

aten = torch.ops.aten

_Product = LinearWCall | LinearA8Call | LinearW4A8Call | LinearGroupCall
_PRODUCTS: tuple[type[_Product], ...] = (LinearWCall, LinearA8Call, LinearW4A8Call, LinearGroupCall)
_MAX_RANK = 256  # inner dimension of a low-rank correction that an epilogue takes


def lower_to_gpu(program: Program, remember: Remember, gpu: Gpu | None = None) -> dict[str, dict[str, str]]:
    """Rewrite every call of the dialect, in place.

    Args:
        program: after fuse.
        remember: see weight_cache.py: prepared tensors are made once, whatever the number of graphs.
        gpu: the GPU; None is one of sm_90 that nothing was measured on.

    Returns:
        site name -> label of M (rows.py) -> kernel, for the report.
    """
    gpu = gpu or Gpu()
    chosen = lower_experts(program, remember, gpu)
    quantize_before_views(program)
    program.cleanup()  # quantizations that moved, before a gather or a view
    share_quantizations(program)
    for siblings in merged_siblings(program):
        sites = [(site_name(program, node), rows_label(node)) for node in siblings.nodes]
        kernel = LinearLayers(program, siblings, remember, gpu).lower()
        for site, label in sites:
            chosen.setdefault(site, {})[label] = kernel
    for kind in _PRODUCTS:
        for node, _ in kind.find(program):
            _fuse_epilogue(program, node, kind)
    lower_kv_attentions(program)
    fuse_into_row_quant(program, gpu.capability)
    aten_fallback.lower_rest(program)
    program.cleanup()
    return chosen


def _fuse_epilogue(program: Program, node: fx.Node, kind: type[_Product]) -> None:
    """Fuse additions of the layer's shape that are its only consumers: a correction first, then a residual."""
    for take in (_low_rank, _residual):
        users = list(node.users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
            return
        add = users[0]
        other = add.args[1] if add.args[0] is node else add.args[0]
        if not isinstance(other, fx.Node) or other is node or not same_type(other, node):
            return
        extra = take(other)
        if extra is None:
            continue
        fused = dataclasses.replace(kind.of(node), **extra).insert(program, before=add)
        add.replace_all_uses_with(fused)
        program.graph.erase_node(add)
        program.graph.erase_node(node)
        node = fused


def _low_rank(other: fx.Node) -> dict[str, Any] | None:
    """linear(low, up) with a small inner dimension -> the fields low and up."""
    if other.target is not LINEAR or len(other.args) > 2 or len(other.users) != 1:
        return None
    low, up = other.args
    assert isinstance(up, fx.Node)
    return dict(low=low, up=up) if up.meta["val"].shape[1] <= _MAX_RANK else None


def _residual(other: fx.Node) -> dict[str, Any] | None:
    return dict(residual=other)
