"""Typed views of calls of our own operators: arguments by name, never by position.

    call = QLinearCall.of(node)             read a node
    call.weight, call.weight_format         its arguments
    QLinearCall(...).insert(program, before=node)

The fields of a view are the arguments of its operator, in the order of the schema (see ops.py); nothing else in the
project indexes `node.args` of these operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, cast

import torch
from torch import fx

import qcompile.ir.adapter_op
import qcompile.ir.fixed_point_ops
import qcompile.ir.low_rank_ops  # noqa: F401
import qcompile.ir.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.ir.node_meta import SITE
from qcompile.ir.program import Program
from qcompile.numerics.format import Format

Operand = fx.Node | None
"""A tensor argument of a call; None where the schema allows no tensor."""


def site_name(program: Program, node: fx.Node) -> str:
    """The name of a quantized product's site: what the pass that quantized it noted, or where its codes are."""
    noted: str | None = node.meta.get(SITE)
    return noted or (program.weight_name(QLinearCall.of(node).weight) or node.name).removesuffix(".codes")


@dataclass(frozen=True)
class OpCall:
    """A call of the operator `target`; a subclass names its arguments."""

    target: ClassVar[Any]

    @classmethod
    def of(cls, node: object) -> Self:
        """The view of a node. Raises TypeError if the node calls something else."""
        if not isinstance(node, fx.Node) or node.target is not cls.target:
            raise TypeError(f"{node} calls {getattr(node, 'target', None)}, not {cls.target}")
        return cls(*cast(tuple[Any, ...], node.args))

    @classmethod
    def matches(cls, node: object) -> bool:
        """Whether a node calls this operator."""
        return isinstance(node, fx.Node) and node.target is cls.target

    @classmethod
    def find(cls, program: Program) -> Iterator[tuple[fx.Node, Self]]:
        """All calls of a program in graph order; nodes may be replaced while iterating."""
        for node in list(program.graph.find_nodes(op="call_function", target=cls.target)):
            yield node, cls.of(node)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def insert(self, program: Program, *, before: fx.Node | None = None, after: fx.Node | None = None) -> fx.Node:
        """Insert the call next to a node."""
        return program.insert(self.target, self.arguments, before=before, after=after)


@dataclass(frozen=True)
class QuantizeCall(OpCall):
    """qcompile::quantize, an activation quantized dynamically: -> (codes, scale, zero point)."""

    target: ClassVar[Any] = torch.ops.qcompile.quantize.default

    x: fx.Node
    format: str


@dataclass(frozen=True)
class DequantizeCall(OpCall):
    """qcompile::dequantize; `columns` is K of codes that are stored packed, 0 of unpacked ones (activations)."""

    target: ClassVar[Any] = torch.ops.qcompile.dequantize.default

    codes: fx.Node
    scale: fx.Node
    zero: Operand
    group_scale: Operand
    format: str
    columns: int
    dtype: torch.dtype

    @property
    def of_activation(self) -> bool:
        """Whether the codes are those of an activation."""
        return self.columns == 0


@dataclass(frozen=True)
class HadamardCall(OpCall):
    """qcompile::hadamard, x [.., n] -> x diag(signs) H_n / sqrt(n)."""

    target: ClassVar[Any] = torch.ops.qcompile.hadamard.default

    x: fx.Node
    signs: fx.Node


@dataclass(frozen=True)
class QLinearCall(OpCall):
    """qcompile::qlinear, dq(x) @ dq(weight).T + bias; `act` is "" where x is float."""

    target: ClassVar[Any] = torch.ops.qcompile.qlinear.default

    x: fx.Node
    x_scale: Operand
    x_zero: Operand
    weight: fx.Node
    scale: fx.Node
    zero: Operand
    group_scale: Operand
    bias: Operand
    format: str
    act: str
    columns: int
    dtype: torch.dtype

    @property
    def stored(self) -> tuple[fx.Node, fx.Node, Operand, Operand]:
        """The weight's codes, scale, zero point and group scale: the parts of a QTensor, as placeholders."""
        return self.weight, self.scale, self.zero, self.group_scale

    @property
    def weight_format(self) -> Format:
        """The format of the weight."""
        return Format.parse(self.format)

    @property
    def act_format(self) -> Format | None:
        """The format of x, or None where it is float."""
        return Format.parse(self.act) if self.act else None


@dataclass(frozen=True)
class QExpertsCall(OpCall):
    """qcompile::qexperts, rows sorted by expert times each one's weight; `act` is "" where x is float."""

    target: ClassVar[Any] = torch.ops.qcompile.qexperts.default

    x: fx.Node
    x_scale: Operand
    x_zero: Operand
    ends: fx.Node
    weight: fx.Node
    scale: fx.Node
    zero: Operand
    group_scale: Operand
    format: str
    act: str
    columns: int
    dtype: torch.dtype

    @property
    def stored(self) -> tuple[fx.Node, fx.Node, Operand, Operand]:
        """The stack's codes, scale, zero point and group scale, as placeholders."""
        return self.weight, self.scale, self.zero, self.group_scale


@dataclass(frozen=True)
class GroupAdapterCall(OpCall):
    """qcompile::group_adapter, a QA-LoRA adapter beside a qlinear (see adapter_op.py)."""

    target: ClassVar[Any] = torch.ops.qcompile.group_adapter.default

    x: fx.Node
    a: fx.Node
    b: fx.Node
    group: int
    scaling: float


@dataclass(frozen=True)
class StackAdapterCall(OpCall):
    """qcompile::stack_adapter, what QA-LoRA adapters add to a stack of expert weights (see adapter_op.py)."""

    target: ClassVar[Any] = torch.ops.qcompile.stack_adapter.default

    a: fx.Node
    b: fx.Node
    columns: int
    group: int
    scaling: float
    dtype: torch.dtype


@dataclass(frozen=True)
class LowRankLinearCall(OpCall):
    """qcompile::low_rank_linear, a product that trains through a low-rank parameter; "" stands for a float format."""

    target: ClassVar[Any] = torch.ops.qcompile.low_rank_linear.default

    x: fx.Node
    weight: fx.Node
    scale: Operand
    zero: Operand
    low: fx.Node
    bias: Operand
    basis: fx.Node
    basis_scale: Operand
    basis_zero: Operand
    first: fx.Node
    similarities: fx.Node
    schedule: fx.Node
    format: str
    basis_format: str
    threshold: float
    factor: int
    dtype: torch.dtype


@dataclass(frozen=True)
class FixedPointLinearCall(OpCall):
    """qcompile::fixed_point_linear, a product that trains in fixed point; its first result is the output."""

    target: ClassVar[Any] = torch.ops.qcompile.fixed_point_linear.default

    x: fx.Node
    weight: fx.Node
    bias: Operand
    act_range: fx.Node
    gamma: fx.Node
    counter: fx.Node
    act_clip: Operand
    weight_clip: Operand
    format: str
    training: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class FixedPointConvCall(FixedPointLinearCall):
    """qcompile::fixed_point_conv, the same of a convolution."""

    target: ClassVar[Any] = torch.ops.qcompile.fixed_point_conv.default

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


OUR_PRODUCTS = frozenset(
    call.target for call in (QLinearCall, QExpertsCall, LowRankLinearCall, FixedPointLinearCall, FixedPointConvCall)
)
"""Products with a quantized weight."""

OUR_OPS = OUR_PRODUCTS | {call.target for call in (QuantizeCall, DequantizeCall, HadamardCall)}
"""A captured graph that calls one comes from a model that was quantized before, or is in training."""
