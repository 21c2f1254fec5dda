"""Typed views of calls of the operators of triton_ops.py: arguments by name, never by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import qcompile.codegen.triton.triton_experts_op
import qcompile.codegen.triton.triton_group_op
import qcompile.codegen.triton.triton_ops
import qcompile.codegen.triton.triton_quantized_experts_op
import qcompile.codegen.triton.triton_w4a8_op  # noqa: F401  all register torch.ops.qcompile_triton
from qcompile.ir.op_calls import OpCall, Operand


@dataclass(frozen=True)
class LinearWCall(OpCall):
    """qcompile_triton::linear_w, a linear layer with weight-only quantization."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.linear_w.default

    x: fx.Node
    packed: fx.Node
    scale: fx.Node
    zero: Operand
    bias: Operand
    residual: Operand
    low: Operand
    up: Operand
    format: str
    columns: int


@dataclass(frozen=True)
class LinearA8Call(OpCall):
    """qcompile_triton::linear_a8, a linear layer with 8-bit codes on both sides."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.linear_a8.default

    x: fx.Node
    x_scale: fx.Node
    weight: fx.Node
    scale: fx.Node
    bias: Operand
    residual: Operand
    low: Operand
    up: Operand
    dtype: torch.dtype


@dataclass(frozen=True)
class LinearW4A8Call(OpCall):
    """qcompile_triton::linear_w4a8, a linear layer with 4-bit weights and int8 activations."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.linear_w4a8.default

    x: fx.Node
    x_scale: fx.Node
    packed: fx.Node
    steps: fx.Node
    scale: fx.Node
    bias: Operand
    residual: Operand
    low: Operand
    up: Operand
    format: str
    columns: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LinearGroupCall(OpCall):
    """qcompile_triton::linear_group, a linear layer with 4-bit weights and integer activations, scales of groups."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.linear_group.default

    x: fx.Node
    x_scale: fx.Node
    packed: fx.Node
    words: fx.Node
    bias: Operand
    residual: Operand
    low: Operand
    up: Operand
    format: str
    act: str
    columns: int
    dtype: torch.dtype


@dataclass(frozen=True)
class CenteredCall(OpCall):
    """qcompile_triton::centered, codes of activations less their zero points."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.centered.default

    codes: fx.Node
    zero: fx.Node
    format: str


@dataclass(frozen=True)
class ExpertsWCall(OpCall):
    """qcompile_triton::experts_w, rows sorted by expert times the weight of each row's expert, weight-only."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.experts_w.default

    x: fx.Node
    rows: Operand
    ends: fx.Node
    packed: fx.Node
    scale: fx.Node
    zero: Operand
    format: str
    columns: int


@dataclass(frozen=True)
class ExpertsA8Call(OpCall):
    """qcompile_triton::experts_a8, the same of 8-bit codes on both sides."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.experts_a8.default

    x: fx.Node
    x_scale: fx.Node
    rows: Operand
    ends: fx.Node
    weight: fx.Node
    scale: fx.Node
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpertsW4A8Call(OpCall):
    """qcompile_triton::experts_w4a8, the same of int8 rows and 4-bit codes."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.experts_w4a8.default

    x: fx.Node
    x_scale: fx.Node
    rows: Operand
    ends: fx.Node
    packed: fx.Node
    steps: fx.Node
    scale: fx.Node
    format: str
    columns: int
    dtype: torch.dtype


@dataclass(frozen=True)
class RowQuantCall(OpCall):
    """qcompile_triton::row_quant: -> (codes, scale, x + residual, value of norm or gate), the last two may be empty."""

    target: ClassVar[Any] = torch.ops.qcompile_triton.row_quant.default

    x: fx.Node
    residual: Operand
    gate: Operand
    gain: Operand
    shift: Operand
    smooth: Operand
    signs: Operand
    left: Operand
    right: Operand
    eps: float
    spec: str
