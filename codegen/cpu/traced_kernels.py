"""Kernels as the compiler sees them: a quantized matmul for any M, and the weight layouts that it reads.

Each is traced into the graph around an operator of native_kernels.py, so that Inductor fuses the quantization of
activations with what comes before it. Shapes: x [.., K], weight [N, K], result [.., N].

    int8_mm       int8 codes of both, a per-token and a per-channel scale
    dual_mm       int8 codes of x, int4 codes of the weight with two-level scales (format.py: dual)
    int8_float    x float, int8 codes of the weight
    nibble_float  x float, int4 codes of the weight in groups
    dequant_mm    any format: dequantize, then the float matmul (aten_fallback.py)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import qcompile.codegen.cpu.native_kernels  # noqa: F401  registers the operators
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import unpack_codes

ops = torch.ops.qcompile_cpu


def finish(sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums [.., N] times the per-channel scale [N] or [N, 1], plus bias [N], cast to `dtype` once."""
    out = sums.float() * scale.reshape(-1)
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)


def _as_matrix(x: Tensor) -> Tensor:
    """[.., K] -> [M, K] with a row stride of K even for M = 1.

    torch 2.13's CPU `_int_mm` reads the stride of a single row, which a view may set to anything, and then computes
    something else.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if isinstance(rows.shape[0], int) and rows.shape[0] == 1:
        return rows.reshape(-1).as_strided((1, x.shape[-1]), (x.shape[-1], 1))
    return rows


def _per_token(x: Tensor, x_scale: Tensor) -> Tensor:
    """A per-token scale [.., 1], or a per-tensor scale [], as [M, 1]."""
    return _as_matrix(x_scale if x_scale.ndim else x_scale.expand(*x.shape[:-1], 1))


def _reshape_like(x: Tensor, out: Tensor) -> Tensor:
    return out.reshape(*x.shape[:-1], out.shape[-1])


# -- matmuls ---------------------------------------------------------------------------------------


def int8_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 x int8.

    Args:
        x: int8 codes [.., K].
        x_scale: per token [.., 1] or per tensor [].
        weight: int8 codes [N, K].
        scale: per channel [N, 1].
        bias: [N], or None.
        dtype: of the result.

    Returns:
        [.., N].
    """
    return _reshape_like(x, ops.int8_mm(_as_matrix(x), _per_token(x, x_scale), weight, scale, bias, dtype))


def dual_mm(
    x: Tensor, x_scale: Tensor, nibbles: Tensor, group_scale: Tensor, zero: Tensor, scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """int8 x int4 with two-level scales.

    Args:
        x: int8 codes [.., K].
        x_scale: per token [.., 1] or per tensor [].
        nibbles: uint8 [N, groups, G/2], see `prepare_nibbles`.
        group_scale: int8 [N, groups].
        zero: uint8 [N, groups].
        scale: per channel [N, 1].
        bias: [N], or None.
        dtype: of the result.

    Returns:
        [.., N].
    """
    rows, row_scales = _as_matrix(x), _per_token(x, x_scale)
    return _reshape_like(x, ops.dual_mm(rows, row_scales, nibbles, group_scale, zero, scale, bias, dtype))


def int8_float(x: Tensor, weight: Tensor) -> Tensor:
    """x float [.., K], int8 codes [N, K] -> sums [.., N] in x's dtype, without the weight's scale."""
    return _reshape_like(x, ops.int8_float(_as_matrix(x), weight))


def nibble_float(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """x float [.., K], weight a q - c (`group_offsets`) -> [.., N] in x's dtype."""
    return _reshape_like(x, ops.nibble_float(_as_matrix(x), nibbles, a, c))


# -- weights -------------------------------------------------------------------------------------


def takes_nibbles(format: Format) -> bool:
    """Whether a format is int4 with groups whose halves are whole vectors of 16 bytes."""
    return format.dtype == "int4" and format.per == "group" and format.group % 32 == 0


def prepare_nibbles(stored: Tensor, format: Format, columns: int) -> Tensor:
    """Stored int4 codes -> bytes [N, groups, G/2]; a ragged last group is padded with zero codes.

    Byte j of a group holds column j in its low nibble and column G/2 + j in its high one; codes are unsigned.
    Where half a group exceeds the row, only the bytes of the row are kept, up to a whole vector.
    """
    codes = unpack_codes(stored, format, columns)
    unsigned = codes if format.zero != "none" else (codes.to(torch.int16) - format.qmin).to(torch.uint8)
    half = min(format.group // 2, -(-columns // 16) * 16 or 16)
    padded = torch.nn.functional.pad(unsigned, (0, -columns % (2 * half)))
    halves = torch.unflatten(padded, -1, (format.groups(columns), 2, half))
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).contiguous()


def prepare_symmetric(
    stored: Tensor, group_scale: Tensor, format: Format, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes without zero points -> nibbles as above, positive group scales, zero points; [N, groups, ..].

    s q with a negative s is |s| (u - 7) with u = 7 - q, as it is s (u - 8) with u = q + 8.
    """
    nibbles, negative = prepare_nibbles(stored, format, columns), group_scale < 0
    nibbles = torch.where(negative[..., None], nibbles ^ 0xFF, nibbles)
    return nibbles, group_scale.abs(), torch.where(negative, 7, 8).to(torch.uint8)


def group_offsets(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """w = a q - c for unsigned int4 codes q: a, c [N, groups] float32."""
    a = scale.float().contiguous()
    z = torch.full_like(a, 8.0) if zero is None else zero.float()
    return a, (a * z).contiguous()
