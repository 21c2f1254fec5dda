"""Lower the dialect of a Program to the operators of triton_ops.py, and fuse what stands around them.

    qlinear, x float             linear_w       int2, int3, int4, int8 weights, per channel or in groups
    qlinear, x quantized         linear_a8      int8 x int8 (also int4 with two-level scales, as int8), fp8 x fp8
    any other                    plain ATen     dequantize and multiply (aten_fallback.py)
    linear + low-rank correction, + residual    the kernel's epilogue
    what stands before a quantize               row_quant, with it (fuse_row_quant.py)

Consumers decide: a linear layer whose result has other consumers keeps its own node.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.codegen import aten_fallback
from qcompile.codegen.prepared_weights import prepared_weights, stored_weight
from qcompile.codegen.rows import rows_label, rows_of
from qcompile.codegen.triton.fuse_row_quant import fuse_into_row_quant, same_type
from qcompile.codegen.triton.gpu_kernel_choice import NO_KERNEL, choose_gpu_kernel
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.kernel_support import operator_for
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.codegen.triton.triton_op_calls import LinearA8Call, LinearWCall
from qcompile.ir.aten_ops import LINEAR
from qcompile.ir.op_calls import QLinearCall, site_name
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember
from qcompile.numerics.qtensor import dequantize_to_int8, unpack_codes

aten = torch.ops.aten

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
    chosen: dict[str, dict[str, str]] = {}
    gpu = gpu or Gpu()
    for node, call in QLinearCall.find(program):
        site, label = site_name(program, node), rows_label(node)
        chosen.setdefault(site, {})[label] = _lower_qlinear(program, node, call, remember, gpu)
    for kind in (LinearWCall, LinearA8Call):
        for node, _ in kind.find(program):
            _fuse_epilogue(program, node, kind)
    fuse_into_row_quant(program, gpu.capability)
    aten_fallback.lower_rest(program)
    program.cleanup()
    return chosen


# -- linear layers -------------------------------------------------------------------------------------


def _lower_qlinear(program: Program, node: fx.Node, call: QLinearCall, remember: Remember, gpu: Gpu) -> str:
    """Replace a site's node by its kernel; returns the kernel, and its measured speed in comparison with float."""
    form, act, k, dtype = call.weight_format, call.act, call.columns, call.dtype
    choice = choose_gpu_kernel(gpu, form, act, dtype, rows_of(node)[0], k, int(call.weight.meta["val"].shape[0]))
    operator = operator_for(form, act, dtype, gpu.capability)
    if program.weight_name(call.weight) is None:
        operator = None
    if operator == "linear_w":
        result = _linear_w(program, node, call, remember)
    elif operator == "linear_a8":
        result = _linear_a8(program, node, call, remember)
    else:
        result, choice = aten_fallback.inline_qlinear(program, node, call), NO_KERNEL
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)
    return str(choice)


def _linear_w(program: Program, node: fx.Node, call: QLinearCall, remember: Remember) -> fx.Node:
    stored, form, k = stored_weight(program, call), call.weight_format, call.columns
    made = prepared_weights(program, [call], "linear_w", remember, lambda: prepare(*stored, form, k))
    packed, scale, *zeros = made
    zero = zeros[0] if zeros else None
    return LinearWCall(
        call.x, packed, scale, zero, call.bias, residual=None, low=None, up=None, format=call.format, columns=k
    ).insert(program, before=node)


def _linear_a8(program: Program, node: fx.Node, call: QLinearCall, remember: Remember) -> fx.Node:
    weight, scale, form, k = call.weight, call.scale, call.weight_format, call.columns
    assert call.x_scale is not None
    if form.scale != "f32":
        wide = functools.partial(_wide_scale, program, call)
        (scale,) = prepared_weights(program, [call], "float32 scales", remember, wide)
    if form.dual:
        codes, _, zero, group_scale = stored_weight(program, call)

        def make() -> tuple[Tensor]:
            return (dequantize_to_int8(unpack_codes(codes, form, k), zero, group_scale, form),)

        (weight,) = prepared_weights(program, [call], "int8", remember, make)
    return LinearA8Call(
        call.x, call.x_scale, weight, scale, call.bias, residual=None, low=None, up=None, dtype=call.dtype
    ).insert(program, before=node)


def _wide_scale(program: Program, call: QLinearCall) -> tuple[Tensor]:
    return (stored_weight(program, call)[1].float(),)


def _fuse_epilogue(program: Program, node: fx.Node, kind: type[LinearWCall] | type[LinearA8Call]) -> None:
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
