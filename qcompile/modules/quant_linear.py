"""Linear modules that hold packed weights and call the operators of ir/ops.py, so that they trace, save and compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qcompile.ir.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.modules.dequantized_weight import read_only
from qcompile.modules.fixed_dtype import FixedDtypeModule
from qcompile.numerics.bit_packing import packed_columns
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import undo_hadamard
from qcompile.numerics.qtensor import PARTS, QTensor

_CORRECTION = ("low_in", "low_in_scale", "low_out", "low_out_scale")
BUFFERS = (*PARTS, "bias", "signs", *_CORRECTION)


class QuantLinear(FixedDtypeModule):
    """x -> [Hadamard] -> [quantize] -> qlinear [+ low-rank correction], with packed codes as buffers.

    The result has the dtype of x, or under autocast its dtype, as of nn.Linear. Codes and scales keep their dtype when
    the model is cast. The gradient for x passes through the dequantized weight, and straight through the quantization
    of activations.

    Attributes:
        in_features: K.
        out_features: N.
        format: the weight's format.
        act: the format of x, quantized dynamically; None for float activations.
        codes: stored codes of [N, K] (see bit_packing.py).
        scale: the scale, as in QTensor.
        zero: the zero point, as in QTensor.
        group_scale: the group scale, as in QTensor.
        bias: [N] or None.
        signs: [K] of +-1, or None: those of an online Hadamard transform of x.
        low_in: [m, K] or None: V' of a low-rank correction (passes/weights/lorc.py), int8 with a scale, else float.
        low_in_scale: [m, 1] or None.
        low_out: [N, m] or None: U' of the correction.
        low_out_scale: [N, 1] or None.
    """

    FIXED_DTYPE = ("codes", "scale", "zero", "signs", "low_in_scale", "low_out_scale")

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_scale: Tensor | None
    bias: Tensor | None
    signs: Tensor | None
    low_in: Tensor | None
    low_in_scale: Tensor | None
    low_out: Tensor | None
    low_out_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        act: Format | None,
        tensors: dict[str, Tensor | None],
    ) -> None:
        """Build from tensors by the names of BUFFERS; missing ones are None."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.act = format, act
        for name in BUFFERS:
            self.register_buffer(name, tensors.get(name))

    @staticmethod
    def empty(
        in_features: int, out_features: int, format: Format, act: Format | None, has: set[str], rank: int = 0
    ) -> QuantLinear:
        """A module with unset buffers of the right shapes, for loading.

        Args:
            in_features: K.
            out_features: N.
            format: the weight's format.
            act: the activation's format, or None.
            has: the names of BUFFERS that are not None.
            rank: m of the low-rank correction.
        """
        groups = format.groups(in_features)
        shape = () if format.per == "tensor" else (out_features, groups if format.per == "group" else 1)
        scales = () if format.per == "tensor" else (out_features, format.stored_scales(in_features))
        packed = packed_columns(in_features, format.bits)
        code_dtype = torch.uint8 if format.bits < 8 else format.code_dtype
        low_dtype = torch.int8 if "low_in_scale" in has else torch.float32
        tensors: dict[str, Tensor | None] = {
            "codes": torch.empty(out_features, packed, dtype=code_dtype),
            "scale": torch.empty(scales, dtype=format.scale_dtype),
            "zero": torch.empty(shape, dtype=format.zero_dtype),
            "group_scale": torch.empty(shape, dtype=torch.int8),
            "bias": torch.empty(out_features),
            "signs": torch.empty(in_features),
            "low_in": torch.empty(rank, in_features, dtype=low_dtype),
            "low_in_scale": torch.empty(rank, 1),
            "low_out": torch.empty(out_features, rank, dtype=low_dtype),
            "low_out_scale": torch.empty(out_features, 1),
        }
        return QuantLinear(in_features, out_features, format, act, {n: t for n, t in tensors.items() if n in has})

    @property
    def weight(self) -> Tensor:
        """The dequantized weight of x, [N, K] float32, without the low-rank correction; computed at each access.

        It refuses to be written: nobody would see the change.
        """
        parts = self.codes, self.scale, self.zero, self.group_scale
        weight = QTensor.from_stored(parts, self.format, self.in_features).dequantize()
        return read_only(weight if self.signs is None else undo_hadamard(weight, self.signs))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ValueError(
                "a quantized linear has codes in place of a weight that could be set. "
                "Fix: set the weight of the float model, and quantize it then"
            )
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """x [.., K] -> [.., N]; the argument has the name that nn.Linear gives it."""
        x, dtype, act = input, result_dtype(input), self.act
        if self.signs is not None:
            x = torch.ops.qcompile.hadamard(x, self.signs)
        correction, x_scale, x_zero = x, None, None
        if act is not None and x.requires_grad and torch.is_grad_enabled():
            x, act = torch.ops.qcompile.fake_quantize(x, str(act)), None
        elif act is not None:
            x, x_scale, zero = torch.ops.qcompile.quantize(x, str(act))
            x_zero = zero if act.zero != "none" else None
        out: Tensor = torch.ops.qcompile.qlinear(
            x,
            x_scale,
            x_zero,
            self.codes,
            self.scale,
            self.zero,
            self.group_scale,
            self.bias,
            str(self.format),
            "" if act is None else str(act),
            self.in_features,
            dtype,
        )
        correction = correction.to(dtype)
        for factor in self.factors(dtype):
            correction = torch.nn.functional.linear(correction, factor)
        return out if self.low_in is None else out + correction

    def operand(self, input: Tensor) -> Tensor:
        """What the quantized weight is multiplied with for x [.., K]: transformed, and rounded to the grid of `act`."""
        x = input if self.signs is None else torch.ops.qcompile.hadamard(input, self.signs)
        return x if self.act is None else torch.ops.qcompile.fake_quantize(x, str(self.act))

    def factors(self, dtype: torch.dtype) -> list[Tensor]:
        """V' [m, K] and U' [N, m] of the low-rank correction, dequantized; empty without one."""
        pairs = (self.low_in, self.low_in_scale), (self.low_out, self.low_out_scale)
        return [f.to(dtype) if s is None else (f.float() * s).to(dtype) for f, s in pairs if f is not None]

    def extra_repr(self) -> str:
        """As nn.Linear's, with the formats."""
        extra = ", hadamard" if self.signs is not None else ""
        extra += f", low rank {self.low_in.shape[0]}" if self.low_in is not None else ""
        act = self.act or "float"
        return f"{self.in_features}, {self.out_features}, weight={self.format}, act={act}{extra}"


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: its own, or that of autocast, which operators of ours do not see by themselves."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


class RotatedLinear(nn.Module):
    """A float linear behind an online Hadamard transform, for a site that stays float.

    Attributes:
        inner: the linear, whose weight is rotated.
        signs: [K] of +-1.
    """

    signs: Tensor

    def __init__(self, inner: nn.Module, signs: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("signs", signs)

    @property
    def weight(self) -> Tensor:
        """The weight of x, [N, K], computed at each access from the rotated one; it refuses to be written."""
        rotated: Any = self.inner.weight
        return read_only(undo_hadamard(rotated.double(), self.signs.double()).to(rotated.dtype))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear."""
        bias: Any = self.inner.bias
        found: Tensor | None = bias
        return found

    def forward(self, input: Tensor) -> Tensor:
        """x [.., K] -> inner(x diag(signs) H / sqrt(K))."""
        out: Tensor = self.inner(torch.ops.qcompile.hadamard(input, self.signs))
        return out
