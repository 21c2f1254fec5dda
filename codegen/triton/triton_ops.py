"""The kernels as operators of torch: functional, with fake and CPU versions, whatever launches behind them.

On CUDA they run Triton kernels on the current stream, allocate their results themselves and keep nothing between calls,
so that Inductor and CUDA graphs may put them anywhere. On a CPU they are their own definition in plain torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.codegen.triton.decided_calls import decided, dense, on_device
from qcompile.codegen.triton.define_op import TritonOp
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout, split_scales, unpack_weight
from qcompile.codegen.triton.launch.gemm import Epilogue, PackedWeight, plan_linear_a8, plan_linear_w
from qcompile.codegen.triton.launch.gemm import linear_w as launch_linear_w
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan
from qcompile.codegen.triton.launch.row_quant import RowQuantPlan, plan_row_quant, row_stride
from qcompile.codegen.triton.triton_op_checks import check_linear_a8, check_linear_w, check_row_quant
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard
from qcompile.numerics.qtensor import expand_groups


def as_matrix(x: Tensor) -> Tensor:
    """[.., K] -> [M, K], contiguous."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def epilogue_of(bias: Tensor | None, residual: Tensor | None, low: Tensor | None, up: Tensor | None) -> Epilogue:
    """The epilogue of a kernel from the arguments of an operator."""
    bias, up = (None if of_rows is None else of_rows.contiguous() for of_rows in (bias, up))
    residual, low = (None if of_x is None else as_matrix(of_x) for of_x in (residual, low))
    return Epilogue(bias, residual, low, up)


def add_epilogue(
    out: Tensor, bias: Tensor | None, residual: Tensor | None, low: Tensor | None, up: Tensor | None
) -> Tensor:
    """What the epilogue of a kernel computes, in plain torch."""
    if low is not None and up is not None:
        out = out + low.to(out.dtype) @ up.to(out.dtype).t()
    for tensor in (bias, residual):
        out = out if tensor is None else out + tensor.to(out.dtype)
    return out


# -- x float, weight quantized -----------------------------------------------------------------------


