"""QTensor: codes with their scales and zero points, their stored form, and dequantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.numerics.bit_packing import pack, unpack
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import decode_e2m1, power_of_two
from qcompile.numerics.k_scales import steps_and_offsets

PARTS = ("codes", "scale", "zero", "group_scale")

StoredParts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Packed codes, scale, zero point and group scale: what programs, modules and checkpoints hold of a QTensor."""


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor [.., K].

    Attributes:
        codes: [.., K], unpacked, of `format.code_dtype`.
        scale: of `format.scale_dtype`; [] per tensor, [.., 1] per row, [.., groups] per group; [.., 1] of two-level
            formats, of k6 [.., 2 K / 256]: d and dmin of each block alternating.
        zero: zero points of the shape of the scales (of the group scales in two-level formats), of
            `format.zero_dtype`; of k6 the six-bit m of offsets; None in symmetric formats.
        group_scale: int8 [.., groups] of two-level formats: multipliers, or exponents of two; else None.
        format: the format.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_scale: Tensor | None
    format: Format

    @staticmethod
    def from_stored(parts: StoredParts, format: Format, columns: int) -> QTensor:
        """The inverse of `stored_parts`, for codes of `columns` = K."""
        stored, scale, zero, group_scale = parts
        return QTensor(unpack_codes(stored, format, columns), scale, zero, group_scale, format)

    @property
    def columns(self) -> int:
        """K, the number of columns."""
        return self.codes.shape[-1]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Unpacked codes, scale, zero point, group scale."""
        return self.codes, self.scale, self.zero, self.group_scale

    @property
    def stored_parts(self) -> StoredParts:
        """Packed codes, scale, zero point, group scale."""
        return self.stored(), self.scale, self.zero, self.group_scale

    def stored(self) -> Tensor:
        """Packed codes: unsigned, with a row in ceil(K bits / 8) bytes."""
        return pack_codes(self.codes, self.format)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parts."""
        return sum(part.nbytes for part in self.stored_parts if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized values [.., K]."""
        return dequantize_codes(*self.parts, self.format).to(dtype)

    def split(self, rows: list[int]) -> list[QTensor]:
        """Separate matrices [N, K] that were quantized as one along N.

        Args:
            rows: N of each matrix.
        """
        none = [None] * len(rows)

        def blocks(part: Tensor) -> Sequence[Tensor]:
            return torch.split(part, rows) if part.ndim else [part] * len(rows)  # a per-tensor scale is shared

        parts = zip(
            blocks(self.codes),
            blocks(self.scale),
            none if self.zero is None else blocks(self.zero),
            none if self.group_scale is None else blocks(self.group_scale),
            strict=True,
        )
        return [QTensor(c.contiguous(), s, z, g, self.format) for c, s, z, g in parts]


def pack_codes(codes: Tensor, format: Format) -> Tensor:
    """Unpacked codes [.., K] -> the stored form: unsigned and packed along K below 8 bits, else unchanged."""
    if format.bits == 8:
        return codes
    return pack(codes if format.qmin == 0 else codes.to(torch.int16) - format.qmin, format.bits)


def unpack_codes(stored: Tensor, format: Format, columns: int) -> Tensor:
    """The inverse of `pack_codes`, for codes of `columns` = K."""
    if format.bits == 8:
        return stored
    unsigned = unpack(stored, format.bits, columns)
    return unsigned if format.qmin == 0 else (unsigned.to(torch.int8) + format.qmin)


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, format: Format
) -> Tensor:
    """Unpacked codes [.., K] -> float32 values; the parts of a QTensor one by one, for code that is traced."""
    columns = codes.shape[-1]
    if format.k6:
        step, offset = (expand_groups(part, format, columns) for part in steps_and_offsets(scale, zero, group_scale))
        return codes.to(torch.float32) * step - offset
    value = decode_e2m1(codes) if format.dtype == "fp4" else codes.to(torch.float32)
    if zero is not None:
        value = value - expand_groups(zero, format, columns).to(torch.float32)
    if format.two_level and group_scale is None:
        raise ValueError(f"group_scale is None: format {format} has one for each group. Fix: give it")
    if format.dual:
        assert group_scale is not None
        return value * expand_groups(group_scale, format, columns).to(torch.float32) * scale
    if format.powers:
        assert group_scale is not None
        return value * (expand_groups(power_of_two(group_scale), format, columns) * scale)
    return value * expand_groups(scale, format, columns)


def dequantize_to_int8(codes: Tensor, zero: Tensor | None, group_scale: Tensor | None, format: Format) -> Tensor:
    """Undo the second level of a dual format: unpacked codes [N, K] -> s1 (q - z) int8 [N, K].

    These are what int8 activations are multiplied with; the scale of a row remains.
    """
    assert group_scale is not None
    centered = group_columns(codes.to(torch.int8), format)
    centered = centered if zero is None else centered - zero.to(torch.int8)[..., None]
    return ungroup_columns(centered * group_scale[..., None], codes.shape[-1]).contiguous()


def expand_groups(scale: Tensor, format: Format, columns: int) -> Tensor:
    """Repeat group scales [.., groups] for each column, [.., K]; other granularities broadcast and stay."""
    if format.per != "group":
        return scale
    width = format.width(columns)
    if columns % width:  # Inductor (torch 2.13, CPU) reads beyond the scales where a repeated tensor is cut
        return scale.index_select(-1, torch.arange(columns, device=scale.device) // width)
    return scale.repeat_interleave(width, dim=-1)[..., :columns]


def group_columns(x: Tensor, format: Format) -> Tensor:
    """[.., K] -> [.., groups, width], a row of values for each scale; a ragged last group is padded with zeros."""
    if format.per == "tensor":
        return x.reshape(1, -1) if x.ndim else x.reshape(1, 1)
    if format.per == "row":
        return x[..., None, :]
    columns, width = x.shape[-1], format.width(x.shape[-1])
    x = torch.nn.functional.pad(x, (0, -columns % width))
    return torch.unflatten(x, -1, (format.groups(columns), width))


def ungroup_columns(groups: Tensor, columns: int) -> Tensor:
    """The inverse of `group_columns` for rows and groups: [.., groups, width] -> [.., K]."""
    return groups.flatten(-2)[..., :columns]
