"""From our operators to ONNX nodes: the translation table for torch.onnx.export."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op
from onnxscript.values import Opset

import qcompile.codegen.onnx.ops.attention_ops
import qcompile.codegen.onnx.ops.matmul_ops  # noqa: F401  registers the operators
from qcompile.codegen.onnx.lowering.node_builder import DOMAIN

_MICROSOFT = "com.microsoft"
_LEAST = torch.finfo(torch.float32).min
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

# ONNX ships no schemas of ONNX Runtime's own domain, nor of the nodes that matmul_nbits.py replaces; the tracer needs them.
# operator -> (inputs, outputs, attributes); a name with "?" may be left out.
_SCHEMAS = {
    "MatMulNBits": (
        ["A", "B", "scales", "zero_points?", "g_idx?", "bias?"],
        ["Y"],
        dict(K="INT", N="INT", bits="INT", block_size="INT", accuracy_level="INT"),
    ),
    "GroupQueryAttention": (
        ["query", "key?", "value?", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos?", "sin?",
         "position_ids?", "attention_bias?", "head_sink?", "k_scale?", "v_scale?"],
        ["output", "present_key", "present_value"],
        dict(num_heads="INT", kv_num_heads="INT", scale="FLOAT", local_window_size="INT", do_rotary="INT",
             rotary_interleaved="INT", softcap="FLOAT", kv_cache_bit_width="INT", k_quant_type="STRING",
             v_quant_type="STRING"),
    ),
    "SkipSimplifiedLayerNormalization": (
        ["input", "skip", "gamma"],
        ["output", "mean?", "inv_std_var?", "input_skip_bias_sum"],
        dict(epsilon="FLOAT"),
    ),
    "SimplifiedLayerNormalization": (["X", "scale"], ["Y"], dict(axis="INT", epsilon="FLOAT", stash_type="INT")),
    "GatherBlockQuantized": (
        ["data", "indices", "scales", "zero_points?"],
        ["output"],
        dict(bits="INT", block_size="INT", gather_axis="INT", quantize_axis="INT"),
    ),
    "MultiHeadAttention": (
        ["query", "key", "value", "bias?", "key_padding_mask?", "attention_bias?"],
        ["output"],
        dict(num_heads="INT", scale="FLOAT", unidirectional="INT", mask_filter_value="FLOAT"),
    ),
    "SkipLayerNormalization": (
        ["input", "skip", "gamma", "beta?", "bias?"],
        ["output", "mean?", "inv_std_var?", "input_skip_bias_sum"],
        dict(epsilon="FLOAT"),
    ),
    "Gelu": (["X"], ["Y"], {}),
    "BiasGelu": (["A", "B"], ["C"], {}),
    "FastGelu": (["X", "bias?"], ["Y"], {}),
    "QuickGelu": (["X"], ["Y"], dict(alpha="FLOAT")),
    "DualLinear": (
        ["X", "codes", "scales", "zero_points?", "row_scale", "bias?"],
        ["Y"],
        dict(K="INT", N="INT", bits="INT", block_size="INT", per_row="INT"),
    ),
    "BlockedLinear": (
        ["X", "codes", "scales", "zero_points", "bias?"], ["Y"], dict(K="INT", bits="INT", block_size="INT")
    ),
    "Int8Linear": (["X", "weight", "scale", "sums?", "bias?"], ["Y"], dict(per_row="INT")),
}  # fmt: skip


def _declare(name: str, domain: str) -> None:
    if onnx.defs.has(name, domain):
        return
    schema, (inputs, outputs, attributes) = onnx.defs.OpSchema, _SCHEMAS[name]
    optional, single = schema.FormalParameterOption.Optional, schema.FormalParameterOption.Single

    def formal(names: list[str], kind: str) -> list[Any]:
        return [
            schema.FormalParameter(n.rstrip("?"), f"{kind}{i}", param_option=optional if n.endswith("?") else single)
            for i, n in enumerate(names)
        ]

    every = [*_FLOATS, "tensor(uint8)", "tensor(int8)", "tensor(int32)", "tensor(int64)"]
    constraints = [(f"I{i}", every, "") for i in range(len(inputs))] + [
        (f"O{i}", every, "") for i in range(len(outputs))
    ]
    kinds = [schema.Attribute(n, getattr(schema.AttrType, k), required=False) for n, k in attributes.items()]
    onnx.defs.register_schema(
        schema(name, domain, 1, inputs=formal(inputs, "I"), outputs=formal(outputs, "O"),
               type_constraints=constraints, attributes=kinds)
    )  # fmt: skip


@functools.cache
def _operator(name: str, domain: str = _MICROSOFT) -> Any:
    _declare(name, domain)
    return getattr(Opset(domain, 1), name)


def _nbits_linear(x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, k: int, bits: int, block: int) -> Any:
    # accuracy_level 1 multiplies in float32, which is what is proven; export_module.py may raise it afterwards.
    return _operator("MatMulNBits")(
        x, codes, scales, zeros, None, bias, K=k, N=codes.shape[0], bits=bits, block_size=block, accuracy_level=1
    )


def _dual_linear(
    x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, k: int, bits: int, block: int, row: Any, per_row: bool
) -> Any:
    return _operator("DualLinear", DOMAIN)(
        x, codes, scales, zeros, row, bias, K=k, N=codes.shape[0], bits=bits, block_size=block, per_row=int(per_row)
    )


def _blocked_linear(x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, bits: int, block: int) -> Any:
    return _operator("BlockedLinear", DOMAIN)(x, codes, scales, zeros, bias, K=x.shape[-1], bits=bits, block_size=block)


def _int8_linear(x: Any, weight: Any, scale: Any, sums: Any, bias: Any, per_row: bool) -> Any:
    return _operator("Int8Linear", DOMAIN)(x, weight, scale, sums, bias, per_row=int(per_row))


def _experts_linear(x: Any, ends: Any, weights: Any) -> Any:
    rows = _of_experts(x, ends, len(weights))
    return op.Concat(*(op.MatMul(each, weight) for each, weight in zip(rows, weights, strict=True)), axis=0)


def _experts_nbits(x: Any, ends: Any, codes: Any, scales: Any, zeros: Any, k: int, bits: int, block: int) -> Any:
    products = [
        _nbits_linear(rows, codes[e], scales[e], zeros[e] if zeros else None, None, k, bits, block)
        for e, rows in enumerate(_of_experts(x, ends, len(codes)))
    ]
    return op.Concat(*products, axis=0)


def _experts_blocked(x: Any, ends: Any, codes: Any, scales: Any, zeros: Any, k: int, bits: int, block: int) -> Any:
    multiply = functools.partial(_operator("BlockedLinear", DOMAIN), K=k, bits=bits, block_size=block)
    rows = _of_experts(x, ends, len(codes))
    return op.Concat(*(multiply(*each, None) for each in zip(rows, codes, scales, zeros, strict=True)), axis=0)


def _of_experts(x: Any, ends: Any, experts: int) -> list[Any]:
    axis, one = op.Constant(value_ints=[0]), functools.partial(op.Slice, op.Cast(ends, to=onnx.TensorProto.INT64))
    last = [one(op.Constant(value_ints=[e]), op.Constant(value_ints=[e + 1])) for e in range(experts)]
    return [op.Slice(x, start, end, axis) for start, end in zip([axis, *last], last, strict=False)]


def _group_attention(
    query: Any, key: Any, value: Any, past_key: Any, past_value: Any, last: Any, total: Any, cos: Any, sin: Any,
    heads: int, scale: float, window: int, interleaved: bool, cap: float, bias: Any, key_scale: Any = None,
    value_scale: Any = None,
) -> Any:  # fmt: skip
    how: dict[str, Any] = dict(
        num_heads=heads, kv_num_heads=past_key.shape[1], scale=scale, local_window_size=window,
        do_rotary=int(cos is not None), rotary_interleaved=int(interleaved), softcap=cap,
    )  # fmt: skip
    inputs = [query, key, value, past_key, past_value, last, total, cos, sin, None, bias]
    if key_scale is not None:
        inputs += [None, key_scale, value_scale]
        how |= dict(kv_cache_bit_width=8, k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL")
    return _operator("GroupQueryAttention")(*inputs, **how)


def _lengths(mask: Any) -> Any:
    last = op.Sub(op.ReduceSum(mask, op.Constant(value_ints=[1]), keepdims=0), op.Constant(value_int=1))
    total = op.Shape(mask, start=1, end=2)
    return op.Cast(last, to=onnx.TensorProto.INT32), op.Cast(total, to=onnx.TensorProto.INT32)


def _rms_norm(x: Any, gain: Any, eps: float) -> Any:
    # ONNX Runtime registers this one in the standard domain.
    return _operator("SimplifiedLayerNormalization", "")(x, gain, axis=-1, epsilon=eps, stash_type=1)


def _skip_rms_norm(x: Any, skip: Any, gain: Any, eps: float) -> Any:
    out, _, _, total = _operator("SkipSimplifiedLayerNormalization")(x, skip, gain, epsilon=eps)
    return out, total


def _gather_nbits(ids: Any, codes: Any, scales: Any, zeros: Any, k: int, bits: int, block: int) -> Any:
    rows, blocks, _ = codes.shape
    flat = op.Reshape(codes, op.Constant(value_ints=[rows, -1]))
    numbers = _operator("GatherBlockQuantized")(
        flat, ids, scales, zeros, bits=bits, block_size=block, gather_axis=0, quantize_axis=1
    )
    if blocks * block == k:
        return numbers
    ends = [op.Constant(value_ints=[n]) for n in (0, k, -1)]
    return op.Slice(numbers, *ends)


def _gather_standard(ids: Any, codes: Any, scales: Any, zeros: Any, k: int, bits: int, block: int) -> Any:
    """The same in operators of the standard, of 8-bit codes without zero points."""
    assert zeros is None and bits == 8
    levels = op.Sub(op.Cast(op.Gather(codes, ids), to=onnx.TensorProto.FLOAT), op.Constant(value_float=128.0))
    numbers = op.Mul(levels, op.Unsqueeze(op.Gather(scales, ids), op.Constant(value_ints=[-1])))
    flat = op.Reshape(numbers, op.Constant(value_ints=[0] * len(ids.shape) + [-1]))
    return op.Slice(flat, *(op.Constant(value_ints=[n]) for n in (0, k, -1)))


def _multi_head_attention(
    query: Any, key: Any, value: Any, bias: Any, padding: Any, added: Any, heads: int, scale: float, is_causal: bool
) -> Any:
    # By default padding adds -10000 to a score, which a large one outweighs.
    return _operator("MultiHeadAttention")(
        query, key, value, bias, padding, added, num_heads=heads, scale=scale, unidirectional=int(is_causal),
        mask_filter_value=_LEAST,
    )  # fmt: skip


def _skip_layer_norm(x: Any, skip: Any, gain: Any, shift: Any, bias: Any, eps: float) -> Any:
    out, _, _, total = _operator("SkipLayerNormalization")(x, skip, gain, shift, bias, epsilon=eps)
    return out, total


def _gelu(x: Any, bias: Any, approximate: str) -> Any:
    if approximate == "tanh":
        return _operator("FastGelu")(x, bias)
    return _operator("Gelu")(x) if bias is None else _operator("BiasGelu")(x, bias)


def _gate(x: Any, slope: float) -> Any:
    return _operator("QuickGelu")(x, alpha=slope)


def table(portable: bool) -> dict[Any, Callable[..., Any]]:
    """Operator -> translation; portable: only what becomes operators of the standard."""
    ops = torch.ops.qcompile_onnx
    standard = {
        ops.blocked_linear.default: _blocked_linear,
        ops.int8_linear.default: _int8_linear,
        ops.experts_linear.default: _experts_linear,
        ops.experts_blocked.default: _experts_blocked,
        ops.gather_nbits.default: _gather_standard,
    }
    if portable:
        return standard
    return standard | {
        ops.nbits_linear.default: _nbits_linear,
        ops.dual_linear.default: _dual_linear,
        ops.experts_nbits.default: _experts_nbits,
        ops.group_attention.default: _group_attention,
        ops.lengths.default: _lengths,
        ops.rms_norm.default: _rms_norm,
        ops.skip_rms_norm.default: _skip_rms_norm,
        ops.gather_nbits.default: _gather_nbits,
        ops.multi_head_attention.default: _multi_head_attention,
        ops.skip_layer_norm.default: _skip_layer_norm,
        ops.gelu.default: _gelu,
        ops.gate.default: _gate,
    }
