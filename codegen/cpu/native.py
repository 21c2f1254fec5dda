"""Operators of the CPU target: quantized products for any number of rows.

Few rows go to native.cpp, which reads every packed weight once; many rows go to torch's own matrix
product, on weights unpacked by native.cpp. The operator looks at the rows it is given, so a graph
with a dynamic number of rows is fast at every number. native.cpp is compiled once for each machine,
with Inductor's compiler and into Inductor's cache.

    int8_mm      x int8, w int8                                        -> int32   exact
    dual_mm      x int8, w = s (q - z): nibbles, integer scale and zero -> int32   exact
    int8_float   x float, w int8, without its scale                    -> x's dtype
    nibble_float x float, w = a q - c: nibbles, float a and c          -> x's dtype

Shapes: x [M, K], weight [N, K], nibbles [N, groups, G/2] as native.cpp draws them, scale, zero, a
and c [N, groups], result [M, N].
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Rows up to which native.cpp multiplies, measured by benches/cpu_linear.py: beyond, unpacking costs
# less than a second pass over the expanded weight. Integer rows are short enough for the first cache.
FEW_INTEGER, FEW_FLOAT = 8, 4
_CHUNK = 2**23  # bytes unpacked at a time: larger allocations are mapped and faulted in at every call

_DEFINITIONS = {
    "int8_mm": "(Tensor x, Tensor weight) -> Tensor",
    "dual_mm": "(Tensor x, Tensor nibbles, Tensor scale, Tensor zero) -> Tensor",
    "int8_float": "(Tensor x, Tensor weight) -> Tensor",
    "nibble_float": "(Tensor x, Tensor nibbles, Tensor a, Tensor c) -> Tensor",
}


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache

    source = (Path(__file__).parent / "native.cpp").read_text()
    # Inductor turns loop vectorisation off for its own, already vectorised text.
    return CppCodeCache.load(source, extra_flags=("-ftree-loop-vectorize",))


def _call(name: str, *args: Tensor | int) -> None:
    at = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in args]
    getattr(_library(), name)(*at, ctypes.c_int64(torch.get_num_threads()))


def _int8_mm(x: Tensor, weight: Tensor) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    if m > FEW_INTEGER and k > 1:  # `_int_mm` mistakes the strides of a single column
        return torch._int_mm(x, weight.t())
    out = torch.empty(m, n, dtype=torch.int32)
    _call("few_int8", x.contiguous(), weight, out, m, k, n)
    return out


def _dual_mm(x: Tensor, nibbles: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    (m, k), (n, groups, half) = x.shape, nibbles.shape
    if m > FEW_INTEGER and k > 1:  # `_int_mm` mistakes the strides of a single column
        return torch._int_mm(x, unpack_dual(nibbles, scale, zero, k).t())
    out = torch.empty(m, n, dtype=torch.int32)
    _call("few_dual", x.contiguous(), nibbles, scale, zero, out, m, k, n, groups, half)
    return out


def _int8_float(x: Tensor, weight: Tensor) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    if m > FEW_FLOAT:
        return _by_chunks(x, n, lambda part: weight[part].to(x.dtype))
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
    if step >= n:
        return x @ weight(slice(0, n)).t()
    return torch.cat([x @ weight(slice(at, min(at + step, n))).t() for at in range(0, n, step)], dim=1)


def unpack_dual(nibbles: Tensor, scale: Tensor, zero: Tensor, k: int) -> Tensor:
    """s (q - z), int8 [N, K]."""
    n, groups, half = nibbles.shape
    out = torch.empty(n, k, dtype=torch.int8)
    _call("unpack_dual", nibbles, scale, zero, out, k, n, groups, half)
    return out


def unpack_nibble(nibbles: Tensor, a: Tensor, c: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """a q - c in dtype, [N, K]."""
    n, groups, half = nibbles.shape
    out = torch.empty(n, k, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
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
def _integer_fake(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.int32)


@torch.library.register_fake("qcompile_cpu::int8_float")
@torch.library.register_fake("qcompile_cpu::nibble_float")
def _float_fake(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
