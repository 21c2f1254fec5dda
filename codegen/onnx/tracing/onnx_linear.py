"""Quantized linears in the form that ONNX has operators for; they take the modules' places while a model is traced.

    weight-only int2/4/8    MatMulNBits(x, codes, scales, zeros)       float activations, float sums
    int8 x int8             Int8Linear: products in int8               exact int32 sums (matmul_integer.py)
    dual int4 x int8        DualLinear: both of the above, chosen by the number of rows (matmul_nbits.py)
    other W4A8, W4A4        per-token fake quantization, then MatMulNBits

With standard operators only, MatMulNBits is BlockedLinear (matmul_nbits.py): DequantizeLinear and MatMul.
Each module computes exactly what qcompile::qlinear means; only the layout of the weights differs (weight_layouts.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import qcompile.codegen.onnx.ops.matmul_ops  # noqa: F401  registers torch.ops.qcompile_onnx
from qcompile.codegen.onnx.tracing.onnx_support import has_int4_and_int8_kernels
from qcompile.codegen.onnx.tracing.weight_layouts import block_size_of, to_dequantize_linear, to_matmul_nbits, weight_of
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.modules.static_quant import StaticQuantLinear, round_to_codes
from qcompile.numerics.hadamard import hadamard_factors, hadamard_matrix

ops = torch.ops.qcompile_onnx

_TINY = 1e-30  # a smaller scale is that of zeros


@contextlib.contextmanager
def onnx_linears(model: nn.Module, contrib_ops: bool) -> Iterator[None]:
    """Put ONNX forms in the places of quantized linears, and the originals back afterwards."""
    originals = [(path, m) for path, m in model.named_modules() if isinstance(m, QuantLinear | RotatedLinear)]
    try:
        for path, module in originals:
            if isinstance(module, StaticQuantLinear):
                model.set_submodule(path, nn.Sequential(StaticRounding(module), OnnxLinear(module, contrib_ops)))
            elif isinstance(module, QuantLinear):
                model.set_submodule(path, OnnxLinear(module, contrib_ops))
            else:
                model.set_submodule(path, RotatedOnnxLinear(module))
        yield
    finally:
        for path, module in originals:
            model.set_submodule(path, module)


class OnnxLinear(nn.Module):
    """What a QuantLinear computes, from operators that ONNX has.

    Args:
        source: the module.
        contrib_ops: whether the file may use operators of ONNX Runtime beside those of the ONNX standard.
    """

    _source: QuantLinear

    def __init__(self, source: QuantLinear, contrib_ops: bool = True) -> None:
        super().__init__()
        object.__setattr__(self, "_source", source)  # no submodule, whose tensors would be the file's too
        self.contrib_ops = contrib_ops
        self.n, self.k = source.out_features, source.in_features
        two_kernels = has_int4_and_int8_kernels(source)
        self.act = None if two_kernels and not contrib_ops else source.act  # such a file has the 4-bit kernel only
        self.hadamard = None if source.signs is None else HadamardTransform(source.signs)
        self.factors = nn.ParameterList(source.factors(torch.float32)).requires_grad_(False)
        self.register_buffer("bias", None if source.bias is None else source.bias.float())
        rows = source.format.is_int8_rows and source.format.per == "row"
        self.is_int8 = rows and self.act is not None and self.act.dtype == "int8"
        self.is_dual = two_kernels and contrib_ops
        if self.is_int8:
            codes = source.codes.t().contiguous()
            self.register_buffer("codes", codes if contrib_ops else (codes.short() + 128).to(torch.uint8))
            self.register_buffer("scale", source.scale.reshape(-1).float())
            sums = None if self.act.zero == "none" else self.scale * source.codes.sum(1)
            self.register_buffer("sums", sums)
            return
        self.bits, self.block = source.format.bits, block_size_of(source.format, self.k)
        weight = weight_of(source)
        parts = to_matmul_nbits(weight) if contrib_ops else to_dequantize_linear(weight)
        for name, tensor in zip(("codes", "scales", "zeros"), parts, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("row_scale", source.scale.reshape(-1).float() if self.is_dual else None)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, K] float32, for owners that read it themselves: a constant of the file."""
        found: Tensor = self._source.weight
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] float32 -> [.., N]."""
        if self.hadamard is not None:
            x = self.hadamard(x)
        if self.is_int8:
            out = ops.int8_linear(x, self.codes, self.scale, self.sums, self.bias, self.act.per == "row")
        elif self.is_dual:
            weight = (self.codes, self.scales, self.zeros, self.bias, self.k, self.bits, self.block)
            out = ops.dual_linear(x, *weight, self.row_scale, self.act.per == "row")
        else:
            quantized = x if self.act is None else self._fake_quantize(x)
            weight = (self.codes, self.scales, self.zeros, self.bias)
            if self.contrib_ops:
                out = ops.nbits_linear(quantized, *weight, self.k, self.bits, self.block)
            else:
                out = ops.blocked_linear(quantized, *weight, self.bits, self.block)
        low_rank = x
        for factor in self.factors:
            low_rank = nn.functional.linear(low_rank, factor)
        return out + low_rank if len(self.factors) else out

    def _fake_quantize(self, x: Tensor) -> Tensor:
        """x quantized dynamically to the activation format and dequantized, in ONNX's own operators."""
        axes = -1 if self.act.per == "row" else tuple(range(x.ndim))
        low = None if self.act.zero == "none" else x.amin(axes, keepdim=True).clamp_max(0)
        span = x.abs().amax(axes, keepdim=True) if low is None else x.amax(axes, keepdim=True).clamp_min(0) - low
        scale = span / self.act.qmax
        scale = torch.where(scale > _TINY, scale, torch.ones_like(scale))
        codes, qmin, qmax = (x / scale).round(), self.act.qmin, self.act.qmax
        if low is None:
            return codes.clamp(qmin, qmax) * scale
        zero = (-low / scale).round()
        return ((codes + zero).clamp(qmin, qmax) - zero) * scale