@TritonOp
def linear_w(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> Tensor:  # fmt: skip
    """x W^T [+ low up^T] [+ bias] [+ residual], rounded once.

    Args:
        x: [.., K] bf16 or fp16.
        packed: of W [N, K], as pack_weights.py makes it.
        scale: of W, as pack_weights.py makes it.
        zero: of W, as pack_weights.py makes it.
        bias: [N].
        residual: [.., N].
        low: [.., R].
        up: [N, R].
        format: of the codes.
        columns: K.

    Returns:
        [.., N] in x's dtype.
    """

    def decide() -> tuple[GemmPlan | None, int, int]:
        weight = PackedWeight(packed, scale, zero, checked(), columns)
        m, n = math.prod(x.shape[:-1]), packed.shape[0]
        return plan_linear_w(x, m, weight, epilogue_of(bias, residual, low, up)), m, n

    def checked() -> WeightLayout:
        return check_linear_w(x, packed, scale, zero, bias, residual, low, up, format, columns)

    tensors = dense(x, packed, scale, zero, bias, residual, low, up)
    plan, m, n = decided(tensors, ("linear_w", format, columns), decide)
    if plan is not None:
        with on_device(x):
            return plan.run((*tensors, None, None), x.new_empty(*x.shape[:-1], n), m, n)
    points = None if zero is None else zero.contiguous()
    weight = PackedWeight(packed.contiguous(), scale.contiguous(), points, checked(), columns)
    out = launch_linear_w(as_matrix(x), weight, epilogue_of(bias, residual, low, up))
    return out.view(*x.shape[:-1], n)


@linear_w.on_cpu
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> Tensor:  # fmt: skip
    layout = check_linear_w(x, packed, scale, zero, bias, residual, low, up, format, columns)
    form = Format.parse(format)
    codes = unpack_weight(packed, layout, columns).float()
    if not scale.is_floating_point():
        scale, zero = split_scales(scale)
    points = 2.0 ** (form.bits - 1) if zero is None else expand_groups(zero.t().float(), form, columns)
    weight = (codes - points) * expand_groups(scale.t(), form, columns)
    return add_epilogue(x.float() @ weight.t(), bias, residual, low, up).to(x.dtype)


@linear_w.on_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> Tensor:  # fmt: skip
    check_linear_w(x, packed, scale, zero, bias, residual, low, up, format, columns)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


# -- both quantized ----------------------------------------------------------------------------------


@TritonOp
def linear_a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(x W^T) x_scale scale [+ low up^T] [+ bias] [+ residual], rounded once; sums in int32, or float32 for fp8.

    Args:
        x: [.., K] int8 or fp8 codes.
        x_scale: per token [.., 1], or one value per tensor.
        weight: [N, K] codes of x's dtype.
        scale: per channel [N, 1].
        bias: as in linear_w.
        residual: as in linear_w.
        low: as in linear_w.
        up: as in linear_w.
        dtype: of the result.

    Returns:
        [.., N].
    """

    def decide() -> tuple[GemmPlan | None, int, int]:
        check_linear_a8(x, x_scale, weight, scale, bias, residual, low, up, dtype)
        m, n = math.prod(x.shape[:-1]), weight.shape[0]
        return plan_linear_a8(x, m, x_scale, n, epilogue_of(bias, residual, low, up), dtype), m, n

    tensors = dense(x, weight, scale, None, bias, residual, low, up, x_scale)
    plan, m, n = decided(tensors, ("linear_a8", dtype), decide)
    out = x.new_empty(*x.shape[:-1], n, dtype=dtype)
    if plan is None:
        return out
    with on_device(x):
        return plan.run((*tensors, None), out, m, n)


@linear_a8.on_cpu
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_linear_a8(x, x_scale, weight, scale, bias, residual, low, up, dtype)
    sums = (x.double() @ weight.double().t()).float()  # exact, as int32 is
    return add_epilogue(sums * x_scale * scale.reshape(-1), bias, residual, low, up).to(dtype)


@linear_a8.on_fake
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_linear_a8(x, x_scale, weight, scale, bias, residual, low, up, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


# -- quantizing activations --------------------------------------------------------------------------


@TritonOp
def row_quant(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, left: Tensor | None, right: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Quantize the rows of x [.., K]: see spec.RowQuant.

    Returns:
        Codes [.., K], scales [.., groups], x + residual [.., K], and the value of norm or gate [.., K]; what the spec
        does not write is empty.
    """

    def decide() -> RowQuantPlan:
        fields = check_row_quant(x, residual, gate, gain, shift, smooth, signs, left, right, spec)
        return plan_row_quant(fields, math.prod(x.shape[:-1]), x.shape[-1], eps, *steps)

    # Gate and up are parts of one product's rows: they are read where they are.
    steps = row_stride(x), 0 if gate is None else row_stride(gate)
    x = x if steps[0] else x.contiguous()
    gate = gate if gate is None or steps[1] else gate.contiguous()
    tensors = x, *dense(residual), gate, *dense(gain, shift, smooth, signs, left, right)
    plan = decided(tensors, ("row_quant", eps, spec, steps), decide)
    with on_device(x):
        return plan.run(tensors)


@row_quant.on_cpu
def _(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, left: Tensor | None, right: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    fields, k = check_row_quant(x, residual, gate, gain, shift, smooth, signs, left, right, spec), x.shape[-1]
    total = x.new_empty(0)
    if residual is not None:
        x = total = (x.float() + residual.float()).to(x.dtype)
    v = x.float()
    if fields.first == "rms":
        assert gain is not None
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * gain.float()
    elif fields.first == "layer":
        assert gain is not None and shift is not None
        v = torch.nn.functional.layer_norm(v, (k,), gain.float(), shift.float(), eps)
    elif fields.first == "gate":
        assert gate is not None
        v = torch.nn.functional.silu(v) * gate.float()
    value = v.to(x.dtype, copy=True) if fields.value else x.new_empty(0)
    v = v if smooth is None else v / smooth
    v = v if signs is None else apply_hadamard(v, signs)
    width = fields.group or k
    groups = torch.unflatten(torch.nn.functional.pad(v, (0, -k % width)), -1, (-1, width))
    max_value = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[fields.codes]
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low) / 15 if fields.zero else groups.abs().amax(-1, keepdim=True) / max_value
    scale = torch.where(scale <= 1e-30, torch.ones_like(scale), scale)
    scale = scale + (groups * 0.0).sum(-1, keepdim=True)  # NaN and Inf stay NaN
    scaled = groups / scale
    if fields.codes == "fp8":
        codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    elif fields.zero:
        zero = (-low / scale).round().clamp(0, 15)
        codes = ((scaled.round() + zero).clamp(0, 15) - zero).to(torch.int8)
    else:
        codes = scaled.round().clamp(-max_value - 1, max_value).to(torch.int8)
    codes = codes.flatten(-2)[..., :k]
    return codes.clone(), scale.squeeze(-1).clone(), total, value


@row_quant.on_fake
def _(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, left: Tensor | None, right: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    fields, k = check_row_quant(x, residual, gate, gain, shift, smooth, signs, left, right, spec), x.shape[-1]
    code_dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.int8}[fields.codes]
    codes = x.new_empty((*x.shape[:-1], k), dtype=code_dtype)
    groups = -(-k // fields.group) if fields.group else 1
    scale = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    total, value = (x.new_empty(x.shape if written else 0) for written in (fields.residual, fields.value))
    return codes, scale, total, value
