"""Kernels: a quantized product written in ATen for one regime of rows.

Each kernel is a pair: `prepare` turns stored weights into the tensors that the kernel reads, once;
the function itself is traced into the graph, so that Inductor fuses activation quantization before
it and scales, bias and activation after it. Shapes: x [.., K], weight [N, K], result [.., N].

    int8_mm      codes int8, one scale for a row        `_int_mm`, exact in int32
    int8_gemv    codes int8, one row of x               a vectorised reduction that Inductor writes
    int8pack     codes int8, few rows, bfloat16         `_weight_int8pack_mm`
    nibble_gemv  int4 codes, one row of x               unpacks in registers, reads half the bytes
    nibble_mm    int4 dual codes, many rows             unpacks to int8 (unpack.py), `_int_mm` twice
    int4pack     int4 codes, few rows, bfloat16         `_weight_int4pack_mm_for_cpu`
    nibble_dequant_mm  int4 codes, many rows            dequantises both halves, float product
    dequant_mm   any format                             dequantise, then the float product

The two halves are why unpacking is fast: low and high nibbles become two tensors, each product
takes its half of x, and nothing is interleaved: Inductor vectorises each half and would not
vectorise their concatenation (measured: 1 ms against 18 ms for 4096x4096).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import qcompile.codegen.cpu.unpack  # noqa: F401  registers the unpacking operators
from qcompile.formats import Format, dequantize_codes, load_codes

aten = torch.ops.aten


# -- activations -------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scale [.., 1] of each row: the values of qcompile::quantize, in ATen."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale


def finish(sums: Tensor, scale: Tensor, x_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Integer or float sums [.., N] times the row scales, plus bias, cast once."""
    out = sums.float()
    if x_scale is not None:
        out = out * x_scale
    out = out * scale.reshape(-1)
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)


def dense_rows(x: Tensor) -> Tensor:
    """[M, K] with a row stride of K even for one row.

    torch 2.13's CPU `_int_mm` reads the stride of a single row, which any view may leave at 1 or
    whatever it likes, and then computes something else.
    """
    rows = _rows(x)
    if isinstance(rows.shape[0], int) and rows.shape[0] == 1:
        return rows.reshape(-1).as_strided((1, x.shape[-1]), (x.shape[-1], 1))
    return rows


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# -- int8 ----------------------------------------------------------------------------------------


