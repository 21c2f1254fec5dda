"""The ways to compute a product on a GPU, and the fastest: as measured on this one, else by a rule.

    kernel     gemv_w or gemm_w; gemm_a8 with row_quant before it
    dequant    the weight's numbers in memory, then cuBLAS         (x in numbers only)
    float      cuBLAS by the weight as it was

`qcompile kernels tune` measures all of them for a shape and a number of rows, and keeps the microseconds in the user's
cache beside the launches (tuning_cache.py). Measured times hold for the GPU, the version of triton, the format, the very shape
and the place of the rows in PLACES; anything else is not measured, and then the rule decides: up to MANY rows the
kernel, beyond it dequantizes, and nothing is known about float.
"""

from __future__ import annotations

import functools
from typing import Literal

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch.tuning_cache import entry, write

Way = Literal["kernel", "dequant", "float"]

FEW = 4  # rows for which gemv_w is taken
MANY = 1024  # rows above which, by the rule, a weight is dequantized once and multiplied by cuBLAS
PLACES = (1, FEW, 16, 32, 64, 128, 256, 512, MANY, 4096)  # rows up to so many are as these


def by_numbers(bits: int, group: int, zero: str, dtype: str) -> str:
    """The name of a weight-only product: codes, columns of a scale (0: the row), zero points, and x."""
    return f"int{bits} weights, {f'groups of {group}' if group else 'rows'}, zero {zero}, x {dtype}"


def by_codes(codes: str, dtype: str) -> str:
    """The name of a product of codes of both sides: int8 or fp8, and the dtype that comes out."""
    return f"{codes} weights and x, {dtype} out"


def place(rows: int) -> int:
    """The measured number of rows that stands for this one."""
    return next((limit for limit in PLACES if rows <= limit), PLACES[-1])


@functools.lru_cache(maxsize=4096)
def key(gpu: Gpu, product: str, n: int, k: int, rows: int) -> str:
    """What measured times hold for."""
    import triton

    return f"{gpu.name} | triton {triton.__version__} | ways of {product} | {n}x{k} | {place(rows)} rows"


def remember(gpu: Gpu, product: str, n: int, k: int, rows: int, microseconds: dict[Way, float]) -> None:
    """Keep the measured times of a product with a weight [n, k]."""
    write(key(gpu, product, n, k, rows), dict(microseconds))


def times(gpu: Gpu, product: str, n: int, k: int, rows: int) -> dict[Way, float]:
    """Microseconds by way; empty where nothing was measured."""
    return entry(lambda: key(gpu, product, n, k, rows)) or {}


def dequantizes(gpu: Gpu, product: str, n: int, k: int, rows: int) -> bool:
    """Whether a weight-only product of so many rows is computed by cuBLAS."""
    found = times(gpu, product, n, k, rows)
    if "kernel" in found and "dequant" in found:
        return found["dequant"] < found["kernel"]
    return rows > MANY
