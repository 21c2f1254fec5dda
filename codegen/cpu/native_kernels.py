"""Operators of the CPU target: quantized products for any number of rows.

Few rows go to native_kernels.cpp, which reads every packed weight once; many rows go to torch's own matrix
product (of floats, where it has no fast one of int8: qcompile/numerics/int8_matmul.py), on weights unpacked
by native_kernels.cpp. The operator looks at the rows it is given, so a graph with a dynamic number of rows is
fast at every number. native_kernels.cpp is compiled once for each machine, with Inductor's compiler and into
Inductor's cache.

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
from typing import Any

import torch
from torch import Tensor

from qcompile.numerics.int8_matmul import multiplies_int8, sum_as_float

# Rows up to which native_kernels.cpp multiplies, measured by benches/cpu_linear.py: beyond, unpacking costs
# less than a second pass over the expanded weight. Integer rows are short enough for the first cache.
FEW_INTEGER, FEW_FLOAT = 8, 4
_CHUNK = 2**23  # bytes unpacked at a time
_SUMS = 2**22  # bytes of integer sums at a time: their scales are applied while they are in a cache

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
    # Inductor turns loop vectorisation off for its own, already vectorised text.
    return CppCodeCache.load(source, extra_flags=("-ftree-loop-vectorize",))


class _Scratch(threading.local):
    """Buffers that every call uses again, one set for each thread.

    Fresh memory of several megabytes is mapped, faulted in page by page and given back at every
    call, and takes the allocator's cached pages with it: a quarter of the time of a whole model.
    """

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def __call__(self, what: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised [rows, columns]; valid until the same thread asks for `what` again."""
        held = self.held.get(what)
        if held is None or held.numel() < rows * columns or held.dtype != dtype:
            held = self.held[what] = torch.empty(rows * columns, dtype=dtype)
        return held[: rows * columns].view(rows, columns)


_scratch = _Scratch()


def _call(name: str, *args: Tensor | int | None) -> None:
    at = [
        ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr()) for a in args
    ]
    getattr(_library(), name)(*at, ctypes.c_int64(torch.get_num_threads()))


def _int8_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    m, k = x.shape

    def few(sums: Tensor) -> None:
        _call("few_int8", x.contiguous(), weight, sums, m, k, weight.shape[0])

    return _integer(x, x_scale, scale, bias, dtype, few, lambda part: weight[part])


def _dual_mm(
    x: Tensor,
    x_scale: Tensor,
    nibbles: Tensor,
    group_scale: Tensor,
    zero: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    (m, k), (n, groups, half) = x.shape, nibbles.shape

    def few(sums: Tensor) -> None:
        _call("few_dual", x.contiguous(), nibbles, group_scale, zero, sums, m, k, n, groups, half)

    return _integer(
        x, x_scale, scale, bias, dtype, few, lambda part: unpack_dual(nibbles[part], group_scale[part], zero[part], k)
    )


def _integer(
    x: Tensor,
    x_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    few: Callable[[Tensor], None],
    weight: Callable[[slice], Tensor],
) -> Tensor:
    """Integer sums of x with int8 channels, some channels at a time, and their scales."""
    (m, k), n = x.shape, scale.shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    brief = int(dtype == torch.bfloat16)
    x_scale, scale = x_scale.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if m <= FEW_INTEGER or k == 1:  # `_int_mm` mistakes the strides of a single column
        sums = torch.empty(m, n, dtype=torch.int32)
        few(sums)
        _call("finish", sums, x_scale, scale, bias, out, brief, m, n, 0, n)
        return out.to(dtype)
    wide = None if multiplies_int8() else x.float()
    step = max(256, min(_SUMS // (4 * m), _CHUNK // k) // 64 * 64)
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        sums = _scratch("sums", m, part.stop - first, torch.int32)
        if wide is None:
            torch._int_mm(x, weight(part).t(), out=sums)
        else:
            sum_as_float(wide, weight(part), sums, _scratch)
        shift = None if bias is None else bias[part]
        _call("finish", sums, x_scale, scale[part], shift, out, brief, m, sums.shape[1], first, n)
    return out.to(dtype)


def _int8_float(x: Tensor, weight: Tensor) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    if m > FEW_FLOAT:
        return _by_chunks(x, n, lambda part: _scratch("float", part.stop - part.start, k, x.dtype).copy_(weight[part]))
    out = torch.empty(m, n)
    _call("few_int8_float", x.float().contiguous(), weight, out, m, k, n)
    return out.to(x.dtype)


def _nibble_float(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor) -> Tensor:
    (m, k), (n, groups, half) = x.shape, nibbles.shape
    if m > FEW_FLOAT:
        return _by_chunks(x, n, lambda part: unpack_nibble(nibbles[part], a[part], c[part], k, x.dtype))
    out = torch.empty(m, n)
    _call("few_nibble", x.float().contiguous(), nibbles, a, c, out, m, k, n, groups, half)
    return out.to(x.dtype)


def _by_chunks(x: Tensor, n: int, weight: Callable[[slice], Tensor]) -> Tensor:
    """x [M, K] times the transposed weight [N, K], some channels at a time."""
    step = max(64, _CHUNK // (x.shape[1] * x.element_size()))
    out = x.new_empty(x.shape[0], n)
    for at in range(0, n, step):
        part = slice(at, min(at + step, n))
        torch.mm(x, weight(part).t(), out=out[:, part])
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


# Registered at the lowest level: an operator is called some hundred times for each token, and the
# layers of torch.library.custom_op cost more than a small product.
_registry = torch.library.Library("qcompile_cpu", "DEF")
for _name, _schema in _DEFINITIONS.items():
    _registry.define(_name + _schema)
    _registry.impl(_name, globals()[f"_{_name}"], "CPU")


@torch.library.register_fake("qcompile_cpu::int8_mm")
@torch.library.register_fake("qcompile_cpu::dual_mm")
def _integer_fake(x: Tensor, x_scale: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=rest[-1])


@torch.library.register_fake("qcompile_cpu::int8_float")
@torch.library.register_fake("qcompile_cpu::nibble_float")
def _float_fake(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
