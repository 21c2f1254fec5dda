"""ONNX Runtime's operators as torch operators: what an exported graph is made of, with its meaning.

Each has a reference in plain torch, which is what the rewritten graph computes before it is translated
(translate.py gives the ONNX nodes). Attentions are in attention_ops.py.

    nbits_linear      MatMulNBits: codes in blocks of one scale and zero point
    int8_linear       codes of x in steps of a row or of all, with or without zero points, MatMulInteger, scales
    rms_norm          SimplifiedLayerNormalization, and with a residual SkipSimplifiedLayerNormalization
    skip_layer_norm   SkipLayerNormalization: of the sum of two values and a bias
    gelu, gate        Gelu, BiasGelu and FastGelu; QuickGelu
    gather_nbits      GatherBlockQuantized: rows of a table that MatMulNBits may read too
    blocked_linear    DequantizeLinear in blocks and MatMul: operators of the standard
    experts_linear    for each expert Slice and MatMul of its rows, Concat; experts_nbits and experts_blocked by codes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import qcompile.ir.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.numerics.bit_packing import unpack
from qcompile.numerics.format import Format


@torch.library.custom_op("qcompile_onnx::nbits_linear", mutates_args=())
def nbits_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, k: int, bits: int, block: int
) -> Tensor:
    """x [.., K] @ dq(codes [N, blocks, block bits / 8]).T + bias [N].

    scales: [N, blocks] float32. zeros: uint8 [N, ceil(blocks bits / 8)] packed, or float32 [N, blocks]; None is
    the middle of the codes, 2^(bits - 1).
    """
    weight = blocks_to_numbers(codes, scales, zeros, bits, block)[:, :k]
    return torch.nn.functional.linear(x, weight, bias)


@nbits_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def blocks_to_numbers(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int) -> Tensor:
    """The weight [N, blocks * block] behind packed blocks."""
    n, blocks = scales.shape
    levels = unpack(codes.reshape(n, -1), bits, blocks * block).reshape(n, blocks, block).float()
    if zeros is None:
        z = torch.full_like(scales, 2 ** (bits - 1))
    else:
        z = zeros if zeros.is_floating_point() else unpack(zeros, bits, blocks).float()
    return ((levels - z[..., None]) * scales[..., None]).reshape(n, -1)


@torch.library.custom_op("qcompile_onnx::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, sums: Tensor | None, bias: Tensor | None, per_row: bool
) -> Tensor:
    """Codes of x @ weight, times their step and scale [N], plus bias; a step of a row or of all x.

    weight: int8 [K, N]; in a portable file uint8, the same moved by 128 (matmul_integer.py says why).
    sums: [N], scale times the sums of the weight over K, if x has zero points; None: it has none. The file corrects
        for zero points with these numbers; here only whether they are given counts, so that one checks the other.
    """
    form = Format("int8", "row" if per_row else "tensor", zero="none" if sums is None else "int")
    codes, step, zero = torch.ops.qcompile.quantize(x, str(form))
    whole = codes.double() if sums is None else codes.double() - zero
    numbers = weight.double() - 128 * (weight.dtype == torch.uint8)
    out = (whole @ numbers).float() * step * scale  # float64 sums of int8 products are exact
    return out if bias is None else out + bias


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("qcompile_onnx::dual_linear", mutates_args=())
def dual_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, k: int, bits: int, block: int,
    row: Tensor, per_row: bool,
) -> Tensor:  # fmt: skip
    """The int8 product with a dual-grained weight: row [N] its scales, scales / row its integer group scales.

    Other arguments as of nbits_linear, which multiplies the same weight by activations that are not rounded.
    """
    units = blocks_to_numbers(codes, (scales / row[:, None]).round(), zeros, bits, block)[:, :k]
    return int8_linear(x, units.to(torch.int8).t(), row, None, bias, per_row)


@dual_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qcompile_onnx::blocked_linear", mutates_args=())
def blocked_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    """x [.., K] @ dq(codes) + bias, of a weight [K, N] in blocks of rows: the layout of DequantizeLinear.

    codes, zeros: uint8, the packed stream of [K, N] and of [blocks, N]. scales: [blocks, N] float32.
    """
    k, (blocks, n) = x.shape[-1], scales.shape
    levels = unpack(codes, bits, k * n).reshape(k, n).float()
    z = unpack(zeros, bits, blocks * n).reshape(blocks, n).float()
    weight = (levels - z.repeat_interleave(block, 0)[:k]) * scales.repeat_interleave(block, 0)[:k]
    return torch.nn.functional.linear(x, weight.t(), bias)


@blocked_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@torch.library.custom_op("qcompile_onnx::rms_norm", mutates_args=())
def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [.., K] / sqrt(mean x^2 + eps) * gain [K]."""
    return torch.nn.functional.rms_norm(x, gain.shape, gain, eps)


