"""Time linear layers on a GPU against cuBLAS and what others ship: cold weights, interleaved, spreads shown.

A CUDA graph has calls over so many copies of a weight that they exceed the L2 cache four times; the layers are replayed
one after another, and the median counts. Where the quartiles of one are further apart than MAX_SPREAD, no ratio is
given: then the GPU was not quiet.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from rich.table import Table

from qcompile.codegen.triton.tuning.baselines import CUBLAS, WeightCopies, timed_linears
from qcompile.codegen.triton.tuning.gpu_timer import TimedGpu
from qcompile.memory.atomic_file import write_whole

MAX_SPREAD = 0.05
ROUNDS = 20

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Timed:
    """The readings of one call.

    Attributes:
        microseconds: the median.
        spread: distance of the quartiles, in medians.
        nbytes: read and written.
    """

    microseconds: float
    spread: float
    nbytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.microseconds * 1e6


def interleaved(timers: Mapping[Name, tuple[Callable[[], float], int]], rounds: int = ROUNDS) -> dict[Name, Timed]:
    """Read each timer (microseconds, with the bytes of a call) once a round; the first round warms up."""
    times: dict[Name, list[float]] = {name: [] for name in timers}
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
    return to.microseconds / of.microseconds if max(of.spread, to.spread) <= MAX_SPREAD else None


def copies_of(nbytes: int, cache: int) -> int:
    """Copies of a weight that exceed a cache four times."""
    return max(2, -(-4 * cache // nbytes))


@dataclass(frozen=True)
class GemmTiming:
    """All linear layers of one shape and M.

    Attributes:
        m: rows of x.
        k: input channels.
        n: output channels.
        times: by name.
        absent: those that were not timed -> why.
    """

    m: int
    k: int
    n: int
    times: dict[str, Timed]
    absent: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, to: str = CUBLAS) -> float | None:
        """How many times as fast one is as another; None if that cannot be said."""
        return ratio(self.times[name], self.times[to]) if name in self.times and to in self.times else None


@dataclass(frozen=True)
class GemmComparison:
    """What was measured, on which GPU.

    Attributes:
        before: state of the GPU before the first reading.
        rows: one for each shape and M.
        copy: a copy in memory, which bandwidths are compared with.
        after: state of the GPU after the last reading.
        late: shapes for which there was no time.
    """

    before: dict[str, Any]
    rows: list[GemmTiming]
    copy: Timed
    after: dict[str, Any] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Microseconds, in brackets times as fast as cuBLAS bf16 ("?" where the GPU was not quiet), for ours also the
        share of the copy's bandwidth; - for those that were not timed."""
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

    def notes(self) -> list[str]:
        """What was not timed, and why, each once; shapes for which there was no time."""
        found = dict.fromkeys(f"{name}: {why}" for row in self.rows for name, why in row.absent.items())
        return [*found, *(f"not measured, out of time: {shape}" for shape in self.late)]

    def write(self, path: Path) -> None:
        """As JSON, atomically."""
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")


def copy_rate(timed_gpu: TimedGpu, rounds: int = ROUNDS) -> Timed:
    """A copy in memory of more than the cache holds: what bandwidths are compared with."""
    size = 4 * timed_gpu.l2_bytes
    sources = [torch.empty(size, dtype=torch.uint8, device=timed_gpu.device).fill_(index) for index in range(2)]
    target = torch.empty_like(sources[0])
    return interleaved({"copy": (timed_gpu.timer(lambda i: target.copy_(sources[i]), 2), 2 * size)}, rounds)["copy"]


def compare_gemms(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    rounds: int = ROUNDS,
    timed_gpu: TimedGpu | None = None,
    keep: Callable[[GemmComparison], None] = lambda found: None,
    seconds: float = float("inf"),
) -> GemmComparison:
    """Time all linear layers for every shape (K, N) and M.

    Args:
        shapes: (K, N) of the weights.
        rows: every M.
        rounds: readings of each.
        timed_gpu: None is the first GPU.
        keep: is given all that there is after every row, so that an interruption loses nothing.
        seconds: no row begins after so many.
    """
    timed_gpu, start = timed_gpu or TimedGpu(), time.monotonic()
    found = GemmComparison(timed_gpu.state(), [], copy_rate(timed_gpu, rounds))
    for k, n in track(shapes, "timing", transient=True):
        weights = WeightCopies(k, n, copies_of(n * k // 2, timed_gpu.l2_bytes), timed_gpu.device)
        for m in rows:
            if time.monotonic() - start > seconds:
                found.late.append(f"{k}x{n}, {m} rows")
                continue
            found.rows.append(_time_all(weights, m, rounds, timed_gpu))
            found.after.update(timed_gpu.state())
            keep(found)
            timed_gpu.release_memory()
    return found


def _time_all(weights: WeightCopies, m: int, rounds: int, timed_gpu: TimedGpu) -> GemmTiming:
    timers: dict[str, tuple[Callable[[], float], int]] = {}
    absent = {}
    for name, make in timed_linears(weights, m):
        try:
            linear = make()
            timers[name] = (timed_gpu.timer(linear.call, weights.copies), linear.nbytes)
        except Exception as error:  # of other people's code, or a shape that is not theirs; ours shows in the table
            absent[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return GemmTiming(m, weights.k, weights.n, interleaved(timers, rounds), absent)
