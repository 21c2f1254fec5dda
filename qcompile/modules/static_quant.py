"""What fixed-point training leaves: packed codes, one scale for the whole weight and one, static, for activations.

    y = s_x s_w (clamp(round(x / s_x)) W_q^T) + b        the sum exact, scaled in the order of ir/fixed_point_ops.py

so that a settled model gives the bits that the model in training gives in evaluation mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.modules.convolution_sizes import ConvolutionSizes
from qcompile.modules.fixed_dtype import FixedDtypeModule
from qcompile.modules.quant_linear import QuantLinear, result_dtype
from qcompile.numerics.code_convolution import ConvolutionShape, exact_float
from qcompile.numerics.fixed_point_operand import operand_codes
from qcompile.numerics.format import CodeType, Format
from qcompile.numerics.qtensor import pack_codes, unpack_codes

_TYPES: dict[int, CodeType] = {2: "int2", 3: "int3", 4: "int4"}


def code_type(bits: int) -> CodeType:
    """The narrowest type that codes of some bits are stored as."""
    return _TYPES.get(bits, "int8")


class StaticQuantLinear(QuantLinear):
    """A linear of codes, whose activations have one scale that training found.

    Attributes:
        act_scale: of x, float32 [].
        low: the smallest code of x.
        high: the largest.
        rounds: whether x is rounded, as always, but where an export measures what rounding changes.
    """

    FIXED_DTYPE = (*QuantLinear.FIXED_DTYPE, "act_scale")  # type: ignore[assignment]  # one more

    act_scale: Tensor

    def __init__(self, weight: QuantLinear, act_scale: Tensor, low: int, high: int) -> None:
        """Take the tensors of a linear with float activations."""
        super().__init__(weight.in_features, weight.out_features, weight.format, None, dict(weight._buffers))
        self.register_buffer("act_scale", act_scale)
        self.low, self.high, self.rounds = low, high, True

    @staticmethod
    def of(
        codes: Tensor, bits: int, scale: Tensor, bias: Tensor | None, act: tuple[Tensor, int, int]
    ) -> StaticQuantLinear:
        """From codes of the weight.

        Args:
            codes: int8 [N, K].
            bits: of a code.
            scale: of the weight, float32 [].
            bias: [N], or None.
            act: scale, smallest and largest code of x.
        """
        format = Format(code_type(bits))
        rows, columns = codes.shape
        tensors = {"codes": pack_codes(codes, format), "scale": scale.expand(rows, 1).clone(), "bias": bias}
        return StaticQuantLinear(QuantLinear(columns, rows, format, None, tensors), *act)

    def forward(self, input: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        if not self.rounds:
            return torch.nn.functional.linear(self.operand(input), self.weight.to(input.dtype), self.bias)
        if input.requires_grad and torch.is_grad_enabled():  # straight through, as of QuantLinear
            x = self.operand(input)
            found: Tensor = torch.ops.qcompile.qlinear(
                x, None, None, self.codes, self.scale, None, None, self.bias, str(self.format), "", self.in_features,
                result_dtype(input),
            )  # fmt: skip
            return found
        codes, scale = operand_codes(input, self.act_scale, self.low, self.high)
        out: Tensor = torch.ops.qcompile.qlinear(
            codes, scale, None, self.codes, self.scale, None, None, self.bias, str(self.format), "int8/tensor",
            self.in_features, result_dtype(input),
        )  # fmt: skip
        return out

    def operand(self, input: Tensor) -> Tensor:
        """What the weight is multiplied with: x rounded to the grid of its codes."""
        codes = round_to_codes(input, self.act_scale, self.low, self.high, self.rounds)
        return (codes * self.act_scale).to(input.dtype)

    def extra_repr(self) -> str:
        """As nn.Linear's, with the format of the weight and the codes of x."""
        return f"{self.in_features}, {self.out_features}, weight={self.format}, act={self.low}..{self.high} static"


