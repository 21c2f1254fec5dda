"""Quantized linears in the form that ONNX has operators for.

    weight-only int4/int8   MatMulNBits(x, codes, scales, zeros)       float activations, float sums
    int8 x int8             per-token codes, MatMulInteger, scales     exact int32 sums
    W4A8 (dual), W4A4       per-token quantize-dequantize, then MatMulNBits

Each module computes exactly what qcompile::qlinear means; only the layout of the weights differs.
MatMulNBits holds [N, blocks, block bits / 8] bytes; a ragged last block is padded with zero points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompile.formats import Format, load_codes, spread
from qcompile.hadamard import factor, hadamard_matrix
from qcompile.module import QuantLinear
from qcompile.packing import pack

_BLOCK = 128  # block of a format with one scale for a row: MatMulNBits always has blocks


class NoOnnxForm(ValueError):
    """Sites whose format has no ONNX operator; the text names all of them and the mend."""


def refusal(module: QuantLinear) -> str | None:
    """Why a site has no ONNX form, or None."""
    form, act = module.format, module.act
    if form.bits not in (4, 8) or form.is_float:
        return f"{form}: ONNX Runtime's CPU operators take int4 and int8 weights"
    if form.per == "tensor":
        return f"{form}: a scale for the whole weight (use int8/row)"
    if form.per == "group" and (form.group < 16 or form.group & (form.group - 1)):
        return f"{form}: blocks must be a power of two of at least 16"
    if act is not None and (act.per == "group" or act.zero != "none" or act.is_float):
        return f"activation {act}: only int8 or int4, symmetric, per row or tensor"
    return None


@torch.library.custom_op("qcompile_onnx::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int, bits: int, block: int
) -> Tensor:
    """MatMulNBits as ONNX Runtime defines it, in float32; zeros packed like codes, or float."""
    unsigned = codes if bits == 8 else torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    blocks = scales.numel() // n
    if zeros.is_floating_point():
        z = zeros.reshape(n, blocks)
    elif bits == 8:
        z = zeros.reshape(n, blocks).float()
    else:
        z = torch.stack((zeros & 15, zeros >> 4), -1).flatten(-2).reshape(n, -1)[:, :blocks].float()
    weight = (unsigned.reshape(n, blocks, block).float() - z[..., None]) * scales.reshape(n, blocks, 1)
    return torch.nn.functional.linear(x, weight.reshape(n, -1)[:, :k])


@matmul_nbits.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int, bits: int, block: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op("qcompile_onnx::matmul_integer", mutates_args=())
def matmul_integer(x: Tensor, weight: Tensor) -> Tensor:
    """uint8 [.., K] with zero point 128, int8 [K, N] -> int32 [.., N]."""
    rows = (x.to(torch.int16) - 128).to(torch.int8).reshape(-1, x.shape[-1])
    return torch._int_mm(rows, weight.contiguous()).reshape(*x.shape[:-1], -1)


@matmul_integer.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=torch.int32)


class OnnxLinear(nn.Module):
    """What a QuantLinear computes, from operators that ONNX has."""

    def __init__(self, source: QuantLinear) -> None:
        super().__init__()
        self.n, self.k, self.act = source.out_features, source.in_features, source.act
        self.turn = None if source.signs is None else _Hadamard(source.signs)
        self.factors = nn.ParameterList(source.factors(torch.float32)).requires_grad_(False)
        self.register_buffer("bias", None if source.bias is None else source.bias.float())
        self.integer = source.format == Format("int8") and source.act == Format("int8")
        if self.integer:
            self.register_buffer("weight", source.codes.t().contiguous())
            self.register_buffer("scale", source.scale.reshape(-1).float())
        else:
            self._blocks(source)

    def _blocks(self, source: QuantLinear) -> None:
        form, k = source.format, self.k
        self.bits = form.bits
        self.block = form.group if form.per == "group" else _BLOCK
        blocks = -(-k // self.block)
        pad = blocks * self.block - k
        unsigned = load_codes(source.codes, form, k).to(torch.int16)
        middle = 2 ** (form.bits - 1)
        if form.zero == "none":
            unsigned = unsigned + middle
        scale = source.scale.float() * (source.group_scale.float() if source.group_scale is not None else 1.0)
        scale = scale.expand(self.n, blocks).contiguous()
        if source.zero is None:
            zero = torch.full((self.n, blocks), middle, dtype=torch.uint8)
        else:
            zero = source.zero.expand(self.n, blocks).contiguous()
        filler = spread(zero.to(torch.int16) if not zero.is_floating_point() else zero.round().to(torch.int16),
                        Format("int4", "group", self.block), blocks * self.block)[:, k:]  # fmt: skip
        if pad:
            unsigned = torch.cat([unsigned, filler], dim=1)
        codes = pack(unsigned.to(torch.uint8), form.bits).reshape(self.n, blocks, -1)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.reshape(-1))
        packed = zero.float().reshape(-1) if zero.is_floating_point() else pack(zero, form.bits).reshape(-1)
        self.register_buffer("zeros", packed)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] float32 -> [.., N]."""
        if self.turn is not None:
            x = self.turn(x)
        out = self._product(x)
        if self.bias is not None:
            out = out + self.bias
        for low in self.factors:
            x = nn.functional.linear(x, low)
        return out + x if len(self.factors) else out

    def _product(self, x: Tensor) -> Tensor:
        if self.act is not None:
            high = self.act.qmax
            peak = x.abs().amax(-1, keepdim=True) if self.act.per == "row" else x.abs().amax()
            x_scale = peak / high
            x_scale = torch.where(x_scale > 1e-30, x_scale, torch.ones_like(x_scale))
            steps = (x / x_scale).round().clamp(-high - 1, high)
            if self.integer:
                sums = torch.ops.qcompile_onnx.matmul_integer((steps + 128).to(torch.uint8), self.weight)
                return sums.float() * x_scale * self.scale
            x = steps * x_scale
        product: Tensor = torch.ops.qcompile_onnx.matmul_nbits(
            x, self.codes, self.scale, self.zeros, self.n, self.k, self.bits, self.block
        )
        return product


class _Hadamard(nn.Module):
    """x diag(signs) H / sqrt(n) as small matrix products: H is a Kronecker product."""

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        n = signs.numel()
        k, m = factor(n) or (1, 0)
        sizes = [k, 2 ** (m // 2), 2 ** (m - m // 2)]
        self.sizes = sizes
        self.register_buffer("signs", signs.float() * n**-0.5)
        for index, size in enumerate(sizes):
            self.register_buffer(f"h{index}", hadamard_matrix(size).float())

    def forward(self, x: Tensor) -> Tensor:
        """x [.., n] -> [.., n]."""
        k, a, b = self.sizes
        lead = x.shape[:-1]
        y = (x * self.signs).reshape(-1, k, a, b) @ self.h2
        y = self.h1.t() @ y  # the factors of two are symmetric; the transpose keeps the law explicit
        y = self.h0.t() @ y.reshape(-1, k, a * b)
        return y.reshape(*lead, k * a * b)
