"""Operators of the CPU target: quantized matmuls for any M.

Small M (decode) goes to native_kernels.cpp, which reads every packed weight once; large M (prefill) goes to torch's own
matmul (of floats, where it has no fast one of int8: qcompile/numerics/int8_matmul.py), on weights that
native_kernels.cpp unpacks. The operator looks at the M it is given, so a graph with a dynamic M is fast at every size.
native_kernels.cpp is compiled once on each machine, with Inductor's compiler and into Inductor's cache.

    int8_mm      x int8, w int8                                            exact up to the scales
    dual_mm      x int8, w = s (q - z): nibbles, integer scale and zero    exact up to the scales
    int8_float   x float, w int8
    nibble_float x float, w = a q - c: nibbles, float a and c

Shapes: x [M, K], x_scale [M, 1], weight [N, K], nibbles [N, groups, G/2] as native_kernels.cpp draws them,
group scale, zero, a and c [N, groups], scale [N, 1], bias [N], result [M, N]. cpu_op_checks.py refuses all else;
tensors with other strides are copied.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompile.codegen.cpu.cpu_op_checks import (
    check_devices,
    check_dual_mm,
    check_int8_float,
    check_int8_mm,
    check_nibble_float,
)
from qcompile.numerics.int8_matmul import has_fast_int8_matmul, int8_matmul, int8_matmul_as_float

# M up to which native_kernels.cpp multiplies, measured by benches/cpu_linear.py: beyond, unpacking costs less than a
# second pass over the expanded weight. Integer rows are short enough for the first cache.
SMALL_M_INT8, SMALL_M_FLOAT = 8, 4
_FLOAT32 = torch.float32
_CHUNK_BYTES = 2**23  # unpacked at a time
_SUMS_BYTES = 2**22  # of integer sums at a time: their scales are applied while they are in a cache

# Inductor disables loop vectorization for its own, already vectorized text.
_COMPILER_FLAGS = ("-ftree-loop-vectorize",)

_DEFINITIONS = {
    "int8_mm": "(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
    "dual_mm": "(Tensor x, Tensor x_scale, Tensor nibbles, Tensor group_scale, Tensor zero, Tensor scale, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    "int8_float": "(Tensor x, Tensor weight) -> Tensor",
    "nibble_float": "(Tensor x, Tensor nibbles, Tensor a, Tensor c) -> Tensor",
}


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache

    source = (Path(__file__).parent / "native_kernels.cpp").read_text()
    return CppCodeCache.load(source, extra_flags=_COMPILER_FLAGS)


class _Scratch(threading.local):
    """Buffers that every call uses again, one set for each thread.

    Fresh memory of several megabytes is mapped, faulted in page by page and given back at every
    call, and takes the allocator's cached pages with it: a quarter of the time of a whole model.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Uninitialized [rows, columns]; valid until the same thread takes the buffer `name` again."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns or buffer.dtype != dtype:
            with torch.inference_mode(False):  # outside of which tensors made inside must not be written
                buffer = self.buffers[name] = torch.empty(rows * columns, dtype=dtype, device="cpu")
        return buffer[: rows * columns].view(rows, columns)


_scratch = _Scratch()


_functions: dict[str, Any] = {}


def _call(name: str, *args: Tensor | int | None) -> None:
    """Call a function of native_kernels.cpp: sizes as int64, tensors as pointers, threads last."""
    function = _functions.get(name)
    if function is None:
        function = getattr(_library(), name)
        kinds = [ctypes.c_int64 if isinstance(a, int) else ctypes.c_void_p for a in args]
        function.argtypes, function.restype = [*kinds, ctypes.c_int64], None
        _functions[name] = function
    function(*[a if isinstance(a, int) else None if a is None else a.data_ptr() for a in args], torch.get_num_threads())


def _int8_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    m, k, n = check_int8_mm(x, x_scale, weight, scale, bias, dtype)
    x, weight = x.contiguous(), weight.contiguous()

    def small_m(sums: Tensor) -> None:
        _call("small_m_int8", x, weight, sums, m, k, n)

    return _int8_linear(x, x_scale, scale, bias, dtype, m, k, n, small_m, lambda channels: weight[channels])


