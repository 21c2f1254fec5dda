"""Arguments of torch.ops.qcompile_cpu, checked before any pointer is computed, by real and fake versions alike.

A wrong one ends in a ValueError that names the operator, the argument, its value and what is demanded. An operator is
called some hundred times for each token: a check reads each attribute once and calls nothing where all is right. Real
tensors need no check of their device, by which torch finds the operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from qcompile.ir.op_checks import FLOATS, OpChecks
from qcompile.numerics.int8_matmul import MAX_K

P = ParamSpec("P")
Sizes = TypeVar("Sizes")

_INT8, _UINT8, _FLOAT32 = torch.int8, torch.uint8, torch.float32


def _op(name: str) -> OpChecks:
    return OpChecks(f"qcompile_cpu::{name}")


def _of_tensors(check: Callable[P, Sizes]) -> Callable[P, Sizes]:
    """Refuse None for a tensor that is not optional: torch hands an undefined one on as None."""

    @functools.wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> Sizes:
        try:
            return check(*args, **kwargs)
        except AttributeError:
            names = inspect.signature(check).parameters
            none = [name for name, value in zip(names, args, strict=False) if value is None and name != "bias"]
            _op(check.__name__.removeprefix("check_")).refuse(none[0], None, "a tensor")

    return run


@_of_tensors
def check_int8_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[int, int, int]:
    """M, K and N of qcompile_cpu::int8_mm."""
    shape, channels = x.shape, weight.shape
    if len(channels) != 2 or weight.dtype is not _INT8:
        _op("int8_mm").refuse("weight", weight, "int8 [N, K]")
    n, k = channels
    if len(shape) != 2 or x.dtype is not _INT8 or shape[1] != k:
        _op("int8_mm").refuse("x", x, f"int8 [M, {k}], as weight is {list(channels)}")
    if k > MAX_K:
        _op("int8_mm").refuse("weight", weight, f"[N, K] with K up to {MAX_K}, where int32 sums are exact")
    _check_scales("int8_mm", shape[0], n, x_scale, scale, bias, dtype)
    return shape[0], k, n


@_of_tensors
def check_dual_mm(
    x: Tensor, x_scale: Tensor, nibbles: Tensor, group_scale: Tensor, zero: Tensor, scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> tuple[int, int, int, int, int]:  # fmt: skip
    """M, K, N, groups and half a group of qcompile_cpu::dual_mm."""
    shape, bytes_of = x.shape, nibbles.shape
    if len(shape) != 2 or x.dtype is not _INT8 or shape[1] > MAX_K:
        _op("dual_mm").refuse("x", x, f"int8 [M, K] with K up to {MAX_K}, where int32 sums are exact")
    m, k = shape
    _check_nibbles("dual_mm", nibbles, bytes_of, k)
    n, groups, half = bytes_of
    of_groups = (n, groups)
    if group_scale.shape != of_groups or group_scale.dtype is not _INT8:
        _op("dual_mm").refuse("group_scale", group_scale, f"int8 [{n}, {groups}], as nibbles are {list(bytes_of)}")
    if zero.shape != of_groups or zero.dtype is not _UINT8:
        _op("dual_mm").refuse("zero", zero, f"uint8 [{n}, {groups}], as nibbles are {list(bytes_of)}")
    _check_scales("dual_mm", m, n, x_scale, scale, bias, dtype)
    return m, k, n, groups, half


@_of_tensors
def check_int8_float(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """M, K and N of qcompile_cpu::int8_float."""
    shape, channels = x.shape, weight.shape
    if len(channels) != 2 or weight.dtype is not _INT8:
        _op("int8_float").refuse("weight", weight, "int8 [N, K]")
    n, k = channels
    if len(shape) != 2 or x.dtype not in FLOATS or shape[1] != k:
        _op("int8_float").refuse("x", x, f"float [M, {k}], as weight is {list(channels)}")
    return shape[0], k, n


@_of_tensors
def check_nibble_float(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> tuple[int, int, int, int, int]:
    """M, K, N, groups and half a group of qcompile_cpu::nibble_float."""
    shape, bytes_of = x.shape, nibbles.shape
    if len(shape) != 2 or x.dtype not in FLOATS:
        _op("nibble_float").refuse("x", x, "float [M, K]")
    m, k = shape
    _check_nibbles("nibble_float", nibbles, bytes_of, k)
    n, groups, half = bytes_of
    of_groups = (n, groups)
    if a.shape != of_groups or a.dtype is not _FLOAT32:
        _op("nibble_float").refuse("a", a, f"float32 [{n}, {groups}], as nibbles are {list(bytes_of)}")
    if c.shape != of_groups or c.dtype is not _FLOAT32:
        _op("nibble_float").refuse("c", c, f"float32 [{n}, {groups}], as nibbles are {list(bytes_of)}")
    return m, k, n, groups, half


def check_devices(op: str, x: Tensor, *others: Tensor | None) -> None:
    """Fake tensors on one device, a CPU or meta."""
    if x.device.type not in ("cpu", "meta"):
        _op(op).refuse("x", x, "on a CPU")
    for other in others:
        if other is not None and other.device != x.device:
            _op(op).refuse("one tensor", other, f"on {x.device}, as x is")


def _check_nibbles(op: str, nibbles: Tensor, bytes_of: torch.Size, k: int) -> None:
    """uint8 [N, groups, G/2] whose groups cover K columns, with halves of whole vectors."""
    if len(bytes_of) != 3 or nibbles.dtype is not _UINT8 or bytes_of[2] < 16 or bytes_of[2] % 16:
        _op(op).refuse("nibbles", nibbles, "uint8 [N, groups, G/2] with G/2 a multiple of 16")
    group = 2 * bytes_of[2]
    if bytes_of[1] != -(-k // group):
        groups = -(-k // group)
        _op(op).refuse("nibbles", nibbles, f"[N, {groups}, {bytes_of[2]}]: {groups} groups of {group} for K = {k}")


def _check_scales(
    op: str, m: int, n: int, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    """What integer sums [M, N] are multiplied with."""
    if x_scale.shape != (m, 1) or x_scale.dtype is not _FLOAT32:
        _op(op).refuse("x_scale", x_scale, f"float32 [{m}, 1], one for each row of x")
    if scale.shape != (n, 1) or scale.dtype is not _FLOAT32:
        _op(op).refuse("scale", scale, f"float32 [{n}, 1], one for each channel")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOATS):
        _op(op).refuse("bias", bias, f"float [{n}], or None")
    if dtype not in FLOATS:
        _op(op).refuse("dtype", dtype, "float32, bfloat16, float16 or float64")
