"""From the stored tensors of a quantized weight to what an operator of native_kernels.py reads of it."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.cpu.weight_packing import (
    pack_bytes,
    pack_group_pairs,
    pack_groups,
    pack_nibbles,
    split_groups,
)
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import decode_e2m1, power_of_two
from qcompile.numerics.k_scales import single_level
from qcompile.numerics.qtensor import StoredParts, unpack_codes


def takes_nibbles(form: Format) -> bool:
    """Whether a format has codes of four bits or fewer, in groups that are whole octets or in rows."""
    return form.bits <= 4 and (form.per == "row" or (form.per == "group" and form.group % 8 == 0))


def group_of(form: Format, columns: int) -> int:
    """Columns of a group as the operators count: a row is one group, of whole octets."""
    return form.group if form.per == "group" and form.group < columns else max(8, -(-columns // 8) * 8)


def int8_weight(parts: StoredParts) -> tuple[Tensor]:
    """Codes of `int8_linear` and `int8_float_linear`."""
    return (pack_bytes(parts[0]),)


def dual_weight(parts: StoredParts, form: Format, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, step and offset of `dual_linear`: w = a q - a z."""
    codes, step, zero = _dual_parts(parts, form, columns)
    group = group_of(form, columns)
    step, zero = (split_groups(part, group, columns)[0] for part in (step, zero))
    return pack_nibbles(codes), pack_groups(step), pack_group_pairs(step * zero)


def dual_group(form: Format, columns: int) -> int:
    """Columns of a group of `dual_weight`, which are fewer than the format's where its sums would leave int16."""
    return split_groups(torch.empty(0, 1), group_of(form, columns), columns)[1]


def grouped_weight(parts: StoredParts, form: Format, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, step and zero point of `group_linear` and `table_linear`: w = a (value(q) - z)."""
    if form.dual:
        codes, step, dual_zero = _dual_parts(parts, form, columns)
        has_zero = parts[2] is not None or bool((dual_zero != 8).any())
        return pack_nibbles(codes), pack_groups(step), pack_groups(dual_zero) if has_zero else None
    stored, scale, zero, exponent = single_level(*parts) if form.k6 else parts
    step = power_of_two(exponent) if form.powers and exponent is not None else scale
    if zero is not None and zero.dtype != torch.uint8:
        zero = zero.float()
    packed_zero = None if zero is None else pack_groups(zero)
    return pack_nibbles(_unsigned(stored, form, columns)), pack_groups(step.float()), packed_zero


def has_row_scale(form: Format) -> bool:
    """Whether `grouped_weight` leaves a scale of rows to be multiplied last."""
    return form.two_level and not form.k6


def table_of(form: Format) -> Tensor:
    """What the sixteen codes mean before scale and zero point: integers are centered, which costs no accuracy."""
    codes = torch.arange(16, dtype=torch.uint8)
    return decode_e2m1(codes).float() if form.is_float else codes.float() - center(form)


def center(form: Format) -> float:
    """The unsigned code in the middle, which stands for zero where there is no zero point."""
    return float(1 << (form.bits - 1))


def _unsigned(stored: Tensor, form: Format, columns: int) -> Tensor:
    codes = unpack_codes(stored, form, columns)
    return codes if form.qmin == 0 else (codes.to(torch.int16) - form.qmin).to(torch.uint8)


def _dual_parts(parts: StoredParts, form: Format, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [N, K], positive steps and zero points [N, G], uint8.

    Without zero points a step has a sign: s q with a negative s is |s| (u - 7) with u = 7 - q, as it is s (u - 8) with
    u = q + 8.
    """
    stored, _, zero, step = parts
    assert step is not None
    codes = _unsigned(stored, form, columns)
    if zero is not None:
        return codes, step.to(torch.uint8), zero
    negative = step < 0
    flipped = negative.repeat_interleave(group_of(form, columns), 1)[:, :columns]
    codes = torch.where(flipped, 15 - codes, codes)
    return codes, step.abs().to(torch.uint8), torch.where(negative, 7, 8).to(torch.uint8)
