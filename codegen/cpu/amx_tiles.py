"""AMX tiles of this processor: whether this process may use them, and products without them, for comparison.

native/amx.h asks Linux for them when the operators are loaded; where it refuses, the loops of AVX-512 serve.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

from qcompile.codegen.cpu.native_kernels import load_native_kernels
from qcompile.numerics.int8_matmul import processor


@functools.cache
def has_amx_tiles() -> bool:
    """Whether the processor has tiles and the system lets this process use them; asks for them."""
    return processor() == "amx" and bool(torch.cpu._init_amx())


@contextlib.contextmanager
def without_amx_tiles() -> Iterator[None]:
    """Inside, operators of this process multiply without tiles, on all threads. Raises as `load_native_kernels`."""
    use_tiles = load_native_kernels().qcompile_use_tiles
    use_tiles.argtypes, use_tiles.restype = [ctypes.c_bool], ctypes.c_bool
    before = use_tiles(False)
    try:
        yield
    finally:
        use_tiles(before)
