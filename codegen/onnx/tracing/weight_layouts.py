"""Weights of quantized linears in the layouts that MatMulNBits and DequantizeLinear read."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.bit_packing import pack, unpack
from qcompile.numerics.format import Format
from qcompile.numerics.k_scales import single_level
from qcompile.numerics.qtensor import QTensor


def weight_of(module: QuantLinear) -> QTensor:
    """The quantized weight [N, K] of a module."""
    parts = module.codes, module.scale, module.zero, module.group_scale
    return QTensor.from_stored(parts, module.format, module.in_features)


def block_size_of(form: Format, k: int) -> int:
    """Columns that share a scale in MatMulNBits, which always has blocks: a scale of a whole row is repeated."""
    if form.per == "group":
        return form.group
    return next((block for block in (128, 64, 32, 16) if k % block == 0), 128)


def to_matmul_nbits(weight: QTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight [N, K] as MatMulNBits reads it, in blocks along K.

    Returns:
        Packed codes [N, blocks, block bits / 8] uint8; scales [N, blocks] float32; zero points, packed uint8
        [N, ceil(blocks bits / 8)] or float32 [N, blocks], or None for the middle of the codes.
    """
    form, k = weight.format, weight.columns
    if form.k6:
        plain = Format("int4", "group", form.group, zero="float")
        return to_matmul_nbits(QTensor(*single_level(*weight.parts), plain))
    block = block_size_of(form, k)
    blocks = -(-k // block)
    padding = blocks * block - k
    unsigned = weight.codes.to(torch.int16)
    middle = 2 ** (form.bits - 1)
    if form.zero == "none":
        unsigned = unsigned + middle
    scales = weight.scale.float() * (weight.group_scale.float() if weight.group_scale is not None else 1.0)
    zeros = None if weight.zero is None else weight.zero.expand(len(unsigned), blocks)
    if padding:  # with the zero point, whose value is 0; beside a float one, with the nearest code to it
        last = torch.full((len(unsigned), 1), middle) if zeros is None else zeros[:, -1:].float().round()
        unsigned = torch.cat([unsigned, last.to(torch.int16).expand(-1, padding)], dim=1)
    codes = pack(unsigned.to(torch.uint8), form.bits).reshape(len(unsigned), blocks, -1)
    if zeros is not None:
        zeros = zeros.float().contiguous() if zeros.is_floating_point() else pack(zeros.contiguous(), form.bits)
    return codes, scales.expand(len(unsigned), blocks).contiguous(), zeros


def to_dequantize_linear(weight: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [N, K] as DequantizeLinear and MatMul read it, transposed.

    Returns:
        The packed stream of codes [K, N]; scales [blocks, N] float32; the packed stream of zero points [blocks, N].
    """
    codes, scales, zeros = to_matmul_nbits(weight)
    bits, k, (n, blocks) = weight.format.bits, weight.columns, scales.shape
    unpacked = unpack(codes.reshape(n, -1), bits, blocks * block_size_of(weight.format, k))[:, :k]
    zero = torch.full((n, blocks), 2 ** (bits - 1)) if zeros is None else unpack(zeros, bits, blocks)
    streams = [pack(part.t().reshape(-1), bits) for part in (unpacked, zero)]
    return streams[0], scales.t().contiguous(), streams[1]