class StaticRounding(nn.Module):
    """Rounds x to the static grid of a linear's activations."""

    act_scale: Tensor

    def __init__(self, source: StaticQuantLinear) -> None:
        super().__init__()
        self.low, self.high = source.low, source.high
        self.register_buffer("act_scale", source.act_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., K]."""
        return round_to_codes(x, self.act_scale, self.low, self.high) * self.act_scale


class RotatedOnnxLinear(nn.Sequential):
    """What a RotatedLinear computes."""

    _source: RotatedLinear

    def __init__(self, source: RotatedLinear) -> None:
        super().__init__(HadamardTransform(source.signs), source.inner)
        object.__setattr__(self, "_source", source)

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] of x, for owners that read it themselves."""
        found: Tensor = self._source.weight
        return found


class HadamardTransform(nn.Module):
    """x diag(signs) H / sqrt(n) as small matrix products: H is a Kronecker product."""

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        n = signs.numel()
        k, m = hadamard_factors(n) or (1, 0)
        self.sizes = [k, 2 ** (m // 2), 2 ** (m - m // 2)]
        self.register_buffer("signs", signs.float() * n**-0.5)
        for index, size in enumerate(self.sizes):
            self.register_buffer(f"h{index}", hadamard_matrix(size).float())

    def forward(self, x: Tensor) -> Tensor:
        """x [.., n] -> [.., n]."""
        k, a, b = self.sizes
        lead = x.shape[:-1]
        y = (x * self.signs).reshape(-1, k, a, b) @ self.h2
        y = self.h1.t() @ y  # the factors of two are symmetric; the transpose keeps the law explicit
        y = self.h0.t() @ y.reshape(-1, k, a * b)
        return y.reshape(*lead, k * a * b)
