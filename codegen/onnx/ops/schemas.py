"""ONNX operators that onnxscript's tracer has no schemas of: those of ONNX Runtime, and our own (op_inputs.py)."""

from __future__ import annotations

import functools
from typing import Any

import onnx
from onnx.defs import OpSchema
from onnxscript.values import Opset

from qcompile.codegen.onnx.lowering.op_inputs import (
    CONTRIB,
    DOMAIN,
    BlockedLinear,
    DualLinear,
    GroupQueryAttention,
    Int8Linear,
    MatMulNBits,
)

# operator -> (inputs, outputs, attributes); a name with "?" may be omitted.
_SCHEMAS: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "MatMulNBits": (
        MatMulNBits.names(), ["Y"], dict(K="INT", N="INT", bits="INT", block_size="INT", accuracy_level="INT")
    ),
    "GroupQueryAttention": (
        GroupQueryAttention.names(),
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
        DualLinear.names(), ["Y"], dict(K="INT", N="INT", bits="INT", block_size="INT", per_row="INT")
    ),
    "BlockedLinear": (BlockedLinear.names(), ["Y"], dict(K="INT", bits="INT", block_size="INT")),
    "Int8Linear": (Int8Linear.names(), ["Y"], dict(per_row="INT")),
}  # fmt: skip

_DOMAINS = {
    "SimplifiedLayerNormalization": "",  # ONNX Runtime registers this one in the standard domain
    **dict.fromkeys(("DualLinear", "BlockedLinear", "Int8Linear"), DOMAIN),
}

_TYPES = [f"tensor({dtype})" for dtype in ("float", "float16", "bfloat16", "uint8", "int8", "int32", "int64")]


@functools.cache
def operator(name: str) -> Any:
    """An operator as onnxscript has it, to be called in a translation function."""
    domain = _DOMAINS.get(name, CONTRIB)
    if not onnx.defs.has(name, domain):
        onnx.defs.register_schema(_schema(name, domain))
    return getattr(Opset(domain, 1), name)


def _schema(name: str, domain: str) -> OpSchema:
    """A schema in which every input and every output has a type of its own."""
    inputs, outputs, attributes = _SCHEMAS[name]
    optional, single = OpSchema.FormalParameterOption.Optional, OpSchema.FormalParameterOption.Single

    def formal(names: list[str], kind: str) -> list[Any]:
        return [
            OpSchema.FormalParameter(n.rstrip("?"), f"{kind}{i}", param_option=optional if n.endswith("?") else single)
            for i, n in enumerate(names)
        ]

    kinds = [f"I{i}" for i in range(len(inputs))] + [f"O{i}" for i in range(len(outputs))]
    return OpSchema(
        name, domain, 1, inputs=formal(inputs, "I"), outputs=formal(outputs, "O"),
        type_constraints=[(kind, _TYPES, "") for kind in kinds],
        attributes=[OpSchema.Attribute(n, OpSchema.AttrType[k], required=False) for n, k in attributes.items()],
    )  # fmt: skip
