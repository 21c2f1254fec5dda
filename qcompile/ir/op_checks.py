"""Arguments of the dialect's operators, checked before anything is computed, by the real and the fake version alike.

A wrong argument ends in a ValueError that names the operator, the argument, its value and what is demanded. Sizes that
are symbolic while a graph is traced and cannot be compared count as right: the real operator checks them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true

from qcompile.numerics.bit_packing import packed_columns
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import hadamard_factors

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ZEROS = (torch.uint8, *FLOATS)

_is_true: Callable[[bool], bool] = guard_or_true


def describe(tensor: Tensor | None) -> str:
    """A tensor in an error message."""
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def same_size(a: int, b: int) -> bool:
    """Whether two sizes are equal, or symbolic and not known to differ."""
    return _is_true(a == b)


class OpChecks:
    """Checks of the arguments of one operator."""

    def __init__(self, op: str) -> None:
        self.op = op

    def refuse(self, argument: str, value: object, demand: str) -> NoReturn:
        """Raise a ValueError."""
        shown = describe(value) if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{self.op}: {argument} is {shown}, but must be {demand}")

    def tensor(
        self, argument: str, value: Tensor, dtypes: Sequence[torch.dtype], like: Tensor, demand: str, *sizes: int | None
    ) -> None:
        """Dtype, device and, where given, all sizes of a tensor.

        Args:
            argument: its name.
            value: the tensor.
            dtypes: the dtypes that it may have.
            like: a tensor on the device that it must be on.
            demand: what it must be.
            sizes: its shape, None for any size; no sizes for any shape.
        """
        fits = value.dtype in dtypes and (value.device == like.device or not value.ndim)
        if sizes:
            fits = fits and len(sizes) == value.ndim
            fits = fits and all(b is None or same_size(a, b) for a, b in zip(value.shape, sizes, strict=True))
        if not fits:
            self.refuse(argument, value, f"{demand} on {like.device}")

    def given(self, **tensors: Tensor | None) -> None:
        """Tensors that are not optional: torch hands an undefined one on as None."""
        for argument, tensor in tensors.items():
            if tensor is None:
                self.refuse(argument, tensor, "a tensor")

    def format(self, argument: str, text: str) -> Format:
        """A format as text."""
        try:
            return Format.parse(text)
        except ValueError as error:
            raise ValueError(f"{self.op}: {argument} is {text!r}: {error}") from None

    def float_dtype(self, argument: str, value: torch.dtype) -> None:
        """The dtype of a result."""
        if value not in FLOATS:
            self.refuse(argument, value, "float32, bfloat16, float16 or float64")

    def columns(self, value: int) -> None:
        """K."""
        if value < 0:
            self.refuse("columns", value, "K, at least 0")

    def qparams(
        self, name: str, value: Tensor, dtypes: Sequence[torch.dtype], like: Tensor, lead: Sequence[int], last: int
    ) -> None:
        """Scales, zero points or group scales of rows with the sizes `lead`, `last` of them for each.

        Leading sizes may be one or missing, for what all rows share.
        """
        shape = value.shape
        fits = len(shape) <= len(lead) + 1 and (not shape or same_size(shape[-1], last))
        for mine, size in zip(reversed(shape[:-1]), reversed(lead), strict=False):
            fits = fits and (same_size(mine, 1) or same_size(mine, size))
        demand = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {[*lead, last]}"
        self.tensor(name, value, dtypes, like, demand)
        if not fits:
            self.refuse(name, value, demand)

    def codes(
        self, prefix: str, codes: Tensor, scale: Tensor | None, zero: Tensor | None, group_scale: Tensor | None,
        form: Format, columns: int,
    ) -> None:  # fmt: skip
        """The parts of a QTensor whose codes [.., K] are checked already.

        Args:
            prefix: of the names of the arguments.
            codes: the codes, for their leading sizes and device.
            scale: the scale.
            zero: its zero point, or None.
            group_scale: its second-level scale, or None.
            form: the format.
            columns: K.
        """
        lead, groups = codes.shape[:-1], form.groups(columns)
        if scale is None:
            self.refuse(f"{prefix}scale", None, f"given with format {form}")
        if form.per == "tensor":
            if not all(same_size(size, 1) for size in scale.shape):
                self.refuse(f"{prefix}scale", scale, f"a single value for format {form}")
            self.tensor(f"{prefix}scale", scale, FLOATS, codes, "a float")
        else:
            self.qparams(f"{prefix}scale", scale, FLOATS, codes, lead, form.stored_scales(columns))
        for name, part, dtypes, present in (
            (f"{prefix}zero", zero, ZEROS, form.zero != "none"),
            (f"{prefix}group_scale", group_scale, (torch.int8,), form.two_level),
        ):
            if (part is not None) != present:
                self.refuse(name, part, f"{'given' if present else 'None'} with format {form}")
            if part is not None:
                self.qparams(name, part, dtypes, codes, lead, 1 if form.per == "tensor" else groups)

    def packed(self, argument: str, codes: Tensor, form: Format, columns: int, like: Tensor, *lead: int | None) -> None:
        """Stored codes of rows of K = `columns`; `lead` are their other sizes, None for any."""
        dtype, stored = torch.uint8 if form.bits < 8 else form.code_dtype, packed_columns(columns, form.bits)
        demand = f"{str(dtype).removeprefix('torch.')} [.., {stored}]: K = {columns} codes of {form.bits} bits"
        self.tensor(argument, codes, (dtype,), like, demand, *(lead or (None,) * (codes.ndim - 1)), stored)


def check_quantize(x: Tensor, format: str) -> Format:
    """Arguments of qcompile::quantize."""
    check = OpChecks("qcompile::quantize")
    check.given(x=x)
    form = check.format("format", format)
    check.tensor("x", x, FLOATS, x, "float [.., K]")
    if x.ndim < 1 and form.per != "tensor":
        check.refuse("x", x, f"of at least one dimension for format {form}")
    if form.two_level:
        check.refuse("format", format, "one with a single level of scales: those of an activation")
    if form.scale != "f32":
        check.refuse("format", format, "one with float32 scales: those of an activation are not stored")
    return form


def check_dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, format: str, columns: int,
    dtype: torch.dtype,
) -> Format:  # fmt: skip
    """Arguments of qcompile::dequantize."""
    check = OpChecks("qcompile::dequantize")
    check.given(codes=codes, scale=scale)
    form = check.format("format", format)
    check.columns(columns)
    check.float_dtype("dtype", dtype)
    if codes.ndim < 1 and (columns or form.per != "tensor"):
        check.refuse("codes", codes, "of at least one dimension")
    if columns:
        check.packed("codes", codes, form, columns, codes)
    else:
        check.tensor("codes", codes, (form.code_dtype,), codes, f"codes of {form}, {form.code_dtype}")
    check.codes("", codes, scale, zero, group_scale, form, columns or (codes.shape[-1] if codes.ndim else 1))
    return form


def check_hadamard(x: Tensor, signs: Tensor) -> None:
    """Arguments of qcompile::hadamard."""
    check = OpChecks("qcompile::hadamard")
    check.given(x=x, signs=signs)
    if x.dtype not in FLOATS or x.ndim < 1:
        check.refuse("x", x, "float [.., n]")
    n = x.shape[-1]
    if signs.ndim != 1 or not same_size(signs.shape[0], n):
        check.refuse("signs", signs, f"[{n}], as the rows of x")
    if isinstance(n, int) and hadamard_factors(n) is None:
        check.refuse("x", x, f"[.., n] of a size that has a known Hadamard matrix; {n} has none")


def check_qlinear(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, weight: Tensor, scale: Tensor, zero: Tensor | None,
    group_scale: Tensor | None, bias: Tensor | None, format: str, act: str, columns: int, dtype: torch.dtype,
) -> Format:  # fmt: skip
    """Arguments of qcompile::qlinear."""
    check = OpChecks("qcompile::qlinear")
    check.given(x=x, weight=weight, scale=scale)
    form = check.format("format", format)
    check.columns(columns)
    check.float_dtype("dtype", dtype)
    if x.ndim < 1 or not same_size(x.shape[-1], columns):
        check.refuse("x", x, f"[.., {columns}]: `columns` is {columns}")
    check.packed("weight", weight, form, columns, x, None)
    check.codes("", weight, scale, zero, group_scale, form, columns)
    _check_activation(check, x, x_scale, x_zero, act, columns)
    if bias is not None:
        check.tensor("bias", bias, FLOATS, x, f"float [{weight.shape[0]}]", weight.shape[0])
    return form


def _check_activation(
    check: OpChecks, x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, act: str, columns: int
) -> None:
    """The left operand of a product: float, or codes with what their format demands."""
    if not act:
        check.tensor("x", x, FLOATS, x, "float")
        for name, part in (("x_scale", x_scale), ("x_zero", x_zero)):
            if part is not None:
                check.refuse(name, part, "None where x is float (act is '')")
        return
    form = check.format("act", act)
    if form.two_level:
        check.refuse("act", act, "a format with a single level of scales")
    if form.scale != "f32":
        check.refuse("act", act, "a format with float32 scales")
    check.tensor("x", x, (form.code_dtype,), x, f"codes of {act}, {form.code_dtype}")
    check.codes("x_", x, x_scale, x_zero, None, form, columns)


def check_qexperts(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, ends: Tensor, weight: Tensor, scale: Tensor,
    zero: Tensor | None, group_scale: Tensor | None, format: str, act: str, columns: int, dtype: torch.dtype,
) -> Format:  # fmt: skip
    """Arguments of qcompile::qexperts, but the values of `ends`."""
    check = OpChecks("qcompile::qexperts")
    check.given(x=x, ends=ends, weight=weight, scale=scale)
    form = check.format("format", format)
    check.columns(columns)
    check.float_dtype("dtype", dtype)
    check.tensor("x", x, (x.dtype,), x, f"[S, {columns}]", None, columns)
    _check_activation(check, x, x_scale, x_zero, act, columns)
    for name, part in (("x_scale", x_scale), ("x_zero", x_zero)):
        if part is not None and part.ndim and (part.ndim != 2 or not same_size(part.shape[0], x.shape[0])):
            check.refuse(name, part, f"a single value, or one for each of the {x.shape[0]} rows")
    check.packed("weight", weight, form, columns, x, None, None)
    check.codes("", weight, scale, zero, group_scale, form, columns)
    for name, part in (("scale", scale), ("zero", zero), ("group_scale", group_scale)):
        if part is not None and part.ndim and (part.ndim != 3 or part.shape[0] != weight.shape[0]):
            check.refuse(name, part, f"a single value, or one for each of the {weight.shape[0]} experts")
    integers = (torch.int32, torch.int64)
    check.tensor("ends", ends, integers, x, f"int32 or int64 [{weight.shape[0]}]", weight.shape[0])
    return form


def check_ends(ends: Sequence[int], rows: int) -> None:
    """The values of qexperts' `ends`: rising, and none beyond the rows of x."""
    if any(a > b for a, b in zip((0, *ends), (*ends, rows), strict=True)):
        OpChecks("qcompile::qexperts").refuse("ends", list(ends), f"rising from 0 to at most {rows}, the rows of x")
