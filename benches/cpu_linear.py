"""Times every CPU kernel against the float product; writes the table that kernel choice reads.

    python benches/cpu_linear.py            prints the table, writes benches/results/cpu_linear.json
    python benches/cpu_linear.py --commit   also writes codegen/cpu/table.json

Weights are cold: each run rotates over copies that together exceed the last-level cache. Kernel and
float product are interleaved and compared by their medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qcompile.bench import versions
from qcompile.codegen.cpu import kernels
from qcompile.formats import Format, quantize_tensor

SHAPES = [(576, 576), (576, 1536), (2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096)]
ROWS = [1, 4, 8, 32, 128, 512]
CACHE = 96 * 2**20
DUAL, AFFINE, INT8 = (Format.parse(t) for t in ("int4/group64/zero/dual", "int4/group64/zero", "int8"))
ROOT = Path(__file__).parents[1]


def cases(k: int, n: int, m: int, dtype: torch.dtype) -> dict[str, tuple[Callable[..., object], list[torch.Tensor]]]:
    """Kernel -> (function, arguments), the first argument after x being the big weight."""
    w = torch.randn(n, k)
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    x = torch.randn(m, k).to(dtype)
    d, a, i = (quantize_tensor(w, f) for f in (DUAL, AFFINE, INT8))
    assert d.group_scale is not None and d.zero is not None and a.zero is not None
    nd, na = (kernels.prepare_nibbles(q.stored(), q.format, k) for q in (d, a))
    slope, offset = kernels.group_offsets(a.scale, a.zero, AFFINE)
    found: dict[str, tuple[Callable[..., object], list[torch.Tensor]]] = {
        "int8_mm": (kernels.int8_mm, [codes, i.codes]),
        "nibble_dequant_mm": (kernels.nibble_dequant_mm, [x, na, slope, offset]),
        "dequant_mm": (lambda x, w, s: x @ (w.float() * s).to(x.dtype).t(), [x, i.codes, i.scale]),
    }
    if m > 1:
        found["nibble_mm"] = (kernels.nibble_mm, [codes, nd, d.group_scale, d.zero])
    else:
        found["int8_gemv"] = (kernels.int8_gemv, [x, i.codes])
        found["nibble_gemv"] = (kernels.nibble_gemv, [x, na, slope, offset])
    if dtype == torch.bfloat16 and m <= 8 and kernels.int4pack_block():
        packed, scales = kernels.prepare_int4pack(d.stored(), d.group_scale.float(), d.zero, DUAL, k)
        found["int8pack"] = (kernels.int8pack, [x, i.codes, torch.ones(n).bfloat16()])
        found["int4pack"] = (kernels.int4pack, [codes, packed, scales])
    return found


def interleaved(first: Callable[[int], object], second: Callable[[int], object], copies: int) -> tuple[float, float]:
    """Median microseconds of two calls run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(14):
        for call, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call(run % copies)
            if run >= 3:
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6


def main() -> None:
    """Measure, print, write."""
    rows: list[dict[str, object]] = []
    table = Table("kernel", "dtype", "M", "K", "N", "us", "float us", "float/kernel")
    for dtype in (torch.bfloat16, torch.float32):
        for k, n in SHAPES:
            for m in ROWS:
                copies = max(2, min(64, CACHE // (k * n // 2)))
                floats = [torch.randn(n, k).to(dtype) for _ in range(max(2, copies // 2))]
                x = torch.randn(m, k).to(dtype)
                for name, (function, args) in cases(k, n, m, dtype).items():
                    torch._dynamo.reset()
                    compiled = torch.compile(function, dynamic=False)
                    weights = [args[1].clone() for _ in range(copies)]
                    us, float_us = interleaved(
                        lambda i: compiled(args[0], weights[i], *args[2:]),  # noqa: B023
                        lambda i: x @ floats[i % len(floats)].t(),  # noqa: B023
                        copies,
                    )
                    short = str(dtype).removeprefix("torch.")
                    rows.append(
                        dict(kernel=name, dtype=short, M=m, K=k, N=n, us=round(us, 1), float_us=round(float_us, 1))
                    )
                    table.add_row(
                        name, short, str(m), str(k), str(n), f"{us:.0f}", f"{float_us:.0f}", f"{float_us / us:.2f}"
                    )
    Console().print(table)
    result = json.dumps({"versions": versions(), "rows": rows}, indent=0) + "\n"
    (ROOT / "benches/results/cpu_linear.json").write_text(result)
    if "--commit" in sys.argv:
        (ROOT / "codegen/cpu/table.json").write_text(result)


if __name__ == "__main__":
    main()
