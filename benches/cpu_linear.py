"""Times every CPU kernel against the float matmul, torch's own quantized matmul and the machine's limits.

    python benches/cpu_linear.py            prints the table, writes benches/results/cpu_linear-PROCESSOR.json
    python benches/cpu_linear.py --commit   also writes codegen/cpu/measured-PROCESSOR.json, which kernel choice reads
    python benches/cpu_linear.py --quick    three shapes and four values of M
    python benches/cpu_linear.py --one-thread   one thread, by its processor time, where others use the machine

PROCESSOR is what this CPU multiplies int8 with: amx, vnni, avx2. With QCOMPILE_ISA=avx2 a machine with more is measured
as if it had AVX2 only; torch and its libraries are limited in the same way (set before they load).

Weights are cold: each run rotates over copies that together exceed the last-level cache. Kernel, float matmul and peer
are interleaved and compared by their medians. The peers are what torch ships for the same weight: `_int_mm` and its
scales (int8 x int8), `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` (bfloat16 only); 4 bits with int8
activations have none of their own, so they are compared with the int4 one. Limits: bytes that torch.sum reads, and
multiply-adds of `_int_mm` and of the bfloat16 matmul at 2048 x 2048 x 2048.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if os.environ.get("QCOMPILE_ISA") == "avx2":
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qcompile.codegen.cpu import native_kernels
from qcompile.codegen.cpu.linear_weights import dual_weight, grouped_weight, int8_weight, table_of
from qcompile.memory.environment import versions
from qcompile.numerics.format import Format
from qcompile.numerics.int8_matmul import processor
from qcompile.numerics.qtensor import unpack_codes
from qcompile.numerics.rounding import quantize_tensor

SHAPES = [(576, 576), (576, 1536), (2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
CACHE = 96 * 2**20
DUAL, AFFINE, INT8 = (Format.parse(t) for t in ("int4/group64/zero/dual", "int4/group64/zero", "int8"))
GROUP = 64
INTEGER = ("int8_linear", "dual_linear", "group_linear")
ROOT = Path(__file__).parents[1]
ONE_THREAD = "--one-thread" in sys.argv
clock = time.thread_time if ONE_THREAD else time.perf_counter

Weights = list[torch.Tensor]
Case = tuple[Callable[[Weights], object], Weights]
"""A call of the tensors that are copied, so that each run finds others."""


def cases(k: int, n: int, m: int, dtype: torch.dtype) -> dict[str, tuple[Case, Case | None]]:
    """Kernel -> the call with its weight, and that of its peer."""
    aten, ops = torch.ops.aten, torch.ops.qcompile_cpu
    w = torch.randn(n, k)
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    x, x_scale = torch.randn(m, k).to(dtype), torch.rand(m, 1)
    dual, affine, int8 = (quantize_tensor(w, f) for f in (DUAL, AFFINE, INT8))
    assert affine.zero is not None
    table, grouped = table_of(AFFINE), [t for t in grouped_weight(affine.stored_parts, AFFINE, k) if t is not None]
    bytes_of_weight = list(int8_weight(int8.stored_parts))
    int4_peer: Case | None = None
    int8_peer: Case | None = None
    if dtype == torch.bfloat16:
        packed = aten._convert_weight_to_int4pack_for_cpu(unpack_codes(affine.stored(), AFFINE, k).int(), 1)
        zeros = affine.scale * (8 - affine.zero.float())
        terms = torch.stack((affine.scale.t(), zeros.t()), dim=-1).bfloat16().contiguous()
        int4_peer = (lambda w: aten._weight_int4pack_mm_for_cpu(x, w[0], GROUP, w[1]), [packed, terms])
        scale = int8.scale.reshape(-1).bfloat16()
        int8_peer = (lambda w: aten._weight_int8pack_mm(x, w[0], scale), [int8.codes])
    scaled = torch.compile(lambda sums, xs, s: (sums * xs * s).to(dtype))
    columns = int8.scale.t().contiguous()
    return {
        "int8_linear": (
            (lambda w: ops.int8_linear(codes, x_scale, w[0], int8.scale, None, n, dtype), bytes_of_weight),
            (lambda w: scaled(torch._int_mm(codes, w[0].t()), x_scale, columns), [int8.codes]),
        ),
        "dual_linear": (
            (
                lambda w: ops.dual_linear(codes, x_scale, *w, dual.scale, None, GROUP, n, dtype),
                list(dual_weight(dual.stored_parts, DUAL, k)),
            ),
            int4_peer,
        ),
        "group_linear": (
            (lambda w: ops.group_linear(codes, x_scale, *w, None, None, 0.0, GROUP, n, dtype), grouped),
            int4_peer,
        ),
        "int8_float_linear": (
            (lambda w: ops.int8_float_linear(x, w[0], int8.scale, None, n, dtype), bytes_of_weight),
            int8_peer,
        ),
        "table_linear": (
            (lambda w: ops.table_linear(x, w[0], table, w[1], w[2], None, None, -8.0, GROUP, n, dtype), grouped),
            int4_peer,
        ),
    }  # fmt: skip


def interleaved(calls: list[Callable[[int], object]]) -> list[float]:
    """Median microseconds of interleaved calls by `clock`; of one that takes 0.1 s, of its first three runs."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(24):
        for index, (call, kept) in enumerate(zip(calls, times, strict=True)):
            if kept and kept[0] > 0.1 and len(kept) >= 3:
                continue
            start = clock()
            call(run + 3 * index)  # calls that share a weight must not find it warm from the one before
            took = clock() - start
            if run >= 3 or (run and took > 0.1):
                kept.append(took)
    return [statistics.median(kept) * 1e6 for kept in times]


