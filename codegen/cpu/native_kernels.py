"""Operators of the CPU target: quantized linear layers for any M, and attention of few queries, in C++.

    int8_linear        x int8, w int8                                              exact up to the scales
    dual_linear        x int8, w 4 bits with two-level scales                      exact up to the scales
    group_linear       x int8, w 4 bits or fewer with float scales and zero points
    table_linear       x float, w one of sixteen values, times a scale of its group
    int8_float_linear  x float, w int8
    attention          float32 or bfloat16, at most 16 queries for a key head
    append_rows        new keys and values of all layers, into buffers that have room for them

x is [.., K], the result [.., N]. Where x is int8, `x_scale` has one value for each row, or one for all; a float x
without `x_scale` is quantized inside, as qcompile::quantize does it for "int8/row". weight_packing.py packs weights.
C++ checks every argument before it reads a pointer; the fakes here refuse the same.

The C++ is compiled once on each machine, with Inductor's compiler and into Inductor's cache.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompile.codegen.cpu.cpu_op_checks import check_attention, check_linear

ops = torch.ops.qcompile_cpu
NATIVE = Path(__file__).parent / "native"
_COMPILER_FLAGS = ("-fno-math-errno", "-DNDEBUG", "-ftree-loop-vectorize")  # which Inductor disables for its own text

_DEFINITIONS = {
    "int8_linear": "(Tensor x, Tensor? x_scale, Tensor codes, Tensor scale, Tensor? bias, int n, ScalarType dtype)",
    "dual_linear": "(Tensor x, Tensor? x_scale, Tensor codes, Tensor step, Tensor offset, Tensor scale, Tensor? bias, "
    "int group, int n, ScalarType dtype)",
    "group_linear": "(Tensor x, Tensor? x_scale, Tensor codes, Tensor step, Tensor? zero, Tensor? scale, Tensor? bias, "
    "float zero_bias, int group, int n, ScalarType dtype)",
    "table_linear": "(Tensor x, Tensor codes, Tensor table, Tensor step, Tensor? zero, Tensor? scale, Tensor? bias, "
    "float zero_bias, int group, int n, ScalarType dtype)",
    "int8_float_linear": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int n, ScalarType dtype)",
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? new_key, Tensor? new_value, Tensor? mask, "
    "float scale)",
    "append_rows": "(Tensor(a!)[] buffers, Tensor[] rows, int at)",
}


class _Library(Protocol):
    """torch.library.Library, which torch does not type."""

    def define(self, schema: str) -> Any: ...


def native_source() -> str:
    """operators.cpp with the headers of native/ in place of its includes: one text, whose hash names the library."""
    read_before: set[str] = set()

    def read(name: str) -> str:
        if name in read_before:
            return ""
        read_before.add(name)
        text = (NATIVE / name).read_text().replace("#pragma once\n", "")
        return re.sub(r'#include "(\w+\.h)"\n', lambda found: read(found[1]), text)

    return read("operators.cpp")


_loading = threading.Lock()


def load_native_kernels() -> Any:
    """Compile the operators, or take them from Inductor's cache, and register them for CPU tensors.

    Returns:
        The loaded library.

    Raises:
        CppCompileError: there is no C++ compiler that can build them; Inductor needs one too.
    """
    with _loading:
        return _load()


@functools.cache
def _load() -> Any:
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(native_source(), extra_flags=_COMPILER_FLAGS)


def start_loading_native_kernels() -> None:
    """Compile them in another thread while a model is captured: half a minute, the first time on a machine."""

    def load() -> None:
        with contextlib.suppress(Exception):  # whoever needs them calls load_native_kernels, and gets the error
            load_native_kernels()

    threading.Thread(target=load, daemon=True).start()


def lanes() -> str:
    """The instruction set that the operators were compiled for: "AVX512-VNNI", "AVX-VNNI", "AVX2" or "plain"."""
    import ctypes

    name = load_native_kernels().qcompile_lanes
    name.restype = ctypes.c_char_p
    return str(name().decode())


def _int8_linear_fake(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype
) -> Tensor:
    return check_linear("int8_linear", x, x_scale, codes, (scale, bias), n, dtype)


def _dual_linear_fake(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, step: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None,
    group: int, n: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return check_linear("dual_linear", x, x_scale, codes, (scale, bias), n, dtype, group, (step, None), offset)


def _group_linear_fake(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, step: Tensor, zero: Tensor | None, scale: Tensor | None,
    bias: Tensor | None, zero_bias: float, group: int, n: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return check_linear("group_linear", x, x_scale, codes, (scale, bias), n, dtype, group, (step, zero))


def _table_linear_fake(
    x: Tensor, codes: Tensor, table: Tensor, step: Tensor, zero: Tensor | None, scale: Tensor | None,
    bias: Tensor | None, zero_bias: float, group: int, n: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return check_linear("table_linear", x, None, codes, (scale, bias), n, dtype, group, (step, zero), table=table)


def _int8_float_linear_fake(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype
) -> Tensor:
    return check_linear("int8_float_linear", x, None, codes, (scale, bias), n, dtype)


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, new_key: Tensor | None, new_value: Tensor | None, mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    check_attention(query, key, value, new_key, new_value, mask)
    batch, heads, positions, _ = query.shape
    return query.new_empty((batch, positions, heads, value.shape[3])).transpose(1, 2)


def _append_rows_fake(buffers: list[Tensor], rows: list[Tensor], at: int) -> None:
    """Written in place: nothing to return."""


_open_library: Callable[[str, str], _Library] = torch.library.Library
_registry = _open_library("qcompile_cpu", "DEF")
for _name, _schema in _DEFINITIONS.items():
    _registry.define(f"{_name}{_schema} -> {'()' if _name == 'append_rows' else 'Tensor'}")
    torch.library.register_fake(f"qcompile_cpu::{_name}", globals()[f"_{_name}_fake"])
