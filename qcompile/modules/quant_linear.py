"""Modules that hold packed weights and call the dialect, so that they trace, save and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qcompile.ir.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.numerics.bit_packing import packed_columns
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import dequantize_codes, load_codes

_FACTORS = ("low_in", "low_in_scale", "low_out", "low_out_scale")
PARTS = ("codes", "scale", "zero", "group_scale", "bias", "signs", *_FACTORS)


class Coded(nn.Module):
    """Holds codes and scales, whose precision a cast of the model must not change; moves between devices go through."""

    KEPT: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: held for name in self.KEPT if (held := getattr(self, name)) is not None}
        result = super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:  # a cast, not a move; fp8 codes count as floating for one
                setattr(self, name, old.to(new.device))
        return result


class QuantLinear(Coded):
    """x -> [Hadamard] -> [quantize] -> qlinear [+ low rank], with stored codes as buffers.

    Buffers: codes [N, packed K], scale, zero, group_scale (see format.py), bias [N] or None, signs
    [K] or None (an online Hadamard before the product), low_in [m, K] and low_out [N, m] or None (a
    correction of the weight, passes/weights/lorc.py; int8 where low_in_scale [m, 1] and low_out_scale [N, 1]
    are given). The result has the dtype of x. Scales stay float32
    whatever dtype the model is cast to.
    """

    KEPT = ("codes", "scale", "zero", "signs", "low_in_scale", "low_out_scale")

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
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.act = format, act
        for name in PARTS:
            self.register_buffer(name, tensors.get(name))

    @staticmethod
    def empty(
        in_features: int, out_features: int, format: Format, act: Format | None, has: set[str], rank: int = 0
    ) -> QuantLinear:
        """A module with unset buffers of the right shapes, for loading."""
        groups = format.groups(in_features)
        shape = () if format.per == "tensor" else (out_features, groups if format.per == "group" else 1)
        packed = packed_columns(in_features, format.bits)
        code = torch.uint8 if format.bits < 8 else format.code_dtype
        zero = torch.uint8 if format.zero == "int" else torch.float32
        low = torch.int8 if "low_in_scale" in has else torch.float32
        tensors: dict[str, Tensor | None] = {
            "codes": torch.empty(out_features, packed, dtype=code),
            "scale": torch.empty((out_features, 1) if format.two_level else shape),
            "zero": torch.empty(shape, dtype=zero),
            "group_scale": torch.empty(shape, dtype=torch.int8),
            "bias": torch.empty(out_features),
            "signs": torch.empty(in_features),
            "low_in": torch.empty(rank, in_features, dtype=low),
            "low_in_scale": torch.empty(rank, 1),
            "low_out": torch.empty(out_features, rank, dtype=low),
            "low_out_scale": torch.empty(out_features, 1),
        }
        return QuantLinear(in_features, out_features, format, act, {n: t for n, t in tensors.items() if n in has})

    @property
    def weight(self) -> Tensor:
        """The numbers that the codes stand for, [N, K] float32; made anew at each read."""
        codes = load_codes(self.codes, self.format, self.in_features)
        return dequantize_codes(codes, self.scale, self.zero, self.group_scale, self.format)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        dtype = x.dtype
        if self.signs is not None:
            x = torch.ops.qcompile.hadamard(x, self.signs)
        numbers, x_scale, x_zero = x, None, None
        if self.act is not None:
            x, x_scale, zero = torch.ops.qcompile.quantize(x, str(self.act))
            x_zero = zero if self.act.zero != "none" else None
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
            "" if self.act is None else str(self.act),
            self.in_features,
            dtype,
        )
        for factor in self.factors(dtype):
            numbers = torch.nn.functional.linear(numbers, factor)
        return out if self.low_in is None else out + numbers

    def factors(self, dtype: torch.dtype) -> list[Tensor]:
        """V' [m, K] and U' [N, m] of a correction, as numbers; nothing without one."""
        pairs = (self.low_in, self.low_in_scale), (self.low_out, self.low_out_scale)
        return [f.to(dtype) if s is None else (f.float() * s).to(dtype) for f, s in pairs if f is not None]

    def extra_repr(self) -> str:
        """As nn.Linear, with the formats."""
        turned = ", hadamard" if self.signs is not None else ""
        turned += f", low rank {self.low_in.shape[0]}" if self.low_in is not None else ""
        act = self.act or "float"
        return f"{self.in_features}, {self.out_features}, weight={self.format}, act={act}{turned}"


class RotatedLinear(nn.Module):
    """A float linear behind an online Hadamard transform, for a site that stays float."""

    def __init__(self, inner: nn.Module, signs: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> inner(x diag(signs) H / sqrt(K))."""
        out: Tensor = self.inner(torch.ops.qcompile.hadamard(x, self.signs))
        return out
