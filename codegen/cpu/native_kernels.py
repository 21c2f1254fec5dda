"""Operators of the CPU target: quantized linear layers for any M, and attention of few queries, in C++.

    int8_linear        x int8, w int8                                              exact up to the scales
    dual_linear        x int8, w 4 bits with two-level scales                      exact up to the scales
    group_linear       x int8, w 4 bits or fewer with float scales and zero points
    table_linear       x float, w one of sixteen values, times a scale of its group
    int8_float_linear  x float, w int8
    attention          float32 or bfloat16, at most 16 queries for a key head
    code_attention     the same over a cache of 8- or 4-bit codes
    short_attention    float32 or bfloat16, any number of queries
    gelu_codes         GELU of float32 or bfloat16 rows, quantized as the dialect does
    append_rows        new keys and values of all layers, into buffers that have room for them

x is [.., K], the result [.., N]. Where x is int8, `x_scale` has one value for each row, or one for all; a float x
without `x_scale` is quantized inside, as qcompile::quantize does it for "int8/row". weight_packing.py packs weights.
C++ checks every argument before it reads a pointer; the fakes here refuse the same.

The C++ is compiled once on each machine, with Inductor's compiler and into Inductor's cache. The library needs no
Python: it comes with a packaged model, and defines the operators itself where no Python did.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompile.codegen.cpu.attention_checks import check_attention, check_code_attention
from qcompile.codegen.cpu.cpu_op_checks import check_gelu_codes, check_linear
from qcompile.codegen.cpu.short_attention_checks import check_short_attention
from qcompile.ir.op_checks import OpChecks

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
    "code_attention": "(Tensor query, Tensor? code_query, Tensor? code_bias, Tensor? first_key, Tensor? first_value, "
    "Tensor key, Tensor key_scale, Tensor key_zero, Tensor value, Tensor value_scale, Tensor value_zero, "
    "Tensor new_key, Tensor new_value, Tensor? mask, float scale)",
    "append_rows": "(Tensor(a!)[] buffers, Tensor[] rows, int at)",
    "short_attention": "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale)",
    "gelu_codes": "(Tensor x, bool tanh)",
}
_RETURNS = {"append_rows": "()", "gelu_codes": "(Tensor, Tensor)"}


_WITHOUT_PYTHON = """
#include <ATen/core/dispatch/Dispatcher.h>

namespace {
struct Definitions {
  Definitions() {
    if (c10::Dispatcher::singleton().findSchema({"qcompile_cpu::%(first)s", ""})) return;
    library.emplace(torch::Library::FRAGMENT, "qcompile_cpu", std::nullopt, __FILE__, __LINE__);
%(definitions)s
  }
  std::optional<torch::Library> library;
} definitions;
}  // namespace
"""


class _Library(Protocol):
    """torch.library.Library, which torch does not type."""

    def define(self, schema: str) -> Any: ...


def _schema(name: str) -> str:
    return f"{name}{_DEFINITIONS[name]} -> {_RETURNS.get(name, 'Tensor')}"


def native_source() -> str:
    """operators.cpp with the headers of native/ in place of its includes: one text, whose hash names the library.

    Behind it the schemas, for a process in which no Python defined them.
    """
    read_before: set[str] = set()

    def read(name: str) -> str:
        if name in read_before:
            return ""
        read_before.add(name)
        text = (NATIVE / name).read_text().replace("#pragma once\n", "")
        return re.sub(r'#include "(\w+\.h)"\n', lambda found: read(found[1]), text)

    definitions = "\n".join(f'    library->def("{_schema(name)}");' for name in _DEFINITIONS)
    return read("operators.cpp") + _WITHOUT_PYTHON % {"first": next(iter(_DEFINITIONS)), "definitions": definitions}


def operators_digest() -> str:
    """What the operators are, 16 hexadecimal digits: a library of another digest may read packed weights otherwise."""
    return hashlib.sha256(native_source().encode()).hexdigest()[:16]


_loading = threading.Lock()
_loaded: list[ctypes.CDLL] = []


def load_native_kernels() -> ctypes.CDLL:
    """Compile the operators, or take them from Inductor's cache, and register them for CPU tensors.

    Returns:
        The loaded library; that of a package, where one was opened before.

    Raises:
        CppCompileError: there is no C++ compiler that can build them; Inductor needs one too.
    """
    with _loading:
        if not _loaded:
            from torch._inductor.codecache import CppCodeCache

            _loaded.append(CppCodeCache.load(native_source(), extra_flags=_COMPILER_FLAGS))
        return _loaded[0]


def native_library() -> bytes:
    """The compiled operators as a file that any process with libtorch can load. Raises as `load_native_kernels`."""
    return Path(load_native_kernels()._name).read_bytes()


def load_native_library(library: bytes) -> None:
    """Register operators that were compiled elsewhere, where none are registered: nothing is compiled.

    Args:
        library: what `native_library` gave, of the same `operators_digest`, for this processor.

    Raises:
        OSError: it cannot be loaded.
    """
    with _loading:
        if _loaded:
            return
        file = Path(tempfile.mkdtemp(prefix="qcompile-")) / "libqcompile_cpu.so"
        try:
            file.write_bytes(library)
            _loaded.append(ctypes.CDLL(str(file)))
        except BaseException:
            shutil.rmtree(file.parent, ignore_errors=True)
            raise
        atexit.register(shutil.rmtree, file.parent, ignore_errors=True)  # a package may be written from it


def start_loading_native_kernels() -> None:
    """Compile them in another thread while a model is captured: half a minute, the first time on a machine."""

    def load() -> None:
        with contextlib.suppress(Exception):  # whoever needs them calls load_native_kernels, and gets the error
            load_native_kernels()

    threading.Thread(target=load, daemon=True).start()


def lanes() -> str:
    """What the operators multiply with: "AMX", "AVX512-VNNI", "AVX-VNNI", "AVX2" or "plain".

    The compiler decides, with the processor's instructions; compiled for AMX, they say "AVX512-VNNI" where the system
    or the processor refuses its tiles.
    """
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


def _code_attention_fake(
    query: Tensor, code_query: Tensor | None, code_bias: Tensor | None, first_key: Tensor | None,
    first_value: Tensor | None, key: Tensor, key_scale: Tensor, key_zero: Tensor, value: Tensor, value_scale: Tensor,
    value_zero: Tensor, new_key: Tensor, new_value: Tensor, mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    first = None if first_key is None or first_value is None else (first_key, first_value)
    if (first_key is None) != (first_value is None):
        OpChecks("qcompile_cpu::code_attention").refuse("first_key", first_key, "given with first_value")
    codes = (key, key_scale, key_zero), (value, value_scale, value_zero)
    check_code_attention(query, (code_query, code_bias), first, codes, (new_key, new_value), mask)
    batch, heads, positions, _ = query.shape
    return query.new_empty((batch, positions, heads, new_value.shape[3])).transpose(1, 2)


def _short_attention_fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return check_short_attention(query, key, value, mask)


def _gelu_codes_fake(x: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return check_gelu_codes(x)


def _append_rows_fake(buffers: list[Tensor], rows: list[Tensor], at: int) -> None:
    """Written in place: nothing to return."""


_open_library: Callable[[str, str], _Library] = torch.library.Library
_registry = _open_library("qcompile_cpu", "DEF")
for _name in _DEFINITIONS:
    _registry.define(_schema(_name))
    torch.library.register_fake(f"qcompile_cpu::{_name}", globals()[f"_{_name}_fake"])
