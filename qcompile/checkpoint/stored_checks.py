"""What a format demands of the tensors that a checkpoint stores: dtypes, shapes, and the range of every value.

A digest says that a file is the one that was written; these checks say that it can be computed with, whoever wrote it.
On the meta device, where tensors have no values yet, only dtypes and shapes are checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.numerics.bit_packing import packed_columns
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import MIN_EXPONENT
from qcompile.numerics.hadamard import hadamard_factors
from qcompile.numerics.k_quants import MAX_MULTIPLIER
from qcompile.numerics.qparams import MAX_INT8
from qcompile.numerics.qtensor import group_columns, unpack_codes
from qcompile.numerics.two_level import MAX_GROUP_SCALE

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ROWS = 256  # of a two-level weight that are unpacked at a time

Spec = tuple[Sequence[int], tuple[torch.dtype, ...]]
"""The shape that a tensor must have, and the dtypes that it may have."""


def refuse(name: str, reason: str) -> None:
    """Raise a CheckpointError about one tensor."""
    raise CheckpointError(f"{name!r} {reason}. Fix: save the model again, or restore the file from a copy")


def require(name: str, tensor: Tensor, spec: Spec) -> None:
    """Check the shape and the dtype of a tensor.

    Raises:
        CheckpointError: another shape or dtype.
    """
    shape, dtypes = spec
    if list(tensor.shape) != list(shape) or tensor.dtype not in dtypes:
        demanded = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        refuse(name, f"is {found}, but must be {demanded} {list(shape)}")


def stored_specs(format: Format, lead: Sequence[int], columns: int) -> dict[str, Spec]:
    """The specs of the stored parts of a QTensor.

    Args:
        format: the format.
        lead: the sizes of the weight before K: [N], or [E, N].
        columns: K.
    """
    groups = format.groups(columns)
    shape = () if format.per == "tensor" else (*lead, groups)
    code_dtype = torch.uint8 if format.bits < 8 else format.code_dtype
    specs: dict[str, Spec] = {
        "codes": ((*lead, packed_columns(columns, format.bits)), (code_dtype,)),
        "scale": (shape if format.per == "tensor" else (*lead, format.stored_scales(columns)), (format.scale_dtype,)),
    }
    if format.zero != "none":
        specs["zero"] = shape, (format.zero_dtype,)
    if format.two_level:
        specs["group_scale"] = shape, (torch.int8,)
    return specs


def check_stored(path: str, parts: Mapping[str, Tensor], format: Format, lead: Sequence[int], columns: int) -> None:
    """Check the stored parts of a quantized weight: shapes, dtypes and values.

    Args:
        path: the attribute path of the module, for messages.
        parts: those that it has of codes, scale, zero, group_scale.
        format: the format.
        lead: the sizes of the weight before K.
        columns: K.

    Raises:
        CheckpointError: a part is missing, too many, misshapen or out of range.
    """
    specs = stored_specs(format, lead, columns)
    if parts.keys() != specs.keys():
        raise CheckpointError(
            f"{path!r} has {sorted(parts)}, but {format} is stored as {sorted(specs)}. Fix: save the model again"
        )
    for name, spec in specs.items():
        require(f"{path}.{name}", parts[name], spec)
    if parts["codes"].is_meta:
        return
    if format.zero == "none" and not format.is_float and format.bits < 8 and not format.two_level:
        check_positive(f"{path}.scale", parts["scale"].abs())  # negative ones use the extra code below zero
    elif format.k6:
        _check_blocks(path, parts)
    else:
        check_positive(f"{path}.scale", parts["scale"])
    _check_zero(f"{path}.zero", parts.get("zero"), format)
    _check_codes(f"{path}.codes", parts["codes"], format, columns)
    if format.two_level and not format.k6:
        _check_group_scale(f"{path}.group_scale", parts["group_scale"], format)
    if format.dual:
        _check_products(path, parts, format, columns)


def check_positive(name: str, scale: Tensor) -> None:
    """Check that a scale is finite and positive.

    Raises:
        CheckpointError: it is not.
    """
    if not scale.is_meta and not bool(((scale > 0) & torch.isfinite(scale)).all()):
        refuse(name, "holds scales that are not finite and positive")


def check_no_nan(name: str, tensor: Tensor) -> None:
    """Check that a tensor of floats holds no NaN.

    Raises:
        CheckpointError: it does.
    """
    if not tensor.is_meta and tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
        refuse(name, "holds NaN")


def check_signs(name: str, signs: Tensor, size: int) -> None:
    """Check the signs of an online Hadamard transform of `size` channels.

    Raises:
        CheckpointError: another size or dtype, no signs, or a size that has no transform.
    """
    require(name, signs, ((size,), FLOATS))
    if not signs.is_meta and not bool((signs.abs() == 1).all()):
        refuse(name, "holds signs that are not 1 or -1")
    if hadamard_factors(size) is None:
        refuse(name, f"has {size} signs: of that size no Hadamard matrix is known")


def _check_blocks(path: str, parts: Mapping[str, Tensor]) -> None:
    """Ranges of k6: d is positive, dmin not negative, sc 1 to 63, m 0 to 63."""
    d, dmin = parts["scale"][..., 0::2], parts["scale"][..., 1::2]
    check_positive(f"{path}.scale", d)
    if not bool(((dmin >= 0) & torch.isfinite(dmin)).all()):
        refuse(f"{path}.scale", "holds scales of offsets that are not finite, or negative")
    for name, low in (("group_scale", 1), ("zero", 0)):
        part = parts[name]
        if part.numel() and (int(part.min()) < low or int(part.max()) > MAX_MULTIPLIER):
            refuse(f"{path}.{name}", f"holds values that are not {low} to {MAX_MULTIPLIER}")


def _check_zero(name: str, zero: Tensor | None, format: Format) -> None:
    if zero is None:
        return
    if format.zero == "float" and not bool(torch.isfinite(zero).all()):
        refuse(name, "holds zero points that are not finite")
    if format.zero == "int" and zero.numel() and int(zero.max()) > format.qmax:
        refuse(name, f"holds the zero point {int(zero.max())}: codes end at {format.qmax}")


def _check_group_scale(name: str, group_scale: Tensor, format: Format) -> None:
    if format.powers:
        low, high = MIN_EXPONENT, 0
    elif format.zero == "int":
        low, high = 1, MAX_INT8
    else:
        low, high = -MAX_GROUP_SCALE, MAX_GROUP_SCALE
    wrong = group_scale[(group_scale < low) | (group_scale > high) | ((group_scale == 0) & format.dual)]
    if wrong.numel():
        refuse(name, f"holds {int(wrong[0])}: group scales of {format} are {low} to {high}" + ", not 0" * format.dual)


def _check_codes(name: str, codes: Tensor, format: Format, columns: int) -> None:
    """Values that are no code: NaN of fp8, and bits behind the last code of a row."""
    if format.dtype == "fp8" and bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any()):
        refuse(name, "holds NaN, which is no code of fp8")
    used = columns * format.bits % 8
    if format.bits < 8 and used and bool((codes[..., -1] >> used).any()):
        refuse(name, f"has bits behind the {columns} codes of a row")


def _check_products(path: str, parts: Mapping[str, Tensor], format: Format, columns: int) -> None:
    """s1 (q - z) of two-level formats must be int8: kernels sum such products and do not check."""
    codes, group_scale = (parts[name].flatten(0, -2) for name in ("codes", "group_scale"))
    zero = parts["zero"].flatten(0, -2) if "zero" in parts else None
    for first in range(0, len(codes), _ROWS):
        rows = slice(first, first + _ROWS)
        values = group_columns(unpack_codes(codes[rows], format, columns).to(torch.int16), format)
        if zero is not None:
            values = values - zero[rows].to(torch.int16)[..., None]
        if format.zero == "int" and columns % format.group:  # what pads a ragged group is no code
            values[..., -1, columns % format.group :] = 0
        if int((values * group_scale[rows].to(torch.int16)[..., None]).abs().max()) > MAX_INT8:
            refuse(f"{path}.codes", f"times their group scales leave int8, which {format} does not allow")
