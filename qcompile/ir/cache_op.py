"""torch.ops.qcompile.read_cache: the codes of a KV cache -> keys or values."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.op_checks import OpChecks, same_size
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import dequantize_codes, unpack_codes


def cached_values(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    rotation: Tensor | None,
    center: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize what a cache holds.

    Args:
        codes: stored, uint8 [B, G, T, D], or [B, G, T, D / 2] where a byte holds two.
        scale: float16 [B, G, T, 1], of each head and token.
        zero: zero points, uint8 [B, G, T, 1].
        rotation: float32 [D, D], which vectors were multiplied with before they were quantized; None: not rotated.
        center: float32 [G, 1, D], subtracted before that; None: not centered.
        format: of the codes.
        columns: D.
        dtype: of the result.

    Returns:
        [B, G, T, D].
    """
    form = Format.parse(format)
    values = dequantize_codes(unpack_codes(codes, form, columns), scale.float(), zero, None, form)
    values = values if rotation is None else values @ rotation.t()
    return (values if center is None else values + center).to(dtype)


@torch.library.custom_op("qcompile::read_cache", mutates_args=())
def read_cache(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    rotation: Tensor | None,
    center: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `cached_values`."""
    _check(codes, scale, zero, rotation, center, format, columns)
    return cached_values(codes, scale, zero, rotation, center, format, columns, dtype).contiguous()


@read_cache.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    rotation: Tensor | None,
    center: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, zero, rotation, center, format, columns)
    return codes.new_empty((*codes.shape[:-1], columns), dtype=dtype)


def _check(
    codes: Tensor, scale: Tensor, zero: Tensor, rotation: Tensor | None, center: Tensor | None, text: str, columns: int
) -> None:
    op, form = OpChecks("qcompile::read_cache"), Format.parse(text)
    if form.per != "row" or form.code_dtype != torch.uint8 or form.bits not in (4, 8):
        op.refuse("format", text, "4 or 8 bits with a scale and an integer zero point for each row")
    width = -(-columns * form.bits // 8)
    if codes.ndim != 4 or codes.dtype != torch.uint8 or not same_size(codes.shape[-1], width):
        op.refuse("codes", codes, f"uint8 [B, G, T, {width}]")
    for name, part, dtype in (("scale", scale, torch.float16), ("zero", zero, torch.uint8)):
        sizes = (*codes.shape[:-1], 1)
        if part.dtype != dtype or part.ndim != 4 or not all(map(same_size, part.shape, sizes)):
            op.refuse(name, part, f"{dtype} {list(sizes)}")
    if rotation is not None and tuple(rotation.shape) != (columns, columns):
        op.refuse("rotation", rotation, f"[{columns}, {columns}]")
    if center is not None and tuple(center.shape) != (codes.shape[1], 1, columns):
        op.refuse("center", center, f"[{codes.shape[1]}, 1, {columns}]")
