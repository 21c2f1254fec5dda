"""The variants of a linear layer on a GPU, and the fastest: as measured on this one, else by a rule.

    kernel     gemm_w; gemm_a8 with row_quant before it
    dequant    the dequantized weight in memory, then cuBLAS        (x float only)
    float      cuBLAS by the float weight

`qcompile kernels tune` measures all of them for a shape and an M, and keeps the microseconds in the user's cache beside
the launches (tuning_cache.py). Measured times hold for the GPU, the version of triton, the format, the exact shape and
the bucket of M in M_BUCKETS; anything else is not measured, and then the rule decides: up to KERNEL_MAX_M the kernel,
beyond it dequantizing, and nothing is known about float.
"""

from __future__ import annotations

import functools
from typing import Literal, cast

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch.tuning_cache import entry, write

Variant = Literal["kernel", "dequant", "float"]

KERNEL_MAX_M = 1024  # M above which, by the rule, a weight is dequantized once and multiplied by cuBLAS (prefill)
M_BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, KERNEL_MAX_M, 4096)  # M is rounded up to one of these


def weight_only_name(bits: int, group: int, zero: str, dtype: str) -> str:
    """The name of weight-only linear layers in the cache.

    Args:
        bits: of a code.
        group: columns that share a scale; 0 is a per-channel scale.
        zero: none, int or float zero points.
        dtype: of x.
    """
    return f"int{bits} weights, {f'groups of {group}' if group else 'rows'}, zero {zero}, x {dtype}"


def a8_name(codes: str, dtype: str) -> str:
    """The name of linear layers with 8-bit codes on both sides, int8 or fp8, and an output in `dtype`."""
    return f"{codes} weights and x, {dtype} out"


def w4a8_name(group: int, dtype: str) -> str:
    """The name of linear layers with 4-bit weights in groups (0: per channel), int8 x, and an output in `dtype`."""
    return f"int4 weights, {f'groups of {group}' if group else 'rows'}, int8 x, {dtype} out"


def group_name(codes: str, group: int, act: str, dtype: str) -> str:
    """The name of linear layers with int4 or fp4 weights in groups (0: rows), and an output in `dtype`."""
    return f"{codes} weights, {f'groups of {group}' if group else 'rows'}, x in {act}, {dtype} out"


def m_bucket(m: int) -> int:
    """The measured M that stands for this one."""
    return next((limit for limit in M_BUCKETS if m <= limit), M_BUCKETS[-1])


@functools.lru_cache(maxsize=4096)
def key(gpu: Gpu, layer: str, n: int, k: int, m: int) -> str:
    """What measured times hold for."""
    import triton

    return f"{gpu.name} | triton {triton.__version__} | variants of {layer} | {n}x{k} | {m_bucket(m)} rows"


def remember_times(gpu: Gpu, layer: str, n: int, k: int, m: int, microseconds: dict[Variant, float]) -> None:
    """Keep the measured times of a linear layer with a weight [N, K]."""
    write(key(gpu, layer, n, k, m), dict(microseconds.items()))


def measured_times(gpu: Gpu, layer: str, n: int, k: int, m: int) -> dict[Variant, float]:
    """Microseconds by variant; empty where nothing was measured."""
    found = entry(lambda: key(gpu, layer, n, k, m)) or {}
    return cast(dict[Variant, float], found)  # what remember_times wrote


def dequantizes(gpu: Gpu, layer: str, n: int, k: int, m: int) -> bool:
    """Whether a weight-only linear layer is computed by cuBLAS on the dequantized weight at this M."""
    times = measured_times(gpu, layer, n, k, m)
    if "kernel" in times and "dequant" in times:
        return times["dequant"] < times["kernel"]
    return m > KERNEL_MAX_M
