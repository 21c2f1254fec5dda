"""Quantized linears in the form that ONNX has operators for.

    weight-only int2/4/8    MatMulNBits(x, codes, scales, zeros)       float activations, float sums
    int8 x int8             Int8Linear: products in int8               exact int32 sums (matmul_integer.py)
    dual int4 x int8        DualLinear: both of the above, by the number of rows (matmul_nbits.py)
    other W4A8, W4A4        per-token quantize-dequantize, then MatMulNBits

In a portable file, of standard operators only, MatMulNBits is BlockedLinear (matmul_nbits.py): DequantizeLinear and MatMul.
Each module computes exactly what qcompile::qlinear means; only the layout of the weights differs.
MatMulNBits holds [N, blocks, block bits / 8] bytes; a ragged last block is padded with zero points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qcompile.codegen.onnx.ops.matmul_ops  # noqa: F401  registers torch.ops.qcompile_onnx
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.bit_packing import pack, unpack
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import factor, hadamard_matrix
from qcompile.numerics.qtensor import load_codes

ops = torch.ops.qcompile_onnx


class NoOnnxForm(ValueError):
    """Sites whose format has no ONNX operator; the text names all of them and the mend."""


def refusal(module: QuantLinear | QuantStack, portable: bool = False) -> str | None:
    """Why a site has no ONNX form, or None."""
    form, act = module.format, getattr(module, "act", None)
    if portable and form.zero == "float":
        return f"{form}: DequantizeLinear takes integer zero points"
    if form.bits not in (2, 4, 8) or form.is_float:
        return f"{form}: ONNX Runtime's CPU operators take int2, int4 and int8 weights"
    if portable and form.bits == 2:
        return f"{form}: DequantizeLinear of opset 21 takes int4 and int8 weights"
    if form.per == "tensor":
        return f"{form}: a scale for the whole weight (use int8/row)"
    if form.per == "group" and (form.group < 16 or form.group & (form.group - 1)):
        return f"{form}: blocks must be a power of two of at least 16"
    if act is not None and (act.per == "group" or act.zero == "float" or act.is_float):
        return f"activation {act}: only int8 or int4, symmetric or with integer zero points, per row or tensor"
    return None


def check_forms(model: nn.Module, portable: bool = False) -> None:
    """Refuse every site without an ONNX form, all at once."""
    bad = {
        path: reason
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantStack) and (reason := refusal(module, portable)) is not None
    }
    if bad:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in list(bad.items())[:20])
        raise NoOnnxForm(
            f"{len(bad)} sites have no ONNX form:\n{lines}\n"
            "Use int8, w8a16, w4a16 or w4a8, or a rule that keeps them in float."
        )


def two_ways(module: QuantLinear) -> bool:
    """Whether a site is multiplied by its 4-bit codes or in int8, by the number of rows."""
    return module.format.dual and module.act is not None and module.act.is_int8_rows


class OnnxLinear(nn.Module):
    """What a QuantLinear computes, from operators that ONNX has."""

    def __init__(self, source: QuantLinear, portable: bool = False) -> None:
        super().__init__()
        self.portable = portable
        self.n, self.k = source.out_features, source.in_features
        self.act = None if portable and two_ways(source) else source.act  # a portable file has the first way only
        self.turn = None if source.signs is None else Hadamard(source.signs)
        self.factors = nn.ParameterList(source.factors(torch.float32)).requires_grad_(False)
        self.register_buffer("bias", None if source.bias is None else source.bias.float())
        self.integer = source.format == Format("int8") and self.act is not None and self.act.dtype == "int8"
        self.dual = two_ways(source) and not portable
        if self.integer:
            weight = source.codes.t().contiguous()
            self.register_buffer("weight", (weight.short() + 128).to(torch.uint8) if portable else weight)
            self.register_buffer("scale", source.scale.reshape(-1).float())
            sums = None if self.act.zero == "none" else self.scale * source.codes.sum(1)
            self.register_buffer("sums", sums)
            return
        self.bits, self.block = source.format.bits, block_of(source.format, self.k)
        parts = to_columns(source) if portable else to_blocks(source)
        for name, tensor in zip(("codes", "scales", "zeros"), parts, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("row", source.scale.reshape(-1).float() if self.dual else None)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] float32 -> [.., N]."""
        if self.turn is not None:
            x = self.turn(x)
        if self.integer:
            out = ops.int8_linear(x, self.weight, self.scale, self.sums, self.bias, self.act.per == "row")
        elif self.dual:
            blocks = (self.codes, self.scales, self.zeros, self.bias, self.k, self.bits, self.block)
            out = ops.dual_linear(x, *blocks, self.row, self.act.per == "row")
        else:
            steps = x if self.act is None else self._rounded(x)
            blocks = (self.codes, self.scales, self.zeros, self.bias)
            if self.portable:
                out = ops.blocked_linear(steps, *blocks, self.bits, self.block)
            else:
                out = ops.nbits_linear(steps, *blocks, self.k, self.bits, self.block)
        low = x
        for factor_ in self.factors:
            low = nn.functional.linear(low, factor_)
        return out + low if len(self.factors) else out

    def _rounded(self, x: Tensor) -> Tensor:
        """x rounded to the activation format, as numbers."""
        axes = -1 if self.act.per == "row" else tuple(range(x.ndim))
        low = None if self.act.zero == "none" else x.amin(axes, keepdim=True).clamp_max(0)
        span = x.abs().amax(axes, keepdim=True) if low is None else x.amax(axes, keepdim=True).clamp_min(0) - low
        step = span / self.act.qmax
        step = torch.where(step > 1e-30, step, torch.ones_like(step))
        steps, least, most = (x / step).round(), self.act.qmin, self.act.qmax
        if low is None:
            return steps.clamp(least, most) * step
        zero = (-low / step).round()
        return ((steps + zero).clamp(least, most) - zero) * step


