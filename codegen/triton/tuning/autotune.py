"""Measure on this machine's GPU: the best launch of a product, and the fastest way to compute it; for later runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from qcompile.codegen.triton.aot.compile_kernels import build, complaints
from qcompile.codegen.triton.gpu_kernel_choice import kind_of
from qcompile.codegen.triton.kernels.spec import GemmW, RowQuant
from qcompile.codegen.triton.launch import measured_times as ways
from qcompile.codegen.triton.launch.gemm import Epilogue, linear_a8, linear_w
from qcompile.codegen.triton.launch.row_quant import row_quant
from qcompile.codegen.triton.launch.tiles import Launch, scaled
from qcompile.codegen.triton.launch.tuning_cache import candidates, fastest, key, remember, sound
from qcompile.codegen.triton.tuning.baselines import CODES, INT4, Field, random_weight
from qcompile.codegen.triton.tuning.gemm_benchmark import SPREAD, Timed, copies_of, interleaved
from qcompile.codegen.triton.tuning.gpu_timer import Machine
from qcompile.numerics.format import Format

Shapes = Sequence[tuple[int, int]]


def tune(
    shapes: Shapes,
    rows: Sequence[int],
    rounds: int = 5,
    machine: Machine | None = None,
    problems: Callable[..., list[str]] | None = None,
) -> list[tuple[str, Launch, float]]:
    """Time the sound launches of int4 gemm_w for shapes (K, N) and rows, and keep the best in the user's cache.

    Args:
        shapes, rows: what to time. rounds: readings of each. machine: None is this one's GPU.
        problems: what is wrong with a launch; None compiles it to see.

    Returns:
        What each measurement holds for, the launch, and its microseconds.
    """
    machine, found = machine or Machine(), []
    here = machine.gpu
    for (k, n), m in track([(s, m) for s in shapes for m in rows], "launches", transient=True):
        own = Field(k, n, copies_of(n * k // 2, machine.cache_bytes), machine.device)
        x = own.random(m, k).bfloat16()
        spec = scaled(GemmW("bf16", **own.int4[0].fields), m)

        def read(how: Launch, x: Tensor = x, own: Field = own) -> float:
            call = lambda i: linear_w(x, own.int4[i], Epilogue(), how, "kernel")  # noqa: E731
            once = machine.timer(call, own.copies)
            return statistics.median(once() for _ in range(rounds + 1))

        left = sound(spec, candidates(spec, m, here.capability), here.capability, problems or problems_of)
        best, microseconds = fastest(left, read)
        name = key(here, spec, n, k, m)
        remember(name, best, microseconds)
        found.append((name, best, microseconds))
        machine.release()
    return found


def problems_of(spec: GemmW, how: Launch, architecture: int) -> list[str]:
    """What is wrong with a launch, found by compiling it."""
    try:
        return complaints(spec, how, architecture, build(spec, how, architecture))
    except Exception as error:  # the compiler raises whatever it likes
        return [str(error)]


@dataclass(frozen=True)
class Measured:
    """The ways of one product; `kept` is False where a spread was too wide to decide by."""

    product: str
    k: int
    n: int
    m: int
    times: dict[str, Timed]
    kept: bool


def measure(
    formats: Sequence[tuple[Format, str]],
    shapes: Shapes,
    rows: Sequence[int],
    rounds: int = 10,
    machine: Machine | None = None,
) -> list[Measured]:
    """Time every way to compute products (measured_times.py) in bf16, against cuBLAS on the same rows, and keep the times.

    Args:
        formats: of the weight and of x ("" for numbers). shapes: (K, N). rows: of x; each stands for its place.
        rounds: readings of each. machine: None is this one's GPU.

    Raises:
        ValueError: a format that no kernel of this GPU multiplies.
    """
    machine, found = machine or Machine(), []
    for form, act in formats:
        if not kind_of(form, act, torch.bfloat16, machine.gpu.capability):
            raise ValueError(f"{form} by {act or 'numbers'}: no kernel of this GPU multiplies it, nothing to time")
    places = list(dict.fromkeys(ways.place(m) for m in rows))
    for k, n in track(shapes, "ways", transient=True):
        own = Field(k, n, copies_of(n * k // 2, machine.cache_bytes), machine.device)
        for m, (form, act) in ((m, f) for m in places for f in formats):
            product, calls = _by_codes(own, form, m) if act else _by_numbers(own, form, m)
            x = own.random(m, k).bfloat16()
            calls["float"] = lambda i, x=x, dense=own.dense: torch.nn.functional.linear(x, dense[i])
            timers = {way: (machine.timer(call, own.copies), 0) for way, call in calls.items()}
            times = interleaved(timers, rounds)
            quiet = max(t.expand_groups for t in times.values()) <= SPREAD
            if quiet:
                ways.remember(machine.gpu, product, n, k, m, {way: t.microseconds for way, t in times.items()})
            found.append(Measured(product, k, n, m, times, quiet))
            machine.release()
    return found


def _by_numbers(own: Field, form: Format, m: int) -> tuple[str, dict[Any, Callable[[int], Any]]]:
    first = random_weight(form, own.k, own.n, own.device)
    weights = own.int4 if form == INT4 else [
        type(first)(first.packed.clone(), first.scale, first.zero, first.layout, own.k) for _ in range(own.copies)
    ]  # fmt: skip
    x = own.random(m, own.k).bfloat16()
    calls = {
        "kernel": lambda i: linear_w(x, weights[i], Epilogue(), way="kernel"),
        "dequant": lambda i: linear_w(x, weights[i], Epilogue(), way="dequant"),
    }
    return ways.by_numbers(form.bits, form.group, form.zero, "bf16"), calls


def _by_codes(own: Field, form: Format, m: int) -> tuple[str, dict[Any, Callable[[int], Any]]]:
    """With the codes of x made before it, as a site does that shares them with none."""
    codes = "int8" if form.dual else form.dtype
    assert codes in CODES
    x, tables = own.random(m, own.k).bfloat16(), getattr(own, codes)
    channel, spec = torch.rand(own.n, 1, device=own.device), RowQuant("bf16", codes=codes)

    def kernel(i: int) -> Tensor:
        rows = row_quant(spec, x)
        return linear_a8(rows["codes"], rows["scale"], tables[i], channel, Epilogue(), torch.bfloat16)

    return ways.by_codes(codes, "bf16"), {"kernel": kernel}