@rms_norm.register_fake
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::skip_rms_norm", mutates_args=())
def skip_rms_norm(x: Tensor, skip: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + skip, and x + skip."""
    total = x + skip
    return torch.nn.functional.rms_norm(total, gain.shape, gain, eps), total


@skip_rms_norm.register_fake
def _(x: Tensor, skip: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::skip_layer_norm", mutates_args=())
def skip_layer_norm(
    x: Tensor, skip: Tensor, gain: Tensor, shift: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm (gain, shift [K]) of x + skip + bias [K], and that sum."""
    total = x + skip if bias is None else x + skip + bias
    return torch.nn.functional.layer_norm(total, gain.shape, gain, shift, eps), total


@skip_layer_norm.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::gelu", mutates_args=())
def gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU of x + bias [K]; approximate: "none" (erf) or "tanh"."""
    return torch.nn.functional.gelu(x if bias is None else x + bias, approximate=approximate)


@gelu.register_fake
def _(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::gate", mutates_args=())
def gate(x: Tensor, slope: float) -> Tensor:
    """x sigmoid(slope x)."""
    return x * torch.sigmoid(slope * x)


@gate.register_fake
def _(x: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qcompile_onnx::gather_nbits", mutates_args=())
def gather_nbits(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, bits: int, block: int
) -> Tensor:
    """Rows `ids` of a table [N, K] in blocks (see nbits_linear): [.., K]."""
    rows = ids.flatten()
    numbers = blocks_to_numbers(codes[rows], scales[rows], None if zeros is None else zeros[rows], bits, block)[:, :k]
    return numbers.reshape(*ids.shape, k)


@gather_nbits.register_fake
def _(ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, *_: int) -> Tensor:
    return scales.new_empty((*ids.shape, k))


@torch.library.custom_op("qcompile_onnx::experts_linear", mutates_args=())
def experts_linear(x: Tensor, ends: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Rows x [T, K] sorted by expert, those of expert e up to ends[e], times weights[e] [K, N]: [T, N].

    The last end is T: every row has its expert. (With the experts shared out over devices rows may have none.)
    """
    return torch.cat([rows @ weight for rows, weight in zip(_of_experts(x, ends), weights, strict=True)])


@experts_linear.register_fake
def _(x: Tensor, ends: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty((x.shape[0], weights[0].shape[1]))


@torch.library.custom_op("qcompile_onnx::experts_nbits", mutates_args=())
def experts_nbits(
    x: Tensor, ends: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor],
    k: int, bits: int, block: int,
) -> Tensor:  # fmt: skip
    """The same with weights in codes, each as of nbits_linear; zeros: one for each expert, or none."""
    products = []
    for e, rows in enumerate(_of_experts(x, ends)):
        weight = blocks_to_numbers(codes[e], scales[e], zeros[e] if zeros else None, bits, block)[:, :k]
        products.append(rows @ weight.t())
    return torch.cat(products)


@experts_nbits.register_fake
def _(x: Tensor, ends: Tensor, codes: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty((x.shape[0], codes[0].shape[0]))


@torch.library.custom_op("qcompile_onnx::experts_blocked", mutates_args=())
def experts_blocked(
    x: Tensor, ends: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor], k: int,
    bits: int, block: int,
) -> Tensor:  # fmt: skip
    """The same with weights in codes, each as of blocked_linear."""
    products = [
        blocked_linear(rows, codes[e], scales[e], zeros[e], None, bits, block)
        for e, rows in enumerate(_of_experts(x, ends))
    ]
    return torch.cat(products)


@experts_blocked.register_fake
def _(x: Tensor, ends: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty((x.shape[0], scales[0].shape[1]))


def _of_experts(x: Tensor, ends: Tensor) -> list[Tensor]:
    """The rows of each expert."""
    last = ends.tolist()
    return [x[start:end] for start, end in zip([0, *last], last, strict=False)]
