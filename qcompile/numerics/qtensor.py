"""QTensor: codes with their scales and zero points, stored and dequantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.numerics.bit_packing import pack, unpack
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import decode_e2m1, power_of_two


@dataclass(frozen=True)
class QTensor:
    """Codes [.., K] (unpacked) with scale, zero and group scale, float32 [.., groups] or [..]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_scale: Tensor | None
    format: Format

    @property
    def columns(self) -> int:
        """K."""
        return self.codes.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that the codes stand for, [.., K]."""
        return dequantize_codes(self.codes, self.scale, self.zero, self.group_scale, self.format).to(dtype)

    def split(self, rows: list[int]) -> list[QTensor]:
        """Matrices [N, K] that were quantized as one, apart again; `rows` are their N."""
        per_tensor = self.format.per == "tensor"
        parts = [
            [None] * len(rows) if t is None else [t] * len(rows) if per_tensor and not t.ndim else list(t.split(rows))
            for t in (self.codes, self.scale, self.zero, self.group_scale)
        ]
        return [QTensor(c.contiguous(), s, z, g, self.format) for c, s, z, g in zip(*parts, strict=True)]

    def stored(self) -> Tensor:
        """Codes as a checkpoint holds them: unsigned and packed below 8 bits."""
        return store_codes(self.codes, self.format)

    @property
    def nbytes(self) -> int:
        """Bytes when stored: packed codes, scales and zeros."""
        rest = [t for t in (self.scale, self.zero, self.group_scale) if t is not None]
        return self.stored().nbytes + sum(t.nbytes for t in rest)


def store_codes(codes: Tensor, format: Format) -> Tensor:
    """Unpacked codes -> the stored form: packed unsigned below 8 bits, else as they are."""
    if format.bits == 8:
        return codes
    return pack(codes if format.qmin == 0 else codes.to(torch.int16) - format.qmin, format.bits)


def load_codes(stored: Tensor, format: Format, columns: int) -> Tensor:
    """The inverse of `store_codes`."""
    if format.bits == 8:
        return stored
    unsigned = unpack(stored, format.bits, columns)
    return unsigned if format.qmin == 0 else (unsigned.to(torch.int8) + format.qmin)


def expand_groups(scale: Tensor, format: Format, columns: int) -> Tensor:
    """Scales [.., groups] -> one for each column, [.., K]; other granularities broadcast."""
    if format.per != "group":
        return scale
    return scale.repeat_interleave(format.group, dim=-1)[..., :columns]


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, format: Format
) -> Tensor:
    """Unpacked codes -> float32."""
    columns = codes.shape[-1]
    value = decode_e2m1(codes) if format.dtype == "fp4" else codes.to(torch.float32)
    if zero is not None:
        value = value - expand_groups(zero, format, columns).to(torch.float32)
    if format.dual:
        assert group_scale is not None
        return value * expand_groups(group_scale, format, columns).to(torch.float32) * scale
    if format.powers:
        assert group_scale is not None
        return value * (expand_groups(power_of_two(group_scale), format, columns) * scale)
    return value * expand_groups(scale, format, columns)


def int8_codes(codes: Tensor, zero: Tensor | None, group_scale: Tensor | None, format: Format) -> Tensor:
    """Unpacked codes [N, K] of a dual format -> s1 (q - z), which int8 activations multiply."""
    assert group_scale is not None
    levels = group_columns(codes.to(torch.int8), format)
    levels = levels if zero is None else levels - zero.to(torch.int8)[..., None]
    return ungroup_columns(levels * group_scale[..., None], codes.shape[-1]).contiguous()


def group_columns(x: Tensor, format: Format) -> Tensor:
    """[.., K] -> [.., groups, width]; a ragged last group is padded with zeros."""
    if format.per == "tensor":
        return x.reshape(1, -1) if x.ndim else x.reshape(1, 1)
    if format.per == "row":
        return x[..., None, :]
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % format.group))
    return x.unflatten(-1, (-1, format.group))


def ungroup_columns(groups: Tensor, columns: int) -> Tensor:
    """The inverse of `group_columns` for rows and groups: [.., groups, width] -> [.., K]."""
    return groups.flatten(-2)[..., :columns]