def block_of(form: Format, k: int) -> int:
    """Columns that share a scale in MatMulNBits, which always has blocks; one scale for a row is repeated."""
    if form.per == "group":
        return form.group
    return next((block for block in (128, 64, 32, 16) if k % block == 0), 128)


def to_blocks(source: QuantLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, blocks, block bits / 8], scales [N, blocks], zero points (None: the middle) for MatMulNBits."""
    form, k, block = source.format, source.in_features, block_of(source.format, source.in_features)
    blocks = -(-k // block)
    pad = blocks * block - k
    unsigned = load_codes(source.codes, form, k).to(torch.int16)
    middle = 2 ** (form.bits - 1)
    if form.zero == "none":
        unsigned = unsigned + middle
    scales = source.scale.float() * (source.group_scale.float() if source.group_scale is not None else 1.0)
    zeros = None if source.zero is None else source.zero.expand(len(unsigned), blocks)
    if pad:  # with the zero point, which is the number 0; beside a float one, the nearest to it
        last = torch.full((len(unsigned), 1), middle) if zeros is None else zeros[:, -1:].float().round()
        unsigned = torch.cat([unsigned, last.to(torch.int16).expand(-1, pad)], dim=1)
    codes = pack(unsigned.to(torch.uint8), form.bits).reshape(len(unsigned), blocks, -1)
    if zeros is not None:
        zeros = zeros.float().contiguous() if zeros.is_floating_point() else pack(zeros.contiguous(), form.bits)
    return codes, scales.expand(len(unsigned), blocks).contiguous(), zeros


def to_columns(source: QuantLinear) -> tuple[Tensor, Tensor, Tensor]:
    """The same as blocked_linear has it: codes of [K, N], scales and zero points [blocks, N]."""
    codes, scales, zeros = to_blocks(source)
    bits, k, (n, blocks) = source.format.bits, source.in_features, scales.shape
    levels = unpack(codes.reshape(n, -1), bits, blocks * block_of(source.format, k))[:, :k]
    z = torch.full((n, blocks), 2 ** (bits - 1)) if zeros is None else unpack(zeros, bits, blocks)
    flat = [pack(part.t().reshape(-1), bits) for part in (levels, z)]
    return flat[0], scales.t().contiguous(), flat[1]


class Hadamard(nn.Module):
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
