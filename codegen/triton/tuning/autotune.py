"""Measure on this GPU: the best launch of a GEMM, and the fastest variant of a linear layer; kept for later runs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from qcompile.codegen.triton.kernels.kernel_support import codes_of, operator_for
from qcompile.codegen.triton.kernels.spec import GemmW, RowQuant
from qcompile.codegen.triton.launch.gemm import Epilogue, linear_a8, linear_w
from qcompile.codegen.triton.launch.measured_times import (
    Variant,
    a8_name,
    group_name,
    m_bucket,
    remember_times,
    w4a8_name,
    weight_only_name,
)
from qcompile.codegen.triton.launch.pack_weights import zero_points_of
from qcompile.codegen.triton.launch.row_quant import row_quant
from qcompile.codegen.triton.launch.tiles import Launch, place_scales
from qcompile.codegen.triton.launch.tuning_cache import key, remember_launch
from qcompile.codegen.triton.tuning.baselines import INT4, WeightCopies, cold_copy, random_packed_weight
from qcompile.codegen.triton.tuning.gemm_benchmark import MAX_SPREAD, Timed, copies_of, interleaved
from qcompile.codegen.triton.tuning.gpu_timer import TimedGpu
from qcompile.codegen.triton.tuning.group_variants import group_call
from qcompile.codegen.triton.tuning.launch_candidates import (
    FindProblems,
    candidates,
    fastest,
    problems_by_compiling,
    without_problems,
)
from qcompile.codegen.triton.tuning.w4a8_variants import w4a8_call
from qcompile.numerics.format import Format

Shapes = Sequence[tuple[int, int]]
"""(K, N) of weights."""

Calls = dict[Variant, Callable[[int], Any]]
"""variant -> call(i), which multiplies by copy i of the weight."""


def tune_launches(
    shapes: Shapes,
    rows: Sequence[int],
    rounds: int = 5,
    timed_gpu: TimedGpu | None = None,
    find_problems: FindProblems | None = None,
) -> list[tuple[str, Launch, float]]:
    """Time the sound launches of int4 gemm_w for shapes and M, and keep the best in the user's cache.

    Args:
        shapes: (K, N) of the weights.
        rows: every M.
        rounds: readings of each.
        timed_gpu: None is the first GPU.
        find_problems: what is wrong with a launch; None compiles it to see.

    Returns:
        What each measurement holds for, the launch, and its microseconds.
    """
    timed_gpu, found = timed_gpu or TimedGpu(), []
    gpu = timed_gpu.gpu
    for (k, n), m in track([(s, m) for s in shapes for m in rows], "launches", transient=True):
        weights = WeightCopies(k, n, copies_of(n * k // 2, timed_gpu.l2_bytes), timed_gpu.device)
        x = weights.normal(m, k).bfloat16()
        spec = place_scales(GemmW("bf16", **weights.int4[0].spec_fields), m, gpu.capability)

        def time(launch: Launch, x: Tensor = x, weights: WeightCopies = weights) -> float:
            call = lambda i: linear_w(x, weights.int4[i], Epilogue(), launch, "kernel")  # noqa: E731
            once = timed_gpu.timer(call, weights.copies)
            return statistics.median(once() for _ in range(rounds + 1))

        launches = without_problems(
            spec, candidates(spec, m, gpu.capability), gpu.capability, find_problems or problems_by_compiling
        )
        best, microseconds = fastest(launches, time)
        name = key(gpu, spec, n, k, m)
        remember_launch(name, best, microseconds)
        found.append((name, best, microseconds))
        timed_gpu.release_memory()
    return found


@dataclass(frozen=True)
class MeasuredVariants:
    """The variants of one linear layer.

    Attributes:
        layer: its name in the cache (measured_times.py).
        k: input channels.
        n: output channels.
        m: rows of x.
        times: by variant.
        kept: False where a spread was too wide to decide by.
    """

    layer: str
    k: int
    n: int
    m: int
    times: dict[Variant, Timed]
    kept: bool


def measure_variants(
    formats: Sequence[tuple[Format, str]],
    shapes: Shapes,
    rows: Sequence[int],
    rounds: int = 10,
    timed_gpu: TimedGpu | None = None,
) -> list[MeasuredVariants]:
    """Time every variant of bf16 linear layers (measured_times.py), the float one included, and keep the times.

    Args:
        formats: of the weight and of x ("" for float).
        shapes: (K, N) of the weights.
        rows: every M; each stands for its bucket.
        rounds: readings of each.
        timed_gpu: None is the first GPU.

    Raises:
        ValueError: a format that no kernel of this GPU multiplies.
    """
    timed_gpu, found = timed_gpu or TimedGpu(), []
    for form, act in formats:
        if operator_for(form, act, torch.bfloat16, timed_gpu.gpu.capability) is None:
            raise ValueError(f"{form} by {act or 'float'}: no kernel of this GPU multiplies it, nothing to time")
    buckets = list(dict.fromkeys(m_bucket(m) for m in rows))
    for k, n in track(shapes, "variants", transient=True):
        weights = WeightCopies(k, n, copies_of(n * k // 2, timed_gpu.l2_bytes), timed_gpu.device)
        for m, (form, act) in ((m, f) for m in buckets for f in formats):
            operator = operator_for(form, act, torch.bfloat16, timed_gpu.gpu.capability)
            if operator == "linear_w4a8":
                layer, calls = w4a8_name(form.group, "bf16"), Calls({"kernel": w4a8_call(weights, form, m)})
            elif operator == "linear_group":
                layer = group_name(form.dtype, form.group, act, "bf16")
                calls = Calls({"kernel": group_call(weights, form, Format.parse(act), m)})
            else:
                layer, calls = _a8_variants(weights, form, m) if act else _weight_only_variants(weights, form, m)
            x = weights.normal(m, k).bfloat16()
            calls["float"] = functools.partial(_multiply_by_copy, x, weights.dense)
            timers = {variant: (timed_gpu.timer(call, weights.copies), 0) for variant, call in calls.items()}
            times = interleaved(timers, rounds)
            quiet = max(timed.spread for timed in times.values()) <= MAX_SPREAD
            if quiet:
                microseconds = {variant: timed.microseconds for variant, timed in times.items()}
                remember_times(timed_gpu.gpu, layer, n, k, m, microseconds)
            found.append(MeasuredVariants(layer, k, n, m, times, quiet))
            timed_gpu.release_memory()
    return found


def _multiply_by_copy(x: Tensor, copies: Sequence[Tensor], i: int) -> Tensor:
    return torch.nn.functional.linear(x, copies[i])


def _weight_only_variants(weights: WeightCopies, form: Format, m: int) -> tuple[str, Calls]:
    if form == INT4:
        copies = weights.int4
    else:
        first = random_packed_weight(form, weights.k, weights.n, weights.device)
        copies = [cold_copy(first) for _ in range(weights.copies)]
    x = weights.normal(m, weights.k).bfloat16()
    calls: Calls = {
        "kernel": lambda i: linear_w(x, copies[i], Epilogue(), variant="kernel"),
        "dequant": lambda i: linear_w(x, copies[i], Epilogue(), variant="dequant"),
    }
    return weight_only_name(form.bits, form.group, zero_points_of(form, torch.bfloat16), "bf16"), calls


def _a8_variants(weights: WeightCopies, form: Format, m: int) -> tuple[str, Calls]:
    """With x quantized before every call, as in a model where no other site reads the same codes."""
    codes = codes_of(form)
    assert codes == "int8" or codes == "fp8"
    x, copies = weights.normal(m, weights.k).bfloat16(), getattr(weights, codes)
    scale, spec = weights.uniform(weights.n, 1), RowQuant("bf16", codes=codes)

    def kernel(i: int) -> Tensor:
        x_codes, x_scale, *_ = row_quant(spec, x)
        return linear_a8(x_codes, x_scale, copies[i], scale, Epilogue(), torch.bfloat16)

    return a8_name(codes, "bf16"), {"kernel": kernel}
