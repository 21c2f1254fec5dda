"""The kernels as operators of torch: functional, with fake and CPU versions, whatever launches behind them.

On CUDA they run Triton kernels on the current stream, allocate their results themselves and keep nothing between calls,
so that Inductor and CUDA graphs may put them anywhere. On a CPU they are their own definition in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.spec import RowQuant, parse
from qcompile.codegen.triton.kernels.weight_layout import layout_of, unpack_weight
from qcompile.codegen.triton.launch.gemm import Epilogue, PackedWeight
from qcompile.codegen.triton.launch.gemm import linear_a8 as run_a8
from qcompile.codegen.triton.launch.gemm import linear_w as run_w
from qcompile.codegen.triton.launch.row_quant import row_quant as run_rows
from qcompile.numerics.bit_packing import pack
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard
from qcompile.numerics.qtensor import expand_groups


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()


def _epilogue(bias: Tensor | None, residual: Tensor | None, low: Tensor | None, up: Tensor | None) -> Epilogue:
    return Epilogue(bias, _rows(residual), _rows(low), None if up is None else up.contiguous())


def _added(out: Tensor, bias: Tensor | None, residual: Tensor | None, low: Tensor | None, up: Tensor | None) -> Tensor:
    if low is not None and up is not None:
        out = out + low.to(out.dtype) @ up.to(out.dtype).t()
    for tensor in (bias, residual):
        out = out if tensor is None else out + tensor.to(out.dtype)
    return out


# -- a weight in codes, x in numbers -----------------------------------------------------------------


@torch.library.custom_op("qcompile_triton::linear_w", mutates_args=(), device_types="cuda")
def linear_w(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> Tensor:  # fmt: skip
    """x W^T [+ low up^T] [+ bias] [+ residual], rounded once.

    Args:
        x: [.., K] bf16 or fp16. packed, scale, zero: of W [N, K], as pack_weights.py makes them.
        bias: [N]. residual: [.., N]. low: [.., R]. up: [N, R]. format: of the codes. columns: K.
    """
    layout, rows = layout_of(Format.parse(format)), _rows(x)
    assert layout is not None and rows is not None
    out = run_w(rows, PackedWeight(packed, scale, zero, layout, columns), _epilogue(bias, residual, low, up))
    return out.reshape(*x.shape[:-1], len(packed))


@linear_w.register_kernel("cpu")
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> Tensor:  # fmt: skip
    form = Format.parse(format)
    layout = layout_of(form)
    assert layout is not None
    codes = unpack_weight(packed, layout, columns).float()
    points = 2.0 ** (form.bits - 1) if zero is None else expand_groups(zero.t().float(), form, columns)
    weight = (codes - points) * expand_groups(scale.t(), form, columns)
    return _added(x.float() @ weight.t(), bias, residual, low, up).to(x.dtype)


@linear_w.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> Tensor:  # fmt: skip
    torch._check(x.shape[-1] == columns)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


# -- both in codes -----------------------------------------------------------------------------------


@torch.library.custom_op("qcompile_triton::linear_a8", mutates_args=(), device_types="cuda")
def linear_a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(x W^T) x_scale scale [+ low up^T] [+ bias] [+ residual], rounded once; sums in int32, or float32 for fp8.

    Args:
        x: [.., K] int8 or fp8 codes. x_scale: [.., 1], or one number. weight: [N, K] alike. scale: [N, 1].
        bias, residual, low, up: as linear_w. dtype: of the result.
    """
    rows, steps = _rows(x), x_scale.reshape(-1).contiguous()
    assert rows is not None
    out = run_a8(rows, steps, weight, scale, _epilogue(bias, residual, low, up), dtype)
    return out.reshape(*x.shape[:-1], len(weight))


@linear_a8.register_kernel("cpu")
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    sums = (x.double() @ weight.double().t()).float()  # exact, as int32 is
    return _added(sums * x_scale * scale.reshape(-1), bias, residual, low, up).to(dtype)


@linear_a8.register_fake
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


# -- rows to codes -----------------------------------------------------------------------------------


def _spec(spec: str) -> RowQuant:
    found = parse(spec)
    assert isinstance(found, RowQuant)
    return found


@torch.library.custom_op("qcompile_triton::row_quant", mutates_args=(), device_types="cuda")
def row_quant(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes, scales [.., groups], x + residual, and the value of norm or gate, of the rows of x [.., K].

    See spec.RowQuant. What it does not write is empty.
    """
    tensors = dict(residual=_rows(residual), gate=_rows(gate), gain=gain, shift=shift, smooth=smooth, signs=signs)
    rows = _rows(x)
    assert rows is not None
    found = run_rows(_spec(spec), rows, eps, **{name: t for name, t in tensors.items() if t is not None})
    lead = x.shape[:-1]
    codes, scale = (found[name].reshape(*lead, found[name].shape[1]) for name in ("codes", "scale"))
    total, value = (found[n].reshape(x.shape) if n in found else x.new_empty(0) for n in ("total", "value"))
    return codes, scale, total, value


@row_quant.register_kernel("cpu")
def _(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    how, k = _spec(spec), x.shape[-1]
    total = x.new_empty(0)
    if residual is not None:
        x = total = (x.float() + residual.float()).to(x.dtype)
    v = x.float()
    if how.first == "rms":
        assert gain is not None
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * gain.float()
    elif how.first == "layer":
        assert gain is not None and shift is not None
        v = torch.nn.functional.layer_norm(v, (k,), gain.float(), shift.float(), eps)
    elif how.first == "gate":
        assert gate is not None
        v = torch.nn.functional.silu(v) * gate.float()
    value = v.to(x.dtype, copy=True) if how.value else x.new_empty(0)
    v = v if smooth is None else v / smooth
    v = v if signs is None else apply_hadamard(v, signs)
    width = how.group or k
    groups = torch.nn.functional.pad(v, (0, -k % width)).unflatten(-1, (-1, width))
    max_value = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[how.codes]
    step = groups.abs().amax(-1, keepdim=True) / max_value
    step = torch.where(step > 1e-30, step, torch.ones_like(step))
    units = (groups / step).flatten(-2)[..., :k]
    if how.codes == "fp8":
        codes = units.clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = units.round().clamp(-max_value - 1, max_value).to(torch.int8)
        codes = pack(codes + 8, 4) if how.codes == "int4" else codes
    return codes.clone(), step.squeeze(-1).clone(), total, value


@row_quant.register_fake
def _(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, eps: float, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    how, k = _spec(spec), x.shape[-1]
    kind = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[how.codes]
    codes = x.new_empty((*x.shape[:-1], k // 2 if how.codes == "int4" else k), dtype=kind)
    groups = -(-k // how.group) if how.group else 1
    scale = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    total, value = (x.new_empty(x.shape if there else 0) for there in (how.residual, how.value))
    return codes, scale, total, value
