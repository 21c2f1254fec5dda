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
group scale, zero, a and c [N, groups], scale [N, 1], bias [N], result [M, N].
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

from qcompile.numerics.int8_matmul import has_fast_int8_matmul, int8_matmul_as_float

# M up to which native_kernels.cpp multiplies, measured by benches/cpu_linear.py: beyond, unpacking costs less than a
# second pass over the expanded weight. Integer rows are short enough for the first cache.
SMALL_M_INT8, SMALL_M_FLOAT = 8, 4
_CHUNK_BYTES = 2**23  # unpacked at a time
_SUMS_BYTES = 2**22  # of integer sums at a time: their scales are applied while they are in a cache

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
    # Inductor disables loop vectorization for its own, already vectorized text.
    return CppCodeCache.load(source, extra_flags=("-ftree-loop-vectorize",))


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
            buffer = self.buffers[name] = torch.empty(rows * columns, dtype=dtype)
        return buffer[: rows * columns].view(rows, columns)


_scratch = _Scratch()


def _call(name: str, *args: Tensor | int | None) -> None:
    """Call a function of native_kernels.cpp: sizes as int64, tensors as pointers, threads last."""
    converted = [
        ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr()) for a in args
    ]
    getattr(_library(), name)(*converted, ctypes.c_int64(torch.get_num_threads()))


def _int8_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    m, k = x.shape

    def small_m(sums: Tensor) -> None:
        _call("small_m_int8", x.contiguous(), weight, sums, m, k, weight.shape[0])

    return _int8_linear(x, x_scale, scale, bias, dtype, small_m, lambda channels: weight[channels])


def _dual_mm(
    x: Tensor, x_scale: Tensor, nibbles: Tensor, group_scale: Tensor, zero: Tensor, scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (m, k), (n, groups, half) = x.shape, nibbles.shape

    def small_m(sums: Tensor) -> None:
        _call("small_m_dual", x.contiguous(), nibbles, group_scale, zero, sums, m, k, n, groups, half)

    def unpacked(channels: slice) -> Tensor:
        return unpack_dual(nibbles[channels], group_scale[channels], zero[channels], k)

    return _int8_linear(x, x_scale, scale, bias, dtype, small_m, unpacked)


def _int8_linear(
    x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    small_m: Callable[[Tensor], None], int8_weight: Callable[[slice], Tensor],
) -> Tensor:  # fmt: skip
    """Integer sums of x with int8 channels, some channels at a time, and their scales.

    Args:
        x: int8 [M, K].
        x_scale: [M, 1].
        scale: [N, 1].
        bias: [N], or None.
        dtype: of the result.
        small_m: writes the sums int32 [M, N] of a small M.
        int8_weight: some of the channels -> their int8 codes [.., K].
    """
    (m, k), n = x.shape, scale.shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    to_bf16 = int(dtype == torch.bfloat16)
    x_scale, scale = x_scale.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if m <= SMALL_M_INT8 or k == 1:  # `_int_mm` mistakes the strides of a single column
        sums = torch.empty(m, n, dtype=torch.int32)
        small_m(sums)
        _call("finish", sums, x_scale, scale, bias, out, to_bf16, m, n, 0, n)
        return out.to(dtype)
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
    (m, k), n = x.shape, weight.shape[0]
    if m > SMALL_M_FLOAT:
        return _matmul_by_chunks(
            x, n, lambda part: _scratch("float", part.stop - part.start, k, x.dtype).copy_(weight[part])
        )
    out = torch.empty(m, n)
    _call("small_m_int8_float", x.float().contiguous(), weight, out, m, k, n)
    return out.to(x.dtype)


def _nibble_float(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> Tensor:
    (m, k), (n, groups, half) = x.shape, nibbles.shape
    if m > SMALL_M_FLOAT:
        return _matmul_by_chunks(x, n, lambda part: unpack_nibble(nibbles[part], a[part], c[part], k, x.dtype))
    out = torch.empty(m, n)
    _call("small_m_nibble", x.float().contiguous(), nibbles, a, c, out, m, k, n, groups, half)
    return out.to(x.dtype)


def _matmul_by_chunks(x: Tensor, n: int, float_weight: Callable[[slice], Tensor]) -> Tensor:
    """x [M, K] times the transposed weight [N, K], some channels at a time."""
    chunk = max(64, _CHUNK_BYTES // (x.shape[1] * x.element_size()))
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


# Registered at the lowest level: an operator is called some hundred times for each token, and the
# layers of torch.library.custom_op cost more than a small matmul.
_open_library: Callable[[str, str], _Library] = torch.library.Library
_registry = _open_library("qcompile_cpu", "DEF")
for _name, _schema in _DEFINITIONS.items():
    _registry.define(_name + _schema)
    _registry.impl(_name, globals()[f"_{_name}"], "CPU")


def _int8_fake(x: Tensor, x_scale: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=rest[-1])


def _float_fake(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


for _names, _fake in (("int8_mm", "dual_mm"), _int8_fake), (("int8_float", "nibble_float"), _float_fake):
    for _name in _names:
        torch.library.register_fake(f"qcompile_cpu::{_name}", _fake)
