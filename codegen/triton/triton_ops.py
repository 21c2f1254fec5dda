"""The kernels as operators of torch: functional, with fake and CPU versions, whatever launches behind them.

On CUDA they run Triton kernels on the current stream, allocate their results themselves and keep nothing between calls,
so that Inductor and CUDA graphs may put them anywhere. On a CPU they are their own definition in plain torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.weight_layout import unpack_weight
from qcompile.codegen.triton.launch.gemm import Epilogue, PackedWeight
from qcompile.codegen.triton.launch.gemm import linear_a8 as launch_linear_a8
from qcompile.codegen.triton.launch.gemm import linear_w as launch_linear_w
from qcompile.codegen.triton.launch.row_quant import row_quant as launch_row_quant
from qcompile.codegen.triton.triton_op_checks import check_linear_a8, check_linear_w, check_row_quant
from qcompile.numerics.bit_packing import pack
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard
from qcompile.numerics.qtensor import expand_groups


def _as_matrix(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _epilogue(bias: Tensor | None, residual: Tensor | None, low: Tensor | None, up: Tensor | None) -> Epilogue:
    bias, up = (None if of_rows is None else of_rows.contiguous() for of_rows in (bias, up))
    return Epilogue(bias, _as_matrix(residual), _as_matrix(low), up)


def _add_epilogue(
    out: Tensor, bias: Tensor | None, residual: Tensor | None, low: Tensor | None, up: Tensor | None
) -> Tensor:
    if low is not None and up is not None:
        out = out + low.to(out.dtype) @ up.to(out.dtype).t()
    for tensor in (bias, residual):
        out = out if tensor is None else out + tensor.to(out.dtype)
    return out


# -- x float, weight quantized -----------------------------------------------------------------------


@torch.library.custom_op("qcompile_triton::linear_w", mutates_args=(), device_types="cuda")
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
    layout, matrix = check_linear_w(x, packed, scale, zero, bias, residual, low, up, format, columns), _as_matrix(x)
    assert matrix is not None
    points = None if zero is None else zero.contiguous()
    weight = PackedWeight(packed.contiguous(), scale.contiguous(), points, layout, columns)
    out = launch_linear_w(matrix, weight, _epilogue(bias, residual, low, up))
    return out.reshape(*x.shape[:-1], len(packed))


@linear_w.register_kernel("cpu")
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> Tensor:  # fmt: skip
    layout = check_linear_w(x, packed, scale, zero, bias, residual, low, up, format, columns)
    form = Format.parse(format)
    codes = unpack_weight(packed, layout, columns).float()
    points = 2.0 ** (form.bits - 1) if zero is None else expand_groups(zero.t().float(), form, columns)
    weight = (codes - points) * expand_groups(scale.t(), form, columns)
    return _add_epilogue(x.float() @ weight.t(), bias, residual, low, up).to(x.dtype)


@linear_w.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> Tensor:  # fmt: skip
    check_linear_w(x, packed, scale, zero, bias, residual, low, up, format, columns)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


# -- both quantized ----------------------------------------------------------------------------------


@torch.library.custom_op("qcompile_triton::linear_a8", mutates_args=(), device_types="cuda")
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
    check_linear_a8(x, x_scale, weight, scale, bias, residual, low, up, dtype)
    matrix, scales = _as_matrix(x), x_scale.reshape(-1).contiguous()
    assert matrix is not None
    weight, scale = weight.contiguous(), scale.contiguous()
    out = launch_linear_a8(matrix, scales, weight, scale, _epilogue(bias, residual, low, up), dtype)
    return out.reshape(*x.shape[:-1], len(weight))


@linear_a8.register_kernel("cpu")
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_linear_a8(x, x_scale, weight, scale, bias, residual, low, up, dtype)
    sums = (x.double() @ weight.double().t()).float()  # exact, as int32 is
    return _add_epilogue(sums * x_scale * scale.reshape(-1), bias, residual, low, up).to(dtype)


@linear_a8.register_fake
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_linear_a8(x, x_scale, weight, scale, bias, residual, low, up, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


# -- quantizing activations --------------------------------------------------------------------------


@torch.library.custom_op("qcompile_triton::row_quant", mutates_args=(), device_types="cuda")
def row_quant(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Quantize the rows of x [.., K]: see spec.RowQuant.

    Returns:
        Codes [.., K], scales [.., groups], x + residual [.., K], and the value of norm or gate [.., K]; what the spec
        does not write is empty.
    """
    fields = check_row_quant(x, residual, gate, gain, shift, smooth, signs, spec)
    tensors = dict(
        residual=_as_matrix(residual), gate=_as_matrix(gate), gain=gain, shift=shift, smooth=smooth, signs=signs
    )
    matrix = _as_matrix(x)
    assert matrix is not None
    results = launch_row_quant(
        fields, matrix, eps, **{name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    )
    lead = x.shape[:-1]
    codes, scale = (results[name].reshape(*lead, results[name].shape[1]) for name in ("codes", "scale"))
    total, value = (results[n].reshape(x.shape) if n in results else x.new_empty(0) for n in ("total", "value"))
    return codes, scale, total, value


@row_quant.register_kernel("cpu")
def _(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    fields, k = check_row_quant(x, residual, gate, gain, shift, smooth, signs, spec), x.shape[-1]
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
    scale = groups.abs().amax(-1, keepdim=True) / max_value
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    scaled = (groups / scale).flatten(-2)[..., :k]
    if fields.codes == "fp8":
        codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = scaled.round().clamp(-max_value - 1, max_value).to(torch.int8)
        codes = pack(codes + 8, 4) if fields.codes == "int4" else codes
    return codes.clone(), scale.squeeze(-1).clone(), total, value


@row_quant.register_fake
def _(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    fields, k = check_row_quant(x, residual, gate, gain, shift, smooth, signs, spec), x.shape[-1]
    code_dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[fields.codes]
    codes = x.new_empty((*x.shape[:-1], k // 2 if fields.codes == "int4" else k), dtype=code_dtype)
    groups = -(-k // fields.group) if fields.group else 1
    scale = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    total, value = (x.new_empty(x.shape if written else 0) for written in (fields.residual, fields.value))
    return codes, scale, total, value
