"""From our torch operators to ONNX nodes: the translation table of torch.onnx.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset21 as op

import qcompile.codegen.onnx.ops  # noqa: F401  registers the operators
from qcompile.codegen.onnx.ops.schemas import operator

Translation = Callable[..., Any]
"""Takes the arguments of a torch operator, tensors as onnxscript values; returns its outputs as such."""

_LEAST = torch.finfo(torch.float32).min


def translation_table(contrib_ops: bool) -> dict[Any, Translation]:
    """Torch operator -> translation; without contrib_ops: only what becomes operators of the ONNX standard."""
    ops = torch.ops.qcompile_onnx
    standard: dict[Any, Translation] = {
        ops.blocked_linear.default: _blocked_linear,
        ops.int8_linear.default: _int8_linear,
        ops.experts_linear.default: _experts_linear,
        ops.experts_blocked.default: _experts_blocked,
        ops.gather_nbits.default: _gather_standard,
    }
    if not contrib_ops:
        return standard
    return standard | {
        ops.nbits_linear.default: _nbits_linear,
        ops.dual_linear.default: _dual_linear,
        ops.experts_nbits.default: _experts_nbits,
        ops.group_query_attention.default: _group_query_attention,
        ops.attention_lengths.default: _attention_lengths,
        ops.rms_norm.default: _rms_norm,
        ops.skip_rms_norm.default: _skip_rms_norm,
        ops.gather_nbits.default: _gather_nbits,
        ops.multi_head_attention.default: _multi_head_attention,
        ops.skip_layer_norm.default: _skip_layer_norm,
        ops.gelu.default: _gelu,
        ops.quick_gelu.default: _quick_gelu,
    }


def _nbits_linear(x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, k: int, bits: int, block: int) -> Any:
    # accuracy_level 1 multiplies in float32, which is what is verified; variants.py may raise it afterwards.
    return operator("MatMulNBits")(
        x, codes, scales, zeros, None, bias, K=k, N=codes.shape[0], bits=bits, block_size=block, accuracy_level=1
    )


def _dual_linear(
    x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, k: int, bits: int, block: int, row: Any, per_row: bool
) -> Any:
    sizes = dict(K=k, N=codes.shape[0], bits=bits, block_size=block)
    return operator("DualLinear")(x, codes, scales, zeros, row, bias, **sizes, per_row=int(per_row))


def _blocked_linear(x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, bits: int, block: int) -> Any:
    return operator("BlockedLinear")(x, codes, scales, zeros, bias, K=x.shape[-1], bits=bits, block_size=block)


def _int8_linear(x: Any, weight: Any, scale: Any, sums: Any, bias: Any, per_row: bool) -> Any:
    return operator("Int8Linear")(x, weight, scale, sums, bias, per_row=int(per_row))


def _experts_linear(x: Any, ends: Any, weights: Any) -> Any:
    rows = _rows_by_expert(x, ends, len(weights))
    return op.Concat(*(op.MatMul(each, weight) for each, weight in zip(rows, weights, strict=True)), axis=0)


def _experts_nbits(x: Any, ends: Any, codes: Any, scales: Any, zeros: Any, k: int, bits: int, block: int) -> Any:
    products = [
        _nbits_linear(rows, codes[e], scales[e], zeros[e] if zeros else None, None, k, bits, block)
        for e, rows in enumerate(_rows_by_expert(x, ends, len(codes)))
    ]
    return op.Concat(*products, axis=0)


def _experts_blocked(x: Any, ends: Any, codes: Any, scales: Any, zeros: Any, k: int, bits: int, block: int) -> Any:
    weights = zip(_rows_by_expert(x, ends, len(codes)), codes, scales, zeros, strict=True)
    products = [operator("BlockedLinear")(*each, None, K=k, bits=bits, block_size=block) for each in weights]
    return op.Concat(*products, axis=0)


def _rows_by_expert(x: Any, ends: Any, experts: int) -> list[Any]:
    axis, last = op.Constant(value_ints=[0]), op.Cast(ends, to=TensorProto.INT64)
    bounds = [op.Slice(last, op.Constant(value_ints=[e]), op.Constant(value_ints=[e + 1])) for e in range(experts)]
    return [op.Slice(x, start, end, axis) for start, end in zip([axis, *bounds], bounds, strict=False)]


def _group_query_attention(
    query: Any, key: Any, value: Any, past_key: Any, past_value: Any, last: Any, total: Any, cos: Any, sin: Any,
    heads: int, scale: float, window: int, interleaved: bool, softcap: float, bias: Any, key_scale: Any = None,
    value_scale: Any = None,
) -> Any:  # fmt: skip
    attributes: dict[str, Any] = dict(
        num_heads=heads, kv_num_heads=past_key.shape[1], scale=scale, local_window_size=window,
        do_rotary=int(cos is not None), rotary_interleaved=int(interleaved), softcap=softcap,
    )  # fmt: skip
    inputs = [query, key, value, past_key, past_value, last, total, cos, sin, None, bias]
    if key_scale is not None:
        inputs += [None, key_scale, value_scale]
        attributes |= dict(kv_cache_bit_width=8, k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL")
    return operator("GroupQueryAttention")(*inputs, **attributes)


def _attention_lengths(mask: Any) -> Any:
    last = op.Sub(op.ReduceSum(mask, op.Constant(value_ints=[1]), keepdims=0), op.Constant(value_int=1))
    total = op.Shape(mask, start=1, end=2)
    return op.Cast(last, to=TensorProto.INT32), op.Cast(total, to=TensorProto.INT32)


def _rms_norm(x: Any, gain: Any, eps: float) -> Any:
    return operator("SimplifiedLayerNormalization")(x, gain, axis=-1, epsilon=eps, stash_type=1)


def _skip_rms_norm(x: Any, skip: Any, gain: Any, eps: float) -> Any:
    out, _, _, total = operator("SkipSimplifiedLayerNormalization")(x, skip, gain, epsilon=eps)
    return out, total


def _gather_nbits(ids: Any, codes: Any, scales: Any, zeros: Any, k: int, bits: int, block: int) -> Any:
    rows, blocks, _ = codes.shape
    flat = op.Reshape(codes, op.Constant(value_ints=[rows, -1]))
    values = operator("GatherBlockQuantized")(
        flat, ids, scales, zeros, bits=bits, block_size=block, gather_axis=0, quantize_axis=1
    )
    return values if blocks * block == k else _first_columns(values, k)


def _gather_standard(ids: Any, codes: Any, scales: Any, zeros: Any, k: int, bits: int, block: int) -> Any:
    """The same in operators of the ONNX standard, of 8-bit codes without zero points."""
    assert zeros is None and bits == 8
    levels = op.Sub(op.Cast(op.Gather(codes, ids), to=TensorProto.FLOAT), op.Constant(value_float=128.0))
    values = op.Mul(levels, op.Unsqueeze(op.Gather(scales, ids), op.Constant(value_ints=[-1])))
    flat = op.Reshape(values, op.Constant(value_ints=[0] * len(ids.shape) + [-1]))
    return _first_columns(flat, k)


def _first_columns(x: Any, k: int) -> Any:
    return op.Slice(x, *(op.Constant(value_ints=[n]) for n in (0, k, -1)))


def _multi_head_attention(
    query: Any, key: Any, value: Any, bias: Any, padding: Any, added: Any, heads: int, scale: float, is_causal: bool
) -> Any:
    # By default padding adds -10000 to a score, which a large one outweighs.
    return operator("MultiHeadAttention")(
        query, key, value, bias, padding, added, num_heads=heads, scale=scale, unidirectional=int(is_causal),
        mask_filter_value=_LEAST,
    )  # fmt: skip


def _skip_layer_norm(x: Any, skip: Any, gain: Any, shift: Any, bias: Any, eps: float) -> Any:
    out, _, _, total = operator("SkipLayerNormalization")(x, skip, gain, shift, bias, epsilon=eps)
    return out, total


def _gelu(x: Any, bias: Any, approximate: str) -> Any:
    if approximate == "tanh":
        return operator("FastGelu")(x, bias)
    return operator("Gelu")(x) if bias is None else operator("BiasGelu")(x, bias)


def _quick_gelu(x: Any, alpha: float) -> Any:
    return operator("QuickGelu")(x, alpha=alpha)