def int8_mm(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 [.., K], weight int8 [N, K] -> int32 [.., N]."""
    return torch._int_mm(dense_rows(x), weight.t()).reshape(*x.shape[:-1], weight.shape[0])


def int8_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x float or int8 with one row, weight int8 [N, K] -> float32 [.., N]."""
    sums = (x.reshape(1, -1).float() * weight.float()).sum(-1)
    return sums.reshape(*x.shape[:-1], weight.shape[0])


def int8pack(x: Tensor, weight: Tensor, ones: Tensor) -> Tensor:
    """x bfloat16 [.., K], few rows, weight int8 [N, K], ones bfloat16 [N] -> bfloat16 sums [.., N].

    The row scales are applied afterwards in float32: bfloat16 would round them.
    """
    return aten._weight_int8pack_mm(_rows(x), weight, ones).reshape(*x.shape[:-1], weight.shape[0])


# -- nibbles, in halves of a group: byte j of a group holds its columns j (low) and j + G/2 (high) --


def prepare_nibbles(stored: Tensor, format: Format, columns: int) -> Tensor:
    """Stored int4 codes -> bytes [N, groups, G/2]; a ragged last group is padded with zero codes."""
    width = format.group if format.per == "group" else columns + columns % 2
    codes = load_codes(stored, format, columns)
    unsigned = codes if format.zero != "none" else (codes.to(torch.int16) - format.qmin).to(torch.uint8)
    halves = torch.nn.functional.pad(unsigned, (0, -columns % width)).unflatten(-1, (-1, 2, width // 2))
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).contiguous()


def group_offsets(scale: Tensor, zero: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    """w = a q - c for unsigned stored codes q: a, c [N, groups] float32."""
    a = scale.float()
    z = torch.full_like(a, 8.0) if zero is None else zero.float()
    return a, a * z


def _halves(x: Tensor, nibbles: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x as [M, groups, G/2] for the low and for the high nibbles."""
    _, groups, half = nibbles.shape
    rows = x.reshape(-1, x.shape[-1])
    missing = groups * half * 2 - rows.shape[-1]
    if missing:  # by cat: torch's pad pins a symbolic number of rows to its first value
        rows = torch.cat([rows, rows.new_zeros(rows.shape[0], missing)], dim=1)
    rows = rows.view(-1, groups, 2, half)
    return rows[:, :, 0], rows[:, :, 1]


def nibble_gemv(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """One row of x; w = a q - c for each group: sum_k w x = sum_g a_g sum q x - c_g sum x."""
    low, high = _halves(x.float(), nibbles)
    dots = ((nibbles & 15).float() * low + (nibbles >> 4).float() * high).sum(-1)
    offset = (c * (low.sum(-1) + high.sum(-1))).sum(-1)
    return ((dots * a).sum(-1) - offset).reshape(*x.shape[:-1], nibbles.shape[0])


def nibble_mm(x: Tensor, nibbles: Tensor, group_scale: Tensor, zero: Tensor) -> Tensor:
    """x int8 [.., K]; dual codes -> int32 sums of s1 (q - z) x over K, [.., N]."""
    low_w, high_w = torch.ops.qcompile_cpu.unpack_int8(nibbles, group_scale, zero)
    low, high = _halves(x, nibbles)
    sums = torch._int_mm(low.reshape(-1, low_w.shape[1]), low_w.t())
    sums = sums + torch._int_mm(high.reshape(-1, high_w.shape[1]), high_w.t())
    return sums.reshape(*x.shape[:-1], nibbles.shape[0])


# -- int4pack: torch's own layout, found by probing ----------------------------------------------


@functools.lru_cache(maxsize=1)
def int4pack_block() -> int:
    """Channels of one block of torch's int4 CPU layout, or 0 where it is not the form used here.

    The form: [N / block, K, block / 2] bytes, low nibble = channel j, high = channel j + block / 2.
    Packing depends on the instruction set, so it is probed and not assumed.
    """
    codes = torch.randint(0, 16, (128, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (64, 32, 16):
        if torch.equal(pack_int4_blocks(codes.to(torch.uint8), block).view(packed.shape), packed):
            return block
    return 0


def pack_int4_blocks(codes: Tensor, block: int) -> Tensor:
    """Unsigned codes [N, K] -> [N / block, K, block / 2] bytes."""
    n, k = codes.shape
    by_block = codes.view(n // block, 2, block // 2, k)
    return (by_block[:, 0] | (by_block[:, 1] << 4)).transpose(1, 2).contiguous()


def int4pack_group(format: Format, columns: int) -> int:
    """The widest group that torch's kernel knows and that tiles this format's groups, or 0."""
    whole = format.group if format.per == "group" else columns
    rest = columns % whole
    for group in (256, 128, 64, 32):
        if whole % group == 0 and rest % group == 0:
            return group
    return 0


def prepare_int4pack(
    stored: Tensor, a: Tensor, zero: Tensor | None, format: Format, columns: int
) -> tuple[Tensor, Tensor]:
    """Stored codes and group scales a [N, groups] -> packed bytes and [K/group, N, 2] bfloat16.

    torch computes (q - 8) scale + offset, so offset = a (8 - z).
    """
    codes = load_codes(stored, format, columns)
    unsigned = codes if format.zero != "none" else (codes.to(torch.int16) - format.qmin).to(torch.uint8)
    packed = pack_int4_blocks(unsigned, int4pack_block())
    group = int4pack_group(format, columns)
    whole = format.group if format.per == "group" else columns
    scale = a.float().repeat_interleave(whole // group, dim=1)[:, : columns // group]
    z = torch.full_like(a.float(), 8.0) if zero is None else zero.float()
    offset = scale * (8 - z.repeat_interleave(whole // group, dim=1)[:, : columns // group])
    both = torch.stack((scale, offset), dim=-1).transpose(0, 1).contiguous()
    return packed, both.to(torch.bfloat16)


def int4pack(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [.., K] (numbers, or int8 codes: exact in bfloat16) -> bfloat16 [.., N]."""
    k, n = packed.shape[1], scales.shape[1]
    rows = _rows(x).to(torch.bfloat16)
    group = k // scales.shape[0]
    out = aten._weight_int4pack_mm_for_cpu(rows, packed.view(n, k // 2), group, scales)
    return out.reshape(*x.shape[:-1], n)


# -- anything ------------------------------------------------------------------------------------


def nibble_dequant_mm(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """Any rows of numbers, w = a q - c: both halves dequantised to x's dtype, two float products."""
    low_w, high_w = torch.ops.qcompile_cpu.unpack_float(nibbles, a, c, x.dtype)
    low, high = _halves(x, nibbles)
    total = low.reshape(-1, low_w.shape[1]) @ low_w.t() + high.reshape(-1, high_w.shape[1]) @ high_w.t()
    return total.reshape(*x.shape[:-1], nibbles.shape[0])


def dequantize_weight(
    stored: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, format: Format, columns: int
) -> Tensor:
    """Stored codes -> float32 [N, K], in ATen."""
    return dequantize_codes(load_codes(stored, format, columns), scale, zero, group_scale, format)