def _dual_mm(
    x: Tensor, x_scale: Tensor, nibbles: Tensor, group_scale: Tensor, zero: Tensor, scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    m, k, n, groups, half = check_dual_mm(x, x_scale, nibbles, group_scale, zero, scale, bias, dtype)
    x, nibbles, group_scale, zero = x.contiguous(), nibbles.contiguous(), group_scale.contiguous(), zero.contiguous()

    def small_m(sums: Tensor) -> None:
        _call("small_m_dual", x, nibbles, group_scale, zero, sums, m, k, n, groups, half)

    def unpacked(channels: slice) -> Tensor:
        return unpack_dual(nibbles[channels], group_scale[channels], zero[channels], k)

    return _int8_linear(x, x_scale, scale, bias, dtype, m, k, n, small_m, unpacked)


def _int8_linear(
    x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, m: int, k: int, n: int,
    small_m: Callable[[Tensor], None], int8_weight: Callable[[slice], Tensor],
) -> Tensor:  # fmt: skip
    """Integer sums of x with int8 channels, some channels at a time, and their scales.

    Args:
        x: int8 [M, K], contiguous.
        x_scale: [M, 1].
        scale: [N, 1].
        bias: [N], or None.
        dtype: of the result.
        m: M.
        k: K.
        n: N.
        small_m: writes the sums int32 [M, N] of a small M.
        int8_weight: some of the channels -> their int8 codes [.., K].
    """
    if dtype is torch.float64:
        wide = int8_matmul(x, int8_weight(slice(0, n))).double() * x_scale.double() * scale.double().t()
        return wide if bias is None else wide + bias.double()
    to_bf16 = int(dtype is torch.bfloat16)
    out = x.new_empty(m, n, dtype=torch.bfloat16 if to_bf16 else _FLOAT32)
    x_scale, scale = x_scale.contiguous(), scale.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype is _FLOAT32 else bias.float()).contiguous()
    if m <= SMALL_M_INT8 or k <= 1:  # `_int_mm` mistakes the strides of a single column
        sums = x.new_empty(m, n, dtype=torch.int32)
        small_m(sums)
        _call("finish", sums, x_scale, scale, bias, out, to_bf16, m, n, 0, n)
        return out if out.dtype is dtype else out.to(dtype)
    x_float = None if has_fast_int8_matmul() else x.float()
    chunk = max(256, min(_SUMS_BYTES // (4 * m), _CHUNK_BYTES // k) // 64 * 64)
    for first in range(0, n, chunk):
        channels = slice(first, min(first + chunk, n))
        sums = _scratch("sums", m, channels.stop - first, torch.int32)
        if x_float is None:
            torch._int_mm(x, int8_weight(channels).t(), out=sums)
        else:
            int8_matmul_as_float(x_float, int8_weight(channels), sums, _scratch)
        bias_of = None if bias is None else bias[channels]
        _call("finish", sums, x_scale, scale[channels], bias_of, out, to_bf16, m, sums.shape[1], first, n)
    return out.to(dtype)


def _int8_float(x: Tensor, weight: Tensor) -> Tensor:
    m, k, n = check_int8_float(x, weight)
    if m > SMALL_M_FLOAT or x.dtype is torch.float64:
        return _matmul_by_chunks(
            x, n, lambda part: _scratch("float", part.stop - part.start, k, x.dtype).copy_(weight[part])
        )
    return _small_m_float(
        x, m, n, lambda rows, out: _call("small_m_int8_float", rows, weight.contiguous(), out, m, k, n)
    )


def _nibble_float(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> Tensor:
    m, k, n, groups, half = check_nibble_float(x, nibbles, a, c)
    nibbles, a, c = nibbles.contiguous(), a.contiguous(), c.contiguous()
    if m > SMALL_M_FLOAT or x.dtype is torch.float64:
        return _matmul_by_chunks(x, n, lambda part: unpack_nibble(nibbles[part], a[part], c[part], k, x.dtype))
    return _small_m_float(
        x, m, n, lambda rows, out: _call("small_m_nibble", rows, nibbles, a, c, out, m, k, n, groups, half)
    )


def _small_m_float(x: Tensor, m: int, n: int, multiply: Callable[[Tensor, Tensor], None]) -> Tensor:
    """x [M, K] as float32 times a weight of N channels, in x's dtype; `multiply` writes float32 [M, N]."""
    out = x.new_empty(m, n, dtype=_FLOAT32)
    if x.dtype is _FLOAT32:  # a cast that does nothing costs as much as all checks
        multiply(x.contiguous(), out)
        return out
    multiply(x.float().contiguous(), out)
    return out.to(x.dtype)


def _matmul_by_chunks(x: Tensor, n: int, float_weight: Callable[[slice], Tensor]) -> Tensor:
    """x [M, K] times the transposed weight [N, K], some channels at a time."""
    chunk = max(64, _CHUNK_BYTES // (max(x.shape[1], 1) * x.element_size()))
    with torch.no_grad():  # which buffers do not take part in
        out = x.new_empty(x.shape[0], n)
        for first in range(0, n, chunk):
            channels = slice(first, min(first + chunk, n))
            torch.mm(x, float_weight(channels).t(), out=out[:, channels])
    return out


def unpack_dual(nibbles: Tensor, scale: Tensor, zero: Tensor, k: int) -> Tensor:
    """s (q - z), int8 [N, K], in scratch memory."""
    n, groups, half = nibbles.shape
    out = _scratch("int8", n, k, torch.int8)
    _call("unpack_dual", nibbles, scale, zero, out, k, n, groups, half)
    return out


def unpack_nibble(nibbles: Tensor, a: Tensor, c: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """a q - c in dtype, [N, K], in scratch memory."""
    n, groups, half = nibbles.shape
    out = _scratch("float", n, k, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    _call("unpack_nibble", nibbles, a, c, out, int(dtype == torch.bfloat16), k, n, groups, half)
    return out.to(dtype)


class _Library(Protocol):
    """torch.library.Library, which torch does not type."""

    def define(self, schema: str) -> Any: ...

    def impl(self, op_name: str, fn: Callable[..., Tensor], dispatch_key: str) -> Any: ...


def _int8_mm_fake(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    check_devices("int8_mm", x, x_scale, weight, scale, bias)
    m, _, n = check_int8_mm(x, x_scale, weight, scale, bias, dtype)
    return x.new_empty((m, n), dtype=dtype)


def _dual_mm_fake(
    x: Tensor, x_scale: Tensor, nibbles: Tensor, group_scale: Tensor, zero: Tensor, scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_devices("dual_mm", x, x_scale, nibbles, group_scale, zero, scale, bias)
    m, _, n, *_ = check_dual_mm(x, x_scale, nibbles, group_scale, zero, scale, bias, dtype)
    return x.new_empty((m, n), dtype=dtype)


def _int8_float_fake(x: Tensor, weight: Tensor) -> Tensor:
    check_devices("int8_float", x, weight)
    m, _, n = check_int8_float(x, weight)
    return x.new_empty((m, n))


def _nibble_float_fake(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> Tensor:
    check_devices("nibble_float", x, nibbles, a, c)
    m, _, n, *_ = check_nibble_float(x, nibbles, a, c)
    return x.new_empty((m, n))


# Registered at the lowest level: an operator is called some hundred times for each token, and the
# layers of torch.library.custom_op cost more than a small matmul.
_open_library: Callable[[str, str], _Library] = torch.library.Library
_registry = _open_library("qcompile_cpu", "DEF")
for _name, _schema in _DEFINITIONS.items():
    _registry.define(_name + _schema)
    _registry.impl(_name, globals()[f"_{_name}"], "CPU")
    torch.library.register_fake(f"qcompile_cpu::{_name}", globals()[f"_{_name}_fake"])