class StaticQuantConv(ConvolutionSizes, FixedDtypeModule):
    """A convolution of codes, in one or two dimensions.

    Attributes:
        codes: packed, uint8 or int8 [O, ..]: rows of C / groups * elements of the kernel.
        scale: of the weight, float32 [].
        act_scale: of x, float32 [].
        bias: [O], or None.
        size: of the weight, [O, C / groups, ..].
        shape: how it moves over x.
        format: of the codes.
        low: the smallest code of x.
        high: the largest.
        rounds: as of StaticQuantLinear.
    """

    FIXED_DTYPE = ("codes", "scale", "act_scale")

    codes: Tensor
    scale: Tensor
    act_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        tensors: dict[str, Tensor | None],
        size: tuple[int, ...],
        shape: ConvolutionShape,
        format: Format,
        low: int,
        high: int,
    ) -> None:
        """Build from the four buffers by name."""
        super().__init__()
        for name in ("codes", "scale", "act_scale", "bias"):
            self.register_buffer(name, tensors.get(name))
        self.size, self.shape, self.format = size, shape, format
        self.low, self.high, self.rounds = low, high, True

    @staticmethod
    def of(
        codes: Tensor,
        bits: int,
        scale: Tensor,
        bias: Tensor | None,
        act: tuple[Tensor, int, int],
        shape: ConvolutionShape,
    ) -> StaticQuantConv:
        """From codes of the weight, int8 [O, C / groups, ..]; the rest as of StaticQuantLinear."""
        format = Format(code_type(bits), "tensor")
        tensors = {"codes": pack_codes(codes.flatten(1), format), "scale": scale, "act_scale": act[0], "bias": bias}
        return StaticQuantConv(tensors, tuple(codes.shape), shape, format, act[1], act[2])

    @property
    def weight_codes(self) -> Tensor:
        """Codes of the weight, int8 [O, C / groups, ..]."""
        columns = torch.Size(self.size[1:]).numel()
        return unpack_codes(self.codes, self.format, columns).view(self.size)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 [O, C / groups, ..], computed at each access."""
        return self.weight_codes * self.scale

    def forward(self, input: Tensor) -> Tensor:
        """x [B, C, ..] -> [B, O, ..]."""
        dtype = result_dtype(input)
        wide = exact_float(self.high * self.format.qmax * torch.Size(self.size[1:]).numel(), self.codes.device)
        codes = round_to_codes(input, self.act_scale, self.low, self.high, self.rounds).to(wide)
        shape, zeros = self.shape, [0] * len(self.shape.stride)
        sums = torch.convolution(
            codes, self.weight_codes.to(wide), None, shape.stride, shape.padding, shape.dilation, False, zeros,
            shape.groups,
        )  # fmt: skip
        return scaled_output(sums, self.act_scale, self.scale, self.bias, dtype)

    def extra_repr(self) -> str:
        """Sizes, moves and formats."""
        shape = self.shape
        moves = f"stride={shape.stride}, padding={shape.padding}, dilation={shape.dilation}, groups={shape.groups}"
        return f"{list(self.size)}, {moves}, weight={self.format}, act={self.low}..{self.high} static"


def round_to_codes(x: Tensor, scale: Tensor, low: int, high: int, rounds: bool = True) -> Tensor:
    """The codes of x as floats, float32 or wider; NaN stays. Without rounding they are x / scale, clamped.

    The gradient is that of the clamp.
    """
    scaled = (x if x.dtype == torch.float64 else x.float()) / scale
    if rounds and scaled.requires_grad and torch.is_grad_enabled():
        scaled = scaled + (scaled.round() - scaled).detach()  # exactly the rounded value: both differences are exact
    elif rounds:
        scaled = scaled.round()
    return scaled.clamp(low, high)


def scaled_output(sums: Tensor, act_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums of a convolution of codes [B, O, ..] -> values of a dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = sums.to(wide) * act_scale.to(wide) * scale.to(wide)
    if bias is not None:
        out = out + bias.to(wide).view(-1, *[1] * (sums.ndim - 2))
    return out.to(dtype).contiguous()  # as training gives it: other strides sum in another order downstream
