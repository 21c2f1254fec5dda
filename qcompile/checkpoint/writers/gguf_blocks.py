"""Blocks of GGUF: 32 or 256 weights of a row with their scales, as llama.cpp multiplies them.

    Q8_0   d, 32 int8                      w = d q
    Q4_0   d, 16 bytes                     w = d (u - 8)      low nibbles are elements 0 .. 15, high ones 16 .. 31
    Q4_1   d, m, 16 bytes                  w = d u + m        m = -s z
    Q4_K   d, dmin, 12 bytes, 128 bytes    w = d sc u - dmin m of eight groups, whose sc and m have six bits

d, m and dmin are float16. The 12 bytes of Q4_K: sc of groups 0 .. 3, m of groups 0 .. 3, the low nibbles of sc and m of
groups 4 .. 7; the high two bits of those stand on top of the first eight bytes. Of the 128, 32 are a pair of groups.

Source: ggml's quantization formats as the package gguf 0.19 reads them (gguf/quants.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.checkpoint.writers.export_refusals import exact_scale, refuse
from qcompile.checkpoint.writers.int32_words import unsigned_codes
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import K_BLOCK, K_GROUP, Format
from qcompile.numerics.qtensor import expand_groups

TARGET = "gguf"
_BLOCK = 32


def block_type(site: str, form: Format, act: Format | None, columns: int) -> str:
    """The type of GGUF that holds a weight: "Q8_0", "Q4_0", "Q4_1" or "Q4_K".

    Args:
        site: its path, for messages.
        form: its format.
        act: the format of the activation, which must be float.
        columns: K.

    Raises:
        ExportError: no type holds it.
    """
    if act is not None:
        what = f"activations in {act} (llama.cpp chooses how it rounds them)"
        refuse(TARGET, site, what, "quantize the weights alone, act=None, or use a preset gguf-*")
    if form.k6:
        if not form.fits(columns):
            fix = "give such weights int4/group32/floatzero/f16 (Q4_1), as undivided or by a rule"
            refuse(TARGET, site, f"{columns} columns, which are no whole blocks of {K_BLOCK}", fix)
        return "Q4_K"
    if form.is_float or form.two_level or form.zero == "int" or (form.bits == 8 and form.zero != "none"):
        fix = (
            "use int8/group32/f16 (Q8_0), int4/group32/f16 (Q4_0), int4/group32/floatzero/f16 (Q4_1) or "
            "int4/group32/k6 (Q4_K)"
        )
        refuse(TARGET, site, f"weights in {form}", fix)
    if columns % _BLOCK or (form.per == "group" and form.group % _BLOCK):
        fix = "use groups of 32, and keep weights float whose columns are no multiple of 32"
        refuse(TARGET, site, f"blocks that are not of 32 columns ({form}, K = {columns})", fix)
    if form.scale != "f16":
        text = f"{str(form).removesuffix(f'/{form.scale}')}/f16"
        refuse(TARGET, site, f"scales of {form}, where blocks have float16 ones", f"quantize to {text}")
    if form.bits == 8:
        return "Q8_0"
    return "Q4_0" if form.zero == "none" else "Q4_1"


def blocks_of(site: str, linear: QuantLinear) -> tuple[str, Tensor]:
    """A weight as blocks.

    Returns:
        The type, and uint8 [N, bytes of a row].

    Raises:
        ExportError: no type holds it, or an offset is beyond float16.
    """
    form, rows, columns = linear.format, linear.out_features, linear.in_features
    kind = block_type(site, form, linear.act, columns)
    if kind == "Q4_K":
        return kind, _k_blocks(linear)
    scale = _per_block(linear.scale.detach().cpu(), form, rows, columns)
    heads = [scale]
    if kind == "Q8_0":
        body = linear.codes.detach().cpu().view(torch.uint8).view(rows, -1, _BLOCK)
    else:
        codes = unsigned_codes(linear.codes.detach().cpu(), form, columns)
        if linear.zero is None:
            codes = codes + (8 - (1 << form.bits - 1))  # narrower codes, in the middle of sixteen
        else:
            heads.append(_offsets(site, linear, scale))
        halves = codes.view(rows, -1, 2, _BLOCK // 2)
        body = halves[:, :, 0] | (halves[:, :, 1] << 4)
    parts = [head.contiguous().view(torch.uint8).view(rows, -1, 2) for head in heads]
    return kind, torch.cat([*parts, body], -1).flatten(1)


def _k_blocks(linear: QuantLinear) -> Tensor:
    """Q4_K, uint8 [N, 144 K / 256]."""
    rows, blocks = linear.out_features, linear.in_features // K_BLOCK
    codes = unsigned_codes(linear.codes.detach().cpu(), linear.format, linear.in_features)
    pairs = codes.view(rows, blocks, -1, 2, K_GROUP)
    body = (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(2)
    assert linear.zero is not None and linear.group_scale is not None
    sc, m = (part.detach().cpu().to(torch.uint8).view(rows, blocks, 8) for part in (linear.group_scale, linear.zero))
    first = [part[..., :4] | (part[..., 4:] >> 4 << 6) for part in (sc, m)]
    last = (sc[..., 4:] & 15) | (m[..., 4:] << 4)
    head = linear.scale.detach().cpu().contiguous().view(torch.uint8).view(rows, blocks, 4)
    return torch.cat([head, *first, last, body], -1).flatten(1)


def _offsets(site: str, linear: QuantLinear, scale: Tensor) -> Tensor:
    """m = -s z of each block, float16 [N, K / 32]: s z is a value of float16 but for the rounding of z to float32."""
    assert linear.zero is not None
    zero = _per_block(linear.zero.detach().cpu(), linear.format, linear.out_features, linear.in_features)
    exact = -(scale.double() * zero.double())
    offset = exact.half()
    if not bool(((offset.double() - exact).abs() <= 2**-22 * exact.abs()).all()):
        fix = "quantize to a format with floatzero/f16, and not from an adapter that was merged into zero points"
        exact_scale(site, exact, torch.float16, TARGET, fix)
    return offset


def _per_block(part: Tensor, form: Format, rows: int, columns: int) -> Tensor:
    """A scale or zero point for each block, [N, K / 32]."""
    blocks = columns // _BLOCK
    if form.per != "group":
        return part.reshape(-1, 1).expand(rows, blocks).contiguous()
    return expand_groups(part, form, columns)[:, ::_BLOCK].contiguous()
