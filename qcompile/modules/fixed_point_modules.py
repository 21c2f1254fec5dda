"""Modules that train in fixed point: linears and convolutions that call the operators of ir/fixed_point_ops.py.

With ranges "sigma" or "max" a batch in training is rounded within its own range, and a running mean of these ranges, as
batch norm keeps one, is what evaluation and the settled module use; so both give the same bits. Before the first
training step there is no such range, and evaluation takes that of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompile.ir.fixed_point_ops import weight_codes_of
from qcompile.modules.convolution_sizes import ConvolutionSizes
from qcompile.modules.quant_linear import result_dtype
from qcompile.modules.static_quant import StaticQuantConv, StaticQuantLinear
from qcompile.modules.training_module import TrainingModule
from qcompile.numerics.code_convolution import ConvolutionShape
from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.fixed_point_operand import LEAST_CLIP, step_of

FIXED_POINT_PARTS = ("act_range", "gamma", "counter", "act_clip", "weight_clip")
"""What a module has beside its weight and bias."""


@dataclass(frozen=True)
class FixedPointStart:
    """What a module starts with.

    Attributes:
        format: of the site.
        act_range: float32 [], of calibration data, or 0.
        transposed: whether the parameter is stored [K, N].
    """

    format: FixedPointFormat
    act_range: Tensor
    transposed: bool = False


class FixedPointModule(TrainingModule):
    """What the two have in common: parameters, state and learned clips.

    Attributes:
        weight: the parameter of the module that was replaced, not a copy.
        bias: its bias, or None.
        act_range: the running range of activations, float32 []; 0: there is none.
        gamma: of the gradient's interval, float32 []; 0: not started.
        counter: of the gradients that were rounded, int64 [].
        act_clip: the learned clip of activations, [], where ranges are learned; the paper trains it and the next one
            by Adam at 1e-5, in a parameter group of their own.
        weight_clip: that of the weight.
        format: bits, ranges and rounding.
    """

    FIXED_DTYPE = ("act_range", "gamma", "counter")

    act_range: Tensor
    gamma: Tensor
    counter: Tensor

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, start: FixedPointStart) -> None:
        super().__init__()
        self.format, self.transposed = start.format, start.transposed
        self.format_text = str(start.format)  # made here: Dynamo breaks the graph where floats become text
        self.weight, self.bias = weight, bias
        zero = torch.zeros((), dtype=torch.float32, device=weight.device)
        self.register_buffer("act_range", start.act_range.to(weight.device).clone())
        self.register_buffer("gamma", zero.clone())
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64, device=weight.device))
        learned = self.format.ranges == "learned"
        self.act_clip = nn.Parameter(self.act_range.clamp_min(LEAST_CLIP)) if learned else None
        sigma = 3 * weight.detach().float().std(correction=0)
        self.weight_clip = nn.Parameter(sigma.clamp_min(LEAST_CLIP)) if learned else None

    def matrix(self) -> Tensor:
        """The weight, [N, K] of a linear."""
        return self.weight.t() if self.transposed else self.weight

    def operands(self, x: Tensor) -> tuple[object, ...]:
        """The arguments that both operators take."""
        parts = [getattr(self, name) for name in FIXED_POINT_PARTS]
        return (x, self.matrix(), self.bias, *parts, self.format_text, self.training, result_dtype(x))

    def static_parts(self) -> tuple[Tensor, int, Tensor, Tensor | None, tuple[Tensor, int, int]]:
        """Codes, bits and scale of the weight, the bias, and scale, smallest and largest code of activations.

        Raises:
            ValueError: no range of activations is known yet.
        """
        clip = self.act_range if self.act_clip is None else self.act_clip.detach().abs().float()
        if not bool(clip > 0):
            raise ValueError(
                "the range of its activations is not known, as it has not trained yet. Fix: train a step, or give "
                "batches to qcompile.train"
            )
        codes, step, _ = weight_codes_of(self.matrix().detach(), self.weight_clip, self.format)
        if not bool(torch.isfinite(step)):
            raise ValueError("its weight is not finite. Fix: go back to a state of the training before that")
        bias = None if self.bias is None else self.bias.detach().clone()
        act = step_of(clip, self.format.act_levels), self.format.lowest_act, self.format.act_levels
        return codes, self.format.weight_bits, step, bias, act


class FixedPointLinear(FixedPointModule):
    """x [.., K] -> x W^T + b on codes of four bits, forward and backward."""

    @property
    def in_features(self) -> int:
        """K."""
        return self.matrix().shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.matrix().shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        out: Tensor = torch.ops.qcompile.fixed_point_linear(*self.operands(input))[0]
        return out

    def settled(self) -> nn.Module:
        """Packed codes and a static range."""
        return StaticQuantLinear.of(*self.static_parts())

    def extra_repr(self) -> str:
        """As nn.Linear's, with the format."""
        return f"{self.in_features}, {self.out_features}, {self.format}"


class FixedPointConv(ConvolutionSizes, FixedPointModule):
    """A convolution on codes, in one or two dimensions.

    Attributes:
        size: of the weight, [O, C / groups, ..].
        shape: how it moves over x.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, start: FixedPointStart, shape: ConvolutionShape
    ) -> None:
        super().__init__(weight, bias, start)
        self.shape, self.size = shape, tuple(weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        """x [B, C, ..] -> [B, O, ..]."""
        shape = self.shape
        moves = list(shape.stride), list(shape.padding), list(shape.dilation), shape.groups
        out: Tensor = torch.ops.qcompile.fixed_point_conv(*self.operands(input), *moves)[0]
        return out

    def settled(self) -> nn.Module:
        """Packed codes and a static range."""
        return StaticQuantConv.of(*self.static_parts(), self.shape)

    def extra_repr(self) -> str:
        """As a convolution's, with the format."""
        shape = self.shape
        moves = f"stride={shape.stride}, padding={shape.padding}, dilation={shape.dilation}, groups={shape.groups}"
        return f"{list(self.weight.shape)}, {moves}, {self.format}"
