"""Targets of the kernels for NVIDIA GPUs, and how a comparison meets them: the lowest value of every regime of M.

Ratios are to cuBLAS bf16 in the same run, for the layers of Llama-3-8B (K x N: 4096x4096, and the two with 14336).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table

from qcompile.codegen.triton.tuning.baselines import CUBLAS
from qcompile.codegen.triton.tuning.gemm_benchmark import GemmComparison, GemmTiming

SQUARE, WIDE = [(4096, 4096)], [(4096, 14336), (14336, 4096)]
W4A16, A8 = ["qcompile w4a16"], ["qcompile int8", "qcompile fp8"]
REGIMES = [  # M from, to, and the ratios: w4a16 square, w4a16 wide, 8 bits on all three
    (1, 16, 2.0, 2.7, 1.5), (17, 32, 1.9, 2.5, 1.5), (33, 64, 1.5, 2.0, 1.5), (65, 128, 1.05, 1.2, 1.5),
    (129, 1024, 0.8, 0.85, 1.5), (1025, 10**9, 0.9, 0.9, 1.6),
]  # fmt: skip
PEERS = [("qcompile w4a16", "GemLite w4a16"), ("qcompile w4a16", "torch._weight_int4pack_mm"),
         ("qcompile int8", "torch._int_mm"), ("qcompile fp8", "torch._scaled_mm")]  # fmt: skip
SHARE = 0.7  # of the copy's bandwidth, up to M = 16 on the wide layers
DECODE, PREFILL = {"qcompile w4a16": 2.3}, {"qcompile fp8": 1.3}  # times Inductor bf16, batch 1 and the prompt


def lowest(values: Iterable[float | None]) -> float | None:
    """The lowest; None if there is none, or if one of them cannot be said."""
    found = list(values)
    return None if not found or None in found else min(v for v in found if v is not None)


def cell(value: float | None, target: float, measured: bool = True) -> str:
    """A value beside its target."""
    if not measured:
        return f"not measured (target {target})"
    if value is None:
        return f"? (target {target})"
    return f"[{'green' if value >= target else 'red'}]{value:.2f}[/] (target {target})"


def gemm_table(found: GemmComparison) -> Table:
    """Every target of single GEMMs."""

    def of(
        low: int, high: int, shapes: list[tuple[int, int]], names: list[str], target: float, to: str = CUBLAS
    ) -> str:
        rows = [row for row in found.rows if low <= row.m <= high and (row.k, row.n) in shapes]
        pairs = [(row, name) for row in rows for name in names if name in row.times and to in row.times]
        return cell(lowest(row.ratio(name, to) for row, name in pairs), target, bool(pairs))

    table = Table("rows", "w4a16 4096x4096", "w4a16 wide", "8 bits", *(f"{a} to {b}" for a, b in PEERS), "bandwidth")
    for low, high, square, wide, a8 in REGIMES:
        first = [of(low, high, SQUARE, W4A16, square), of(low, high, WIDE, W4A16, wide)]
        peers = [of(low, high, SQUARE + WIDE, [ours], 1.0, theirs) for ours, theirs in PEERS]
        wide_rows = [row for row in found.rows if low <= row.m <= high and (row.k, row.n) in WIDE]
        share = _share(found, wide_rows) if high <= 16 else ""
        name = f"{low}-{high}" if high < 10**9 else f">= {low}"
        table.add_row(name, *first, of(low, high, SQUARE + WIDE, A8, a8), *peers, share)
    return table


def _share(found: GemmComparison, rows: list[GemmTiming]) -> str:
    pairs = [row.times[name] for row in rows for name in W4A16 if name in row.times]
    return cell(lowest(timed.bandwidth / found.copy.bandwidth for timed in pairs), SHARE, bool(pairs))


def model_table(rows: list[dict[str, Any]], ratio: Callable[[dict[str, Any], str], float | None]) -> Table:
    """Every target of the whole model; `ratio(row, name)` is times Inductor's speed, or None."""
    table = Table("", "target of", "")
    for work, targets in (("decode, batch 1", DECODE), ("prompt", PREFILL)):
        for name, target in targets.items():
            measured = [row for row in rows if row["work"].startswith(work) and name in row["times"]][:1]
            table.add_row(work, name, cell(lowest(ratio(row, name) for row in measured), target, bool(measured)))
    return table
