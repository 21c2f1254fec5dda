"""Times `short_attention`, attention of all positions at once, against torch's own, over lengths, widths and dtypes.

    python benches/attention_cpu.py            prints the table
    python benches/attention_cpu.py --commit   also writes codegen/cpu/measured-attention-PROCESSOR.json, which
                                               short_attention.py reads to choose between the two
    python benches/attention_cpu.py --quick    three lengths

With QCOMPILE_ISA=avx2 a machine with more is measured as if it had AVX2 only; torch and its libraries are limited in
the same way (set before they load). Both are interleaved and compared by their shortest runs. Queries, keys and values
are parts of one product, as a model has them; there are as many heads as make a millisecond of work. The limits:
multiply-adds of a matmul in each dtype.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

if os.environ.get("QCOMPILE_ISA") == "avx2":
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

import torch
from encoders_cpu import float_limits
from rich.console import Console
from rich.table import Table

from qcompile.codegen.cpu import native_kernels
from qcompile.memory.environment import versions
from qcompile.numerics.int8_matmul import processor

LENGTHS = [16, 32, 49, 64, 100, 128, 197, 256, 384, 512, 1024]
WIDTHS = [32, 64, 128]
WORK, RUNS = 60e6, 24  # multiply-adds of a call
ROOT = Path(__file__).parents[1]


def shortest(*calls: Callable[[], object]) -> list[float]:
    """Microseconds of the shortest of interleaved runs of each: what nothing disturbed."""
    best = [math.inf] * len(calls)
    for _ in range(RUNS):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - start)
    return [seconds * 1e6 for seconds in best]


def measure(length: int, width: int, dtype: torch.dtype) -> dict[str, object]:
    """One row of the table."""
    heads = max(2, round(WORK / (2 * length * length * width)))
    x = torch.randn(heads, length, 3, 1, width).to(dtype)
    query, key, value = (x[:, :, part].transpose(1, 2) for part in range(3))
    scale = 1 / math.sqrt(width)
    theirs = torch.nn.functional.scaled_dot_product_attention
    wanted = theirs(query.double(), key.double(), value.double())
    found = torch.ops.qcompile_cpu.short_attention(query, key, value, None, scale)
    worst = float((found.double() - wanted).abs().max())
    assert worst < (1e-5 if dtype == torch.float32 else 0.05), (length, width, dtype, worst)
    us, torch_us = shortest(
        lambda: torch.ops.qcompile_cpu.short_attention(query, key, value, None, scale),
        lambda: theirs(query, key, value),
    )
    name = str(dtype).removeprefix("torch.")
    return dict(dtype=name, S=length, T=length, D=width, heads=heads, us=round(us, 1), torch_us=round(torch_us, 1))


def main() -> None:
    """Measure, print, write."""
    if os.environ.get("QCOMPILE_ISA") == "avx2":
        torch._inductor.config.cpp.simdlen = 256
        native_kernels._COMPILER_FLAGS += ("-mno-avx512f",)
    native_kernels.load_native_kernels()
    table, rows = Table("dtype", "length", "width", "us", "torch us", "torch/ours", "GMAC/s"), []
    for dtype in (torch.bfloat16, torch.float32):
        for width in WIDTHS:
            for length in LENGTHS[::4] if "--quick" in sys.argv else LENGTHS:
                row = measure(length, width, dtype)
                rows.append(row)
                us, torch_us, heads = (float(str(row[name])) for name in ("us", "torch_us", "heads"))
                rate = 2 * length * length * width * heads / us / 1e3
                table.add_row(
                    str(row["dtype"]),
                    str(length),
                    str(width),
                    f"{us:.0f}",
                    f"{torch_us:.0f}",
                    f"{torch_us / us:.2f}",
                    f"{rate:.0f}",
                )
    machine = float_limits()
    Console(width=120).print(table)
    print(", ".join(f"{name} {value:.0f}" for name, value in machine.items()), native_kernels.lanes())
    slower = [(r["dtype"], r["T"], r["D"]) for r in rows if float(str(r["torch_us"])) <= float(str(r["us"]))]
    print(f"slower than torch's: {slower or 'none'}")
    if "--commit" in sys.argv:
        made = {"versions": versions(), "lanes": native_kernels.lanes(), "limits": machine, "rows": rows}
        name = os.environ.get("QCOMPILE_ISA") or processor()
        (ROOT / f"codegen/cpu/measured-attention-{name}.json").write_text(json.dumps(made, indent=0) + "\n")


if __name__ == "__main__":
    main()
