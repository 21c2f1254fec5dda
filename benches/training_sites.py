"""One site that trains: forward and backward in 4-bit integers beside float; and what stochastic rounding costs.

    python benches/training_sites.py [--repeats N]      writes benches/results/training_sites.json

A linear of [1024, 2048] by [2048, 2048]: float32, bfloat16, torchao's int8 training where it is installed, and ours,
eager and compiled by Inductor. All in one process, one after another in every round, so that a disturbance meets all;
ratios are of medians. The rounding is of two million gradients, compiled.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import qcompile
from qcompile.cli.output import print_table
from qcompile.codegen.cpu.training_kernels import install_cpu_rounding
from qcompile.memory.environment import versions
from qcompile.numerics.counter_random import round_stochastically, uniform
from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.gradient_interval import quantize_gradient
from qcompile.passes import FixedPoint

OUT = Path(__file__).parent / "results" / "training_sites.json"
ROWS, COLUMNS, OUTPUTS = 1024, 2048, 2048
LEVELS = 7
Calls = dict[str, Callable[[], object]]


def medians(calls: Calls, repeats: int) -> dict[str, float]:
    """Milliseconds of each call: the median over rounds in which every one is called once."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: median(found) for name, found in times.items()}


def site_calls() -> Calls:
    """Forward and backward of one linear."""
    torch.manual_seed(0)
    x, gradient = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, OUTPUTS)

    def linear() -> nn.Sequential:
        return nn.Sequential(nn.Linear(COLUMNS, OUTPUTS, bias=False))

    def call(model: Callable[[Tensor], Tensor], owner: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
        given, back = x.to(dtype).requires_grad_(), gradient.to(dtype)

        def both() -> None:
            given.grad = None
            owner.zero_grad(set_to_none=True)
            model(given).backward(back)

        return both

    def ours(rounding: str) -> nn.Module:
        model = linear()
        config = FixedPoint(keep_first=False, keep_last=False, rounding=rounding)  # type: ignore[arg-type]
        qcompile.train(model, qcompile.Recipe("site", (config,)), example=x[:8], progress=False)
        return model.train()

    plain, half = linear(), linear().bfloat16()
    calls = {
        "float32": call(plain, plain, torch.float32),
        "bfloat16": call(half, half, torch.bfloat16),
    }
    for rounding in ("stochastic", "nearest"):
        eager, compiled = ours(rounding), ours(rounding)
        calls[f"4 bits, {rounding}, eager"] = call(eager, eager, torch.float32)
        calls[f"4 bits, {rounding}, Inductor"] = call(torch.compile(compiled), compiled, torch.float32)
    try:
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
        from torchao.quantization import quantize_
    except ImportError:
        print("torchao is not installed: no measurement of it")
    else:
        peer = linear()
        quantize_(peer, Int8MixedPrecisionTrainingConfig(module_swap=True))  # without it torchao 0.18 trains in float
        calls["torchao int8, Inductor"] = call(torch.compile(peer), peer, torch.float32)
    return calls


def rounding_calls() -> Calls:
    """Codes of two million gradients."""
    gradient = torch.randn(ROWS, OUTPUTS)
    stream = torch.tensor(12345, dtype=torch.int32)

    def scaled(g: Tensor) -> Tensor:
        return (g / (g.abs().amax() / LEVELS)).clamp(-LEVELS, LEVELS)

    def by_counter(g: Tensor, s: Tensor) -> Tensor:
        return round_stochastically(scaled(g), uniform(g.shape, s, device=g.device)).to(torch.int8)

    def by_generator(g: Tensor) -> Tensor:
        return round_stochastically(scaled(g), torch.rand_like(g)).to(torch.int8)

    def to_nearest(g: Tensor) -> Tensor:
        return scaled(g).round().to(torch.int8)

    counter, generator, nearest = (torch.compile(f) for f in (by_counter, by_generator, to_nearest))
    format, gamma, draws = FixedPointFormat(), torch.tensor(0.5), torch.tensor(0)
    return {
        "nearest, Inductor": lambda: nearest(gradient),
        "counter hash, Inductor": lambda: counter(gradient, stream),
        "rand, Inductor": lambda: generator(gradient),
        "counter hash, eager": lambda: by_counter(gradient, stream),
        "as the operator does it": lambda: quantize_gradient(gradient, gamma, draws, format, 0),
    }


def shown(title: str, found: dict[str, float], base: str) -> None:
    """Print one table."""
    table = Table(title, "ms", f"/ {base}")
    for name, milliseconds in found.items():
        table.add_row(name, f"{milliseconds:.1f}", f"{milliseconds / found[base]:.2f}")
    print_table(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    install_cpu_rounding()
    site, rounding = medians(site_calls(), repeats), medians(rounding_calls(), repeats)
    shown("one site, forward and backward", site, "float32")
    shown("two million gradients to codes", rounding, "nearest, Inductor")
    found = versions()
    try:
        found["torchao"] = metadata.version("torchao")
    except metadata.PackageNotFoundError:
        pass
    result: dict[str, Any] = dict(
        versions=found, repeats=repeats, shape=[ROWS, COLUMNS, OUTPUTS], site_ms=site, rounding_ms=rounding
    )
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
