"""Triton's interpreter with correct bfloat16 arithmetic and a correct cast to fp8.

The interpreter keeps bfloat16 as its 16 bits and multiplies those (triton-lang/triton issue 11584), silently, and its
cast to e4m3 is off by more than a code. Here every operation on bfloat16 is that on float32, rounded to nearest even,
and the cast is torch's. Import this before any kernel is loaded.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def to_float32(bits):
    """bfloat16 bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values):
    """Float32 -> bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def install():
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    binary, dot, cast = builder.binary_op, builder.create_dot, builder.cast_impl
    fp_to_fp = builder.create_fp_to_fp

    def binary_op(self, lhs, rhs, op):
        if not (is_bf16(lhs) and is_bf16(rhs)) or op in _BITWISE:
            return binary(self, lhs, rhs, op)
        out = op(to_float32(lhs.data), to_float32(rhs.data))
        return handle(out, tl.int1) if out.dtype == np.bool_ else handle(to_bf16(out), tl.bfloat16)

    def create_dot(self, a, b, sums, *rest):
        if not is_bf16(a):
            return dot(self, a, b, sums, *rest)
        assert is_bf16(b) and sums.dtype.scalar == tl.float32
        return handle(to_float32(a.data) @ to_float32(b.data) + sums.data, tl.float32)

    def cast_impl(self, value, dtype):
        source, target = value.dtype.scalar, dtype.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast(self, value, dtype)
        if target == tl.bfloat16:
            return handle(to_bf16(value.data.astype(np.float32)), tl.bfloat16)
        return handle(to_float32(value.data).astype(interpreter._get_np_dtype(target)), target)

    def create_fp_to_fp(self, value, dtype, rounding):
        if dtype.scalar == tl.float8e4nv and value.dtype.scalar == tl.float32:
            codes = torch.from_numpy(np.ascontiguousarray(value.data)).to(torch.float8_e4m3fn)
            return handle(codes.view(torch.uint8).numpy(), tl.float8e4nv)
        return fp_to_fp(self, value, dtype, rounding)

    builder.binary_op, builder.create_dot, builder.cast_impl = binary_op, create_dot, cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.get_bf16 = lambda self, value: handle(to_bf16(np.array([value], np.float32)), tl.bfloat16)


install()
