"""Times every CPU kernel against the float matmul and torch's own quantized matmul.

    python benches/cpu_linear.py            prints the table, writes benches/results/cpu_linear-PROCESSOR.json
    python benches/cpu_linear.py --commit   also writes codegen/cpu/measured-PROCESSOR.json, which kernel choice reads
    python benches/cpu_linear.py --quick    three shapes and four values of M

PROCESSOR is what this CPU multiplies int8 with: amx, vnni, avx2.

Weights are cold: each run rotates over copies that together exceed the last-level cache. Kernel, float matmul and peer
are interleaved and compared by their medians. The peers are what torch ships for the same weight: `_int_mm` and its
scales (int8 x int8), `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` (bfloat16 only); the two-level (dual)
format has none of its own, so it is compared with the int4 one.
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
from rich.progress import track
from rich.table import Table

from qcompile.codegen.cpu import traced_kernels as kernels
from qcompile.memory.environment import versions
from qcompile.numerics.format import Format
from qcompile.numerics.int8_matmul import processor
from qcompile.numerics.qtensor import unpack_codes
from qcompile.numerics.rounding import quantize_tensor

SHAPES = [(576, 576), (576, 1536), (2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096)]
ROWS = [1, 2, 4, 8, 32, 128, 512]
CACHE = 96 * 2**20
DUAL, AFFINE, INT8 = (Format.parse(t) for t in ("int4/group64/zero/dual", "int4/group64/zero", "int8"))
ROOT = Path(__file__).parents[1]

Case = tuple[Callable[..., object], list[torch.Tensor]]


def cases(k: int, n: int, m: int, dtype: torch.dtype) -> dict[str, tuple[Case, Case | None]]:
    """Kernel -> (function, arguments) and the same of its peer; the second argument is the weight."""
    aten = torch.ops.aten
    w = torch.randn(n, k)
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    x, x_scale = torch.randn(m, k).to(dtype), torch.rand(m, 1)
    dual, affine, int8 = (quantize_tensor(w, f) for f in (DUAL, AFFINE, INT8))
    assert dual.group_scale is not None and dual.zero is not None and affine.zero is not None
    dual_nibbles, nibbles = (kernels.prepare_nibbles(q.stored(), q.format, k) for q in (dual, affine))
    slope, offset = kernels.group_offsets(affine.scale, affine.zero)
    int4_peer = int8_peer = None
    if dtype == torch.bfloat16:
        packed = aten._convert_weight_to_int4pack_for_cpu(unpack_codes(affine.stored(), AFFINE, k).int(), 1)
        zeros = affine.scale * (8 - affine.zero.float())
        terms = torch.stack((affine.scale.t(), zeros.t()), dim=-1).bfloat16().contiguous()
        int4_peer = (lambda x, w, t: aten._weight_int4pack_mm_for_cpu(x, w, 64, t), [x, packed, terms])
        int8_peer = (aten._weight_int8pack_mm.default, [x, int8.codes, int8.scale.reshape(-1).bfloat16()])
    return {
        "int8_mm": (
            (lambda x, w, xs, s: kernels.int8_mm(x, xs, w, s, None, dtype), [codes, int8.codes, x_scale, int8.scale]),
            (
                lambda x, w, xs, s: (torch._int_mm(x, w.t()) * xs * s).to(dtype),
                [codes, int8.codes, x_scale, int8.scale.t()],
            ),
        ),
        "dual_mm": (
            (
                lambda x, w, xs, gs, z, s: kernels.dual_mm(x, xs, w, gs, z, s, None, dtype),
                [codes, dual_nibbles, x_scale, dual.group_scale, dual.zero, dual.scale],
            ),
            int4_peer,
        ),
        "int8_float": ((kernels.int8_float, [x, int8.codes]), int8_peer),
        "nibble_float": ((kernels.nibble_float, [x, nibbles, slope, offset]), int4_peer),
        "dequant_mm": (
            (lambda x, w, s: x @ (w.float() * s).to(x.dtype).t(), [x, int8.codes, int8.scale]),
            None,
        ),
    }


def interleaved(calls: list[Callable[[int], object]], copies: int) -> list[float]:
    """Median microseconds of interleaved calls; of one that takes 0.1 s, of its first three runs."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(18):
        for call, kept in zip(calls, times, strict=True):
            if kept and kept[0] > 0.1 and len(kept) >= 3:
                continue
            start = time.perf_counter()
            call(run % copies)
            took = time.perf_counter() - start
            if run >= 3 or (run and took > 0.1):
                kept.append(took)
    return [statistics.median(kept) * 1e6 for kept in times]


def over_copies(case: Case, copies: int) -> Callable[[int], object]:
    """A compiled call that takes another copy of the weight each time."""
    function, args = case
    compiled = torch.compile(function, dynamic=False)
    weights = [args[1].clone() for _ in range(copies)]
    return lambda i: compiled(args[0], weights[i % copies], *args[2:])


def main() -> None:
    """Measure, print, write."""
    rows: list[dict[str, object]] = []
    table = Table("kernel", "dtype", "M", "K", "N", "us", "float us", "torch's own us", "float/kernel", "own/kernel")
    quick = "--quick" in sys.argv
    shapes, rows_of_x = (SHAPES[1::2], [1, 4, 32, 512]) if quick else (SHAPES, ROWS)
    to_measure = [(d, k, n, m) for d in (torch.bfloat16, torch.float32) for k, n in shapes for m in rows_of_x]
    for dtype, k, n, m in track(to_measure, "measuring"):
        copies = max(2, min(64, CACHE // (k * n // 2)))
        x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        for name, (ours, peer) in cases(k, n, m, dtype).items():
            torch._dynamo.reset()
            float_matmul: Case = (lambda x, w: x @ w.t(), [x, weight])
            calls = [over_copies(c, copies) for c in (ours, float_matmul, peer) if c]
            us, float_us, *own = interleaved(calls, copies)
            short = str(dtype).removeprefix("torch.")
            row: dict[str, object] = dict(kernel=name, dtype=short, M=m, K=k, N=n, us=round(us, 1))
            rows.append(row | dict(float_us=round(float_us, 1), own_us=round(own[0], 1) if own else None))
            times = [f"{us:.0f}", f"{float_us:.0f}", f"{own[0]:.0f}" if own else ""]
            ratios = [f"{float_us / us:.2f}", f"{own[0] / us:.2f}" if own else ""]
            table.add_row(name, short, str(m), str(k), str(n), *times, *ratios)
    Console(width=120).print(table)
    result = json.dumps({"versions": versions(), "rows": rows}, indent=0) + "\n"
    (ROOT / f"benches/results/cpu_linear-{processor()}.json").write_text(result)
    if "--commit" in sys.argv:
        (ROOT / f"codegen/cpu/measured-{processor()}.json").write_text(result)


if __name__ == "__main__":
    main()
