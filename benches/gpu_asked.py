"""What the kernels for NVIDIA GPUs are to reach, and what a comparison says of it: the lowest value of every regime.

Ratios are to cuBLAS bf16 in the same run, for the layers of Llama-3-8B (K x N: 4096x4096, and the two with 14336).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from qcompile.codegen.triton.tuning.baselines import FIRST
from qcompile.codegen.triton.tuning.gemm_benchmark import GemmComparison, GemmTiming

SQUARE, WIDE = [(4096, 4096)], [(4096, 14336), (14336, 4096)]
FOUR, EIGHT = ["qcompile w4a16"], ["qcompile int8", "qcompile fp8"]
REGIMES = [  # rows from, to, and the ratios: w4a16 square, w4a16 wide, 8 bits on all three
    (1, 16, 2.0, 2.7, 1.5), (17, 32, 1.9, 2.5, 1.5), (33, 64, 1.5, 2.0, 1.5), (65, 128, 1.05, 1.2, 1.5),
    (129, 1024, 0.8, 0.85, 1.5), (1025, 10**9, 0.9, 0.9, 1.6),
]  # fmt: skip
PEERS = [("qcompile w4a16", "GemLite w4a16"), ("qcompile w4a16", "torch._weight_int4pack_mm"),
         ("qcompile int8", "torch._int_mm"), ("qcompile fp8", "torch._scaled_mm")]  # fmt: skip
SHARE = 0.7  # of the copy's bandwidth, up to 16 rows on the wide layers
DECODING, PREFILL = {"qcompile w4a16": 2.3}, {"qcompile fp8": 1.3}  # times Inductor bf16, batch 1 and the prompt


def lowest(values: Iterable[float | None]) -> float | None:
    """The lowest; None if there is none, or if one of them cannot be said."""
    found = list(values)
    return None if not found or None in found else min(v for v in found if v is not None)


def cell(value: float | None, asked: float, measured: bool = True) -> str:
    """A value beside what was asked."""
    if not measured:
        return f"not measured (asked {asked})"
    if value is None:
        return f"? (asked {asked})"
    return f"[{'green' if value >= asked else 'red'}]{value:.2f}[/] (asked {asked})"


def products(found: GemmComparison) -> Table:
    """Every row that is asked of single products."""

    def of(low: int, high: int, shapes: list[tuple[int, int]], names: list[str], asked: float, to: str = FIRST) -> str:
        rows = [row for row in found.rows if low <= row.m <= high and (row.k, row.n) in shapes]
        pairs = [(row, name) for row in rows for name in names if name in row.times and to in row.times]
        return cell(lowest(row.ratio(name, to) for row, name in pairs), asked, bool(pairs))

    table = Table("rows", "w4a16 4096x4096", "w4a16 wide", "8 bits", *(f"{a} to {b}" for a, b in PEERS), "bandwidth")
    for low, high, square, wide, eight in REGIMES:
        first = [of(low, high, SQUARE, FOUR, square), of(low, high, WIDE, FOUR, wide)]
        peers = [of(low, high, SQUARE + WIDE, [ours], 1.0, theirs) for ours, theirs in PEERS]
        wide_rows = [row for row in found.rows if low <= row.m <= high and (row.k, row.n) in WIDE]
        share = _share(found, wide_rows) if high <= 16 else ""
        name = f"{low}-{high}" if high < 10**9 else f">= {low}"
        table.add_row(name, *first, of(low, high, SQUARE + WIDE, EIGHT, eight), *peers, share)
    return table


def _share(found: GemmComparison, rows: list[GemmTiming]) -> str:
    pairs = [row.times[name] for row in rows for name in FOUR if name in row.times]
    return cell(lowest(timed.bandwidth / found.copy.bandwidth for timed in pairs), SHARE, bool(pairs))


def model(rows: list[dict[str, Any]], ratio: Any) -> Table:
    """Every row that is asked of the whole model; `ratio(row, name)` is times Inductor's speed, or None."""
    table = Table("", "asked of", "")
    for work, wanted in (("decode, batch 1", DECODING), ("prompt", PREFILL)):
        for name, asked in wanted.items():
            there = [row for row in rows if row["work"].startswith(work) and name in row["times"]][:1]
            table.add_row(work, name, cell(lowest(ratio(row, name) for row in there), asked, bool(there)))
    return table
