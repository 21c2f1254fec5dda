"""Kernels: a quantized product as the compiler sees it, for any number of rows.

Each is traced into the graph around an operator of native_kernels.py, so that Inductor fuses the
quantization of activations with what comes before it. Shapes: x [.., K], weight [N, K], result
[.., N].

    int8_mm       int8 codes of both, one scale for a row
    dual_mm       int8 codes of x, dual int4 codes of the weight (format.py)
    int8_float    x as it is, int8 codes of the weight
    nibble_float  x as it is, int4 codes in groups
    dequant_mm    any format: dequantise, then the float product
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qcompile.codegen.cpu.native_kernels  # noqa: F401  registers the operators
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import load_codes

ops = torch.ops.qcompile_cpu


def finish(sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums [.., N] times the scale of each channel, plus bias, cast once."""
    out = sums.float() * scale.reshape(-1)
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)


def _rows(x: Tensor) -> Tensor:
    """[M, K] with a row stride of K even for one row.

    torch 2.13's CPU `_int_mm` reads the stride of a single row, which any view may leave at 1 or
    whatever it likes, and then computes something else.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(rows.shape[0], int) and rows.shape[0] == 1:
        return rows.reshape(-1).as_strided((1, x.shape[-1]), (x.shape[-1], 1))
    return rows


def _scales(x: Tensor, x_scale: Tensor) -> Tensor:
    """One scale a row, [M, 1]."""
    return _rows(x_scale if x_scale.ndim else x_scale.expand(*x.shape[:-1], 1))


def _like(x: Tensor, out: Tensor) -> Tensor:
    return out.reshape(*x.shape[:-1], out.shape[-1])


# -- products ------------------------------------------------------------------------------------


def int8_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x int8 with one scale a row [.., 1] or for all [], weight int8 with one scale a channel [N, 1]."""
    return _like(x, ops.int8_mm(_rows(x), _scales(x, x_scale), weight, scale, bias, dtype))


def dual_mm(x: Tensor, x_scale: Tensor, *rest: Any) -> Tensor:
    """x int8 with scales as above; the rest (dual codes, bias, dtype) as native.dual_mm takes it."""
    return _like(x, ops.dual_mm(_rows(x), _scales(x, x_scale), *rest))


def int8_float(x: Tensor, weight: Tensor) -> Tensor:
    """x float, weight int8 -> sums in x's dtype, without the weight's scale."""
    return _like(x, ops.int8_float(_rows(x), weight))


def nibble_float(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """x float, w = a q - c -> x's dtype."""
    return _like(x, ops.nibble_float(_rows(x), nibbles, a, c))


# -- weights -------------------------------------------------------------------------------------


def takes_nibbles(format: Format) -> bool:
    """Whether a format's groups can be halved into whole vectors of 16 bytes."""
    return format.dtype == "int4" and format.per == "group" and format.group % 32 == 0


def prepare_nibbles(stored: Tensor, format: Format, columns: int) -> Tensor:
    """Stored int4 codes -> bytes [N, groups, G/2]; a ragged last group is padded with zero codes."""
    codes = load_codes(stored, format, columns)
    unsigned = codes if format.zero != "none" else (codes.to(torch.int16) - format.qmin).to(torch.uint8)
    padded = torch.nn.functional.pad(unsigned, (0, -columns % format.group))
    halves = padded.unflatten(-1, (-1, 2, format.group // 2))
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).contiguous()


def prepare_symmetric(stored: Tensor, steps: Tensor, format: Format, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes without zero points -> nibbles as above, positive group scales, zero points; [N, groups, ..].

    s q with a negative s is |s| (u - 7) with u = 7 - q, as it is s (u - 8) with u = q + 8.
    """
    nibbles, down = prepare_nibbles(stored, format, columns), steps < 0
    nibbles = torch.where(down[..., None], nibbles ^ 0xFF, nibbles)
    return nibbles, steps.abs(), torch.where(down, 7, 8).to(torch.uint8)


def group_offsets(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """w = a q - c for unsigned int4 codes q: a, c [N, groups] float32."""
    a = scale.float().contiguous()
    z = torch.full_like(a, 8.0) if zero is None else zero.float()
    return a, (a * z).contiguous()
