"""Times sites that train, forward and backward, in fixed point beside float, over shapes; and what rounding x costs.

    python benches/training_shapes.py            writes benches/results/training_shapes-PROCESSOR.json
    python benches/training_shapes.py --commit   also codegen/cpu/measured-training-PROCESSOR.json, which choices read

PROCESSOR is vnni or avx2, as qcompile/numerics/int8_matmul.py names them. On one with more than AVX2,
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benches/training_shapes.py
takes the paths of AVX2, and the result says "emulated".

One thread, float and fixed point one after another in every round, medians over rounds. Sites are eager, in the format
of the preset. The second table is the share of a step that siblings (query, key and value; gate and up) would save if
they shared the codes of their input.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from qcompile.cli.output import print_table
from qcompile.codegen.cpu.training_kernel_choice import TrainingShape
from qcompile.codegen.cpu.training_kernels import install_cpu_rounding
from qcompile.memory.environment import versions
from qcompile.modules.fixed_point_modules import FixedPointConv, FixedPointLinear, FixedPointStart
from qcompile.numerics import int8_matmul
from qcompile.numerics.code_convolution import ConvolutionShape
from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.fixed_point_operand import batch_range, inside_clip, operand_codes, step_of
from qcompile.numerics.int8_matmul import Processor, processor

ROOT = Path(__file__).parents[1]
ROWS = (32, 128, 512, 2048)
LINEARS = ((64, 64), (256, 256), (576, 192), (576, 1536), (2048, 2048))
DTYPES = (torch.float32, torch.bfloat16)
SECONDS, LEAST, MOST = 1.0, 3, 15  # of one shape and dtype; rounds
LARGE = 10**8  # multiply-adds; AVX2 multiplies bfloat16 so slowly that larger sites would take an hour
START = FixedPointStart(FixedPointFormat(), torch.zeros(()))

# batch, channels, size, kernel, stride, dimensions
WINDOWS = [(32, c, s, 3, 1, 2) for c in (16, 32, 64, 128) for s in (8, 16, 32)]
WINDOWS += [(8, c, s, 3, 1, 2) for c in (16, 64, 256) for s in (8, 16)]
WINDOWS += [(32, c, 16, 1, 1, 2) for c in (32, 64, 256)]
WINDOWS += [(32, c, 16, 3, 2, 2) for c in (16, 32, 64, 128)]
WINDOWS += [(32, c, s, 3, 1, 1) for c in (16, 32, 64, 256) for s in (64, 512)]
# batch, channels, size, groups, dimensions; kernels of 3
GROUPED = [(32, c, s, c, 2) for c in (32, 128, 512) for s in (8, 16)]
GROUPED += [(32, c, s, 4, 2) for c in (32, 128, 256) for s in (8, 16)]
GROUPED += [(32, c, s, g, 1) for c in (64, 256) for s in (64, 512) for g in (4, c)]

Site = tuple[nn.Module, nn.Module, Tensor]


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each call: the median over rounds in which every one is called once."""
    for call in calls.values():
        call()
    started = time.perf_counter()
    for call in calls.values():
        call()
    rounds = min(max(int(SECONDS / (time.perf_counter() - started)), LEAST), MOST)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) * 1e6)
    return {name: median(found) for name, found in times.items()}