def over_copies(case: Case) -> Callable[[int], object]:
    """A call that takes another copy of the weight each time."""
    call, weights = case
    size = sum(w.nbytes for w in weights)
    copies = [[w.clone() for w in weights] for _ in range(max(2, min(256, CACHE // size)))]
    return lambda i: call(copies[i % len(copies)])


def limits() -> dict[str, float]:
    """GB/s that all threads read from memory together, and GMAC/s of `_int_mm` and of the bfloat16 matmul."""
    x, square = torch.ones(2**27), torch.ones(2048, 2048, dtype=torch.int8)
    halves = square.bfloat16()

    def fastest(call: Callable[[], object]) -> float:
        times = []
        for _ in range(12):
            start = clock()
            call()
            times.append(clock() - start)
        return min(times)

    return {
        "read_GBs": x.nbytes / fastest(x.sum) / 1e9,
        "int_mm_GMACs": 2048**3 / fastest(lambda: torch._int_mm(square, square)) / 1e9,
        "bf16_mm_GMACs": 2048**3 / fastest(lambda: halves @ halves) / 1e9,
    }


def main() -> None:
    """Measure, print, write."""
    if os.environ.get("QCOMPILE_ISA") == "avx2":
        torch._inductor.config.cpp.simdlen = 256
        native_kernels._COMPILER_FLAGS += ("-mno-avx512f",)
    native_kernels.load_native_kernels()
    if ONE_THREAD:
        torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    columns = "kernel dtype M K N us GB/s GMAC/s float/kernel own/kernel".split()
    table = Table(*columns)
    quick = "--quick" in sys.argv
    shapes, rows_of_x = (SHAPES[1::2], [1, 4, 32, 512]) if quick else (SHAPES, ROWS)
    to_measure = [(d, k, n, m) for d in (torch.bfloat16, torch.float32) for k, n in shapes for m in rows_of_x]
    machine = limits()
    for dtype, k, n, m in track(to_measure, "measuring"):
        x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        for name, (ours, peer) in cases(k, n, m, dtype).items():
            float_matmul: Case = (lambda w, x=x: x @ w[0].t(), [weight])  # type: ignore[misc]
            us, float_us, *own = interleaved([over_copies(c) for c in (ours, float_matmul, peer) if c])
            short = str(dtype).removeprefix("torch.")
            packed = sum(w.nbytes for w in ours[1])
            row: dict[str, object] = dict(kernel=name, dtype=short, M=m, K=k, N=n, us=round(us, 1))
            rows.append(row | dict(float_us=round(float_us, 1), own_us=round(own[0], 1) if own else None, bytes=packed))
            speed = [f"{us:.0f}", f"{packed / us / 1e3:.0f}", f"{m * k * n / us / 1e3:.0f}" if name in INTEGER else ""]
            table.add_row(name, short, str(m), str(k), str(n), *speed, f"{float_us / us:.2f}",
                          f"{own[0] / us:.2f}" if own else "")  # fmt: skip
        torch._dynamo.reset()
    Console(width=120).print(table)
    print(
        f"reads {machine['read_GBs']:.1f} GB/s, _int_mm {machine['int_mm_GMACs']:.0f} GMAC/s, "
        f"bfloat16 {machine['bf16_mm_GMACs']:.0f} GMAC/s; {native_kernels.lanes()}"
    )
    losses = [r for r in rows if float(str(r["float_us"])) < float(str(r["us"]))]
    print(f"slower than float: {[(r['kernel'], r['dtype'], r['M'], r['K'], r['N']) for r in losses] or 'none'}")
    made = {"versions": versions(), "lanes": native_kernels.lanes(), "threads": torch.get_num_threads()}
    found = {**made, "limits": machine, "rows": rows}
    result = json.dumps(found, indent=0) + "\n"
    name = os.environ.get("QCOMPILE_ISA") or processor()
    (ROOT / f"benches/results/cpu_linear-{name}.json").write_text(result)
    if "--commit" in sys.argv:
        (ROOT / f"codegen/cpu/measured-{name}.json").write_text(result)


if __name__ == "__main__":
    main()
