"""Time products on a GPU against cuBLAS and what others ship: cold weights, interleaved, spreads shown.

A CUDA graph holds calls over so many copies of a weight that they exceed the L2 cache four times; contenders are
replayed in turn, and the median counts. Where the quartiles of a contender are further apart than SPREAD, no ratio
is given: then the machine was not quiet.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from qcompile.codegen.triton.tuning.baselines import FIRST, Field, contenders
from qcompile.codegen.triton.tuning.gpu_timer import Machine

SPREAD = 0.05
ROUNDS = 20


@dataclass(frozen=True)
class Timed:
    """Median microseconds of one call, the quartiles' distance in medians, and bytes read and written."""

    microseconds: float
    expand_groups: float
    nbytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.microseconds * 1e6


def interleaved(timers: Mapping[str, tuple[Callable[[], float], int]], rounds: int = ROUNDS) -> dict[str, Timed]:
    """Read each timer (microseconds, with the bytes of a call) once a round, in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for step in range(rounds + 1):
        for name, (once, _) in timers.items():
            value = once()
            if step:
                times[name].append(value)
    found = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = Timed(middle, (high - low) / middle, timers[name][1])
    return found


def ratio(of: Timed, to: Timed) -> float | None:
    """How many times as fast; None if either varied too much to say."""
    return to.microseconds / of.microseconds if max(of.expand_groups, to.expand_groups) <= SPREAD else None


def copies_of(nbytes: int, cache: int) -> int:
    """Copies of a weight that exceed a cache four times."""
    return max(2, -(-4 * cache // nbytes))


@dataclass(frozen=True)
class GemmTiming:
    """All contenders of one shape and number of rows; those that took no part, and why."""

    m: int
    k: int
    n: int
    times: dict[str, Timed]
    absent: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, to: str = FIRST) -> float | None:
        """How many times as fast one contender is as another; None if that cannot be said."""
        return ratio(self.times[name], self.times[to]) if name in self.times and to in self.times else None


@dataclass(frozen=True)
class GemmComparison:
    """What was measured, on which machine (its state before and after), and what a copy in memory moves."""

    machine: dict[str, Any]
    rows: list[GemmTiming]
    copy: Timed
    after: dict[str, Any] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Microseconds, in brackets times as fast as cuBLAS bf16 ("?" where the machine was not quiet), for ours also
        the share of the copy's bandwidth; - for who took no part."""
        names = list(dict.fromkeys(name for row in self.rows for name in (*row.times, *row.absent)))
        table = Table("K x N", "rows", *names, title=f"a copy moves {self.copy.bandwidth / 1e12:.2f} TB/s")
        for row in self.rows:
            table.add_row(f"{row.k}x{row.n}", str(row.m), *(self._cell(row, name) for name in names))
        return table

    def _cell(self, row: GemmTiming, name: str) -> str:
        timed = row.times.get(name)
        if timed is None:
            return "-"
        times = row.ratio(name)
        share = f" {timed.bandwidth / self.copy.bandwidth:.0%}" if name.startswith("qcompile") else ""
        return f"{timed.microseconds:.1f} ({'?' if times is None else f'{times:.2f}x'}{share})"

    def words(self) -> list[str]:
        """Who took no part, and why, each once; shapes for which there was no time."""
        found = dict.fromkeys(f"{name}: {why}" for row in self.rows for name, why in row.absent.items())
        return [*found, *(f"not measured, out of time: {what}" for what in self.late)]

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(beside, path)


def copy_rate(machine: Machine, rounds: int = ROUNDS) -> Timed:
    """A copy in memory of more than the cache holds: what bandwidths are compared with."""
    size = 4 * machine.cache_bytes
    sources = [torch.empty(size, dtype=torch.uint8, device=machine.device).fill_(index) for index in range(2)]
    target = torch.empty_like(sources[0])
    return interleaved({"copy": (machine.timer(lambda i: target.copy_(sources[i]), 2), 2 * size)}, rounds)["copy"]


def compare(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    rounds: int = ROUNDS,
    machine: Machine | None = None,
    keep: Callable[[GemmComparison], None] = lambda found: None,
    seconds: float = float("inf"),
) -> GemmComparison:
    """Time all contenders for every shape (K, N) and number of rows.

    Args:
        shapes, rows: what to time. rounds: readings of each. machine: None is this one's GPU.
        keep: is given all that there is after every row, so that an interruption loses nothing.
        seconds: no row begins after so many.
    """
    machine, start = machine or Machine(), time.monotonic()
    found = GemmComparison(machine.facts(), [], copy_rate(machine, rounds))
    for k, n in track(shapes, "timing", transient=True):
        own = Field(k, n, copies_of(n * k // 2, machine.cache_bytes), machine.device)
        for m in rows:
            if time.monotonic() - start > seconds:
                found.late.append(f"{k}x{n}, {m} rows")
                continue
            found.rows.append(_row(own, m, rounds, machine))
            found.after.update(machine.facts())
            keep(found)
            machine.release()
    return found


def _row(own: Field, m: int, rounds: int, machine: Machine) -> GemmTiming:
    timers: dict[str, tuple[Callable[[], float], int]] = {}
    absent = {}
    for name, make in contenders(own, m):
        try:
            one = make()
            timers[name] = (machine.timer(one.call, own.copies), one.nbytes)
        except Exception as error:  # of other people's code, or a shape that is not theirs; ours shows in the table
            absent[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return GemmTiming(m, own.k, own.n, interleaved(timers, rounds), absent)