def linear(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Site:
    """A float linear, the same in fixed point, and an input."""
    plain = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    return plain, FixedPointLinear(nn.Parameter(plain.weight.detach().clone()), None, START), torch.randn(rows, inputs)


def convolution(
    batch: int, channels: int, size: int, kernel: int, stride: int, dims: int, groups: int, dtype: torch.dtype
) -> Site:
    """A float convolution of as many channels as it reads, the same in fixed point, and an input."""
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    plain = kind(channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False, dtype=dtype)
    shape = ConvolutionShape((stride,) * dims, (kernel // 2,) * dims, (1,) * dims, groups)
    ours = FixedPointConv(nn.Parameter(plain.weight.detach().clone()), None, START, shape)
    return plain, ours, torch.randn(batch, channels, *[size] * dims)


def step_of_site(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward, as in the middle of a network: x wants its gradient too."""
    given = x.to(next(module.parameters()).dtype).requires_grad_()
    gradient = torch.randn_like(module(given))

    def both() -> None:
        given.grad = None
        module.zero_grad(set_to_none=True)
        module(given).backward(gradient)

    return both


def sites() -> list[tuple[TrainingShape, torch.dtype, Callable[[], Site]]]:
    """Every shape and dtype, with how its site is made."""
    found: list[tuple[TrainingShape, torch.dtype, Callable[[], Site]]] = []
    every = [(*sizes, 1) for sizes in WINDOWS] + [(b, c, s, 3, 1, dims, g) for b, c, s, g, dims in GROUPED]
    for dtype in DTYPES:
        for rows in ROWS:
            for k, n in LINEARS:
                made = TrainingShape(rows, k, n)
                found.append((made, dtype, lambda m=rows, k=k, n=n, d=dtype: linear(m, k, n, d)))  # type: ignore[misc]
        for sizes in every:
            batch, channels, size, kernel, stride, dims, groups = sizes
            rows, inputs = batch * math.ceil(size / stride) ** dims, channels // groups
            made = TrainingShape(rows, inputs, channels, kernel**dims, stride, dims, groups)
            found.append((made, dtype, lambda sizes=sizes, d=dtype: convolution(*sizes, d)))  # type: ignore[misc]
    return found


def sharing() -> list[dict[str, Any]]:
    """The rounding of x beside the step of a site, at sizes of decoders."""
    rows = []
    for m, k, n in ((1024, 2048, 2048), (512, 576, 576), (512, 576, 192), (512, 576, 1536), (512, 1536, 576)):
        _, ours, x = linear(m, k, n, torch.float32)
        form = FixedPointFormat()

        def round_x(x: Tensor = x, form: FixedPointFormat = form) -> None:
            clip = batch_range(x, form.ranges, form.signed)
            operand_codes(x, step_of(clip, form.act_levels), form.lowest_act, form.act_levels)
            inside_clip(x, clip, form.signed)

        found = medians({"step": step_of_site(ours, x), "x": round_x})
        rows.append({"M": m, "K": k, "N": n, "step_us": round(found["step"], 1), "x_us": round(found["x"], 1)})
    return rows


def shown(rows: list[dict[str, Any]], shares: list[dict[str, Any]]) -> None:
    """Print both tables."""
    table = Table("kernel", "dtype", "rows", "inputs", "outputs", "taps", "stride", "dims", "groups", "x float")
    for row in rows:
        shape = TrainingShape(*row["shape"])
        table.add_row(shape.kernel, row["dtype"], *map(str, shape), f"{row['float_us'] / row['us']:.2f}")
    print_table(table)
    table = Table("M", "K", "N", "step, us", "rounding of x", "share")
    for row in shares:
        cells = (row["M"], row["K"], row["N"], row["step_us"], row["x_us"])
        table.add_row(*map(str, cells), f"{row['x_us'] / row['step_us']:.1%}")
    print_table(table)


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    there = processor()
    kind: Processor = "avx2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else there
    int8_matmul.processor = lambda: kind  # type: ignore[assignment]
    install_cpu_rounding()
    rows = []
    for shape, dtype, make in track(sites(), "training sites"):
        size = shape.rows * shape.inputs * shape.outputs * shape.taps
        if kind == "avx2" and dtype == torch.bfloat16 and size > LARGE:
            continue
        plain, ours, x = make()
        found = medians({"float": step_of_site(plain, x), "ours": step_of_site(ours, x)})
        rows.append(
            {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "us": round(found["ours"], 1),
                "float_us": round(found["float"], 1),
            }  # fmt: skip
        )
    shares = sharing()
    shown(rows, shares)
    result = {"versions": versions(), "emulated": kind != there, "rows": rows, "sharing": shares}
    text = json.dumps(result, indent=0) + "\n"
    (ROOT / "benches" / "results" / f"training_shapes-{kind}.json").write_text(text)
    if "--commit" in sys.argv:
        (ROOT / "codegen" / "cpu" / f"measured-training-{kind}.json").write_text(text)


if __name__ == "__main__":
    main()
