"""Inputs of the ONNX operators that the lowering reads or writes, by name.

    dual = DualLinear.of(node)              read: dual.codes, dual.bias
    replace(dual, bias=None).as_list()      write: what ir.Node takes

Three operators of our own domain stand in an exported graph, written by ops/translate.py, and none in a finished file:

    Int8Linear      an int8 weight times int8 activations
    DualLinear      a weight of two-level scales, s_row s1 (q - z) with |s1 (q - z)| <= 127 (DGQ, arXiv:2310.04836;
                    QoQ, arXiv:2405.04532): int4 per group and int8 per row at once
    BlockedLinear   an int4 or int8 weight per group, for files of standard operators

The fields of a class are the inputs of its operator, in the order of the schema; None is an omitted one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self, TypeAlias, get_type_hints

import onnx_ir as ir

DOMAIN = "qcompile"
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators

OptionalValue: TypeAlias = ir.Value | None


@dataclass(frozen=True)
class OpInputs:
    """Inputs of one node; a subclass is named as its operator."""

    @classmethod
    def of(cls, node: ir.Node) -> Self:
        """The inputs of a node. Raises TypeError if it is another operator."""
        if node.op_type != cls.__name__:
            raise TypeError(f"{node.name} is {node.op_type}, not {cls.__name__}")
        omitted = len(fields(cls)) - len(node.inputs)
        return cls(*node.inputs, *[None] * omitted)

    @classmethod
    def names(cls) -> list[str]:
        """Names of all inputs, with a question mark behind those that may be omitted."""
        types = get_type_hints(cls)
        return [f"{field.name}{'?' * (types[field.name] == OptionalValue)}" for field in fields(cls)]

    def as_list(self) -> list[OptionalValue]:
        """All inputs up to the last that is given."""
        values = [getattr(self, field.name) for field in fields(self)]
        while values[-1] is None:
            values.pop()
        return values


@dataclass(frozen=True)
class Int8Linear(OpInputs):
    """x [.., K] @ weight [K, N] in int8, times scale [N], plus bias [N]. Attribute: per_row, of the scales of x.

    Attributes:
        weight: int8 codes; with standard operators uint8, the same plus 128.
        sums: [N], scale times the sums of the codes over K, where x has zero points.
    """

    x: ir.Value
    weight: ir.Value
    scale: ir.Value
    sums: OptionalValue
    bias: OptionalValue


@dataclass(frozen=True)
class DualLinear(OpInputs):
    """x [.., K] @ dq(codes).T + bias [N]. Attributes: K, N, bits, block_size, per_row.

    Attributes:
        codes: uint8 [N, blocks, block_size bits / 8], packed.
        scales: float32 [N, blocks], integer multiples of row_scale.
        zero_points: uint8 [N, ceil(blocks bits / 8)], packed; None: the middle of the codes.
        row_scale: float32 [N].
    """

    x: ir.Value
    codes: ir.Value
    scales: ir.Value
    zero_points: OptionalValue
    row_scale: ir.Value
    bias: OptionalValue


@dataclass(frozen=True)
class BlockedLinear(OpInputs):
    """x [.., K] @ dq(codes) + bias [N]. Attributes: K, bits, block_size.

    Attributes:
        codes: uint8, the packed codes of [K, N].
        scales: float32 [blocks, N].
        zero_points: uint8, the packed zero points of [blocks, N].
    """

    x: ir.Value
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value
    bias: OptionalValue


@dataclass(frozen=True)
class MatMulNBits(OpInputs):
    """ONNX Runtime's: x @ dq(B).T + bias, of a weight of 4-bit or 8-bit blocks."""

    A: ir.Value
    B: ir.Value
    scales: ir.Value
    zero_points: OptionalValue
    g_idx: OptionalValue
    bias: OptionalValue


@dataclass(frozen=True)
class GroupQueryAttention(OpInputs):
    """ONNX Runtime's causal attention over a KV cache, which it extends: -> (output, present_key, present_value).

    Attributes:
        query: [B, S, H D], or with key and value behind it.
        past_key: [B, G, P, D]; past_value too.
        seqlens_k: int32 [B], valid tokens less one.
        total_sequence_length: int32 [1], P + S.
        k_scale: [1, G, 1, D], of an int8 KV cache; v_scale too.
    """

    query: ir.Value
    key: OptionalValue
    value: OptionalValue
    past_key: ir.Value
    past_value: ir.Value
    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    cos: OptionalValue
    sin: OptionalValue
    position_ids: OptionalValue
    attention_bias: OptionalValue
    head_sink: OptionalValue
    k_scale: OptionalValue
    v_scale: OptionalValue
