"""Activation functions of ONNX Runtime as torch operators, with their meaning, and typed views of their calls.

gelu          Gelu, BiasGelu, FastGelu
quick_gelu    QuickGelu
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.op_calls import OpCall, Operand

ops = torch.ops.qcompile_onnx


@torch.library.custom_op("qcompile_onnx::gelu", mutates_args=())
def gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU of x + bias [K]; approximate: "none" (erf) or "tanh"."""
    return torch.nn.functional.gelu(x if bias is None else x + bias, approximate=approximate)


@gelu.register_fake
def _(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::quick_gelu", mutates_args=())
def quick_gelu(x: Tensor, alpha: float) -> Tensor:
    """x sigmoid(alpha x); alpha = 1 is SiLU."""
    return x * torch.sigmoid(alpha * x)


@quick_gelu.register_fake
def _(x: Tensor, alpha: float) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class GeluCall(OpCall):
    """qcompile_onnx::gelu."""

    target: ClassVar[Any] = ops.gelu.default

    x: fx.Node
    bias: Operand
    approximate: str


@dataclass(frozen=True)
class QuickGeluCall(OpCall):
    """qcompile_onnx::quick_gelu."""

    target: ClassVar[Any] = ops.quick_gelu.default

    x: fx.Node
    alpha: float
