"""Norms of ONNX Runtime as torch operators, with their meaning, and typed views of their calls.

rms_norm          SimplifiedLayerNormalization
skip_rms_norm     SkipSimplifiedLayerNormalization: of the sum of two values
skip_layer_norm   SkipLayerNormalization: of the sum of two values and a bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.op_calls import OpCall, Operand

ops = torch.ops.qcompile_onnx


@torch.library.custom_op("qcompile_onnx::rms_norm", mutates_args=())
def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [.., K] / sqrt(mean x^2 + eps) * gain [K]."""
    return torch.nn.functional.rms_norm(x, gain.shape, gain, eps)


@rms_norm.register_fake
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::skip_rms_norm", mutates_args=())
def skip_rms_norm(x: Tensor, skip: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The RMSNorm of x + skip, and x + skip."""
    total = x + skip
    return torch.nn.functional.rms_norm(total, gain.shape, gain, eps), total


@skip_rms_norm.register_fake
def _(x: Tensor, skip: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::skip_layer_norm", mutates_args=())
def skip_layer_norm(
    x: Tensor, skip: Tensor, gain: Tensor, shift: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The LayerNorm (gain, shift [K]) of x + skip + bias [K], and that sum."""
    total = x + skip if bias is None else x + skip + bias
    return torch.nn.functional.layer_norm(total, gain.shape, gain, shift, eps), total


@skip_layer_norm.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@dataclass(frozen=True)
class RMSNormCall(OpCall):
    """qcompile_onnx::rms_norm."""

    target: ClassVar[Any] = ops.rms_norm.default

    x: fx.Node
    gain: fx.Node
    eps: float


@dataclass(frozen=True)
class SkipRMSNormCall(OpCall):
    """qcompile_onnx::skip_rms_norm."""

    target: ClassVar[Any] = ops.skip_rms_norm.default

    x: fx.Node
    skip: fx.Node
    gain: fx.Node
    eps: float


@dataclass(frozen=True)
class SkipLayerNormCall(OpCall):
    """qcompile_onnx::skip_layer_norm."""

    target: ClassVar[Any] = ops.skip_layer_norm.default

    x: fx.Node
    skip: fx.Node
    gain: fx.Node
    shift: Operand
    bias: Operand
    eps: float
