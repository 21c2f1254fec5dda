"""Time products on a GPU against cuBLAS and what torch ships: cold weights, interleaved, spreads shown.

A CUDA graph holds calls over so many copies of a weight that they exceed the L2 cache four times; contenders are
replayed in turn, and the median counts. Where the quartiles of a contender are further apart than SPREAD, no ratio
is given: then the machine was not quiet.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from qcompile.bench import versions
from qcompile.codegen.triton.check import build, complaints
from qcompile.codegen.triton.launch import Launch, scaled
from qcompile.codegen.triton.packing import layout_of
from qcompile.codegen.triton.prepare import prepare
from qcompile.codegen.triton.products import Epilogue, Weight, gpu, linear_a8, linear_w
from qcompile.codegen.triton.spec import GemmW
from qcompile.codegen.triton.tuned import candidates, fastest, key, remember, sound
from qcompile.formats import Format
from qcompile.rounding import quantize_tensor

SPREAD = 0.05
ROUNDS = 20
INT4 = "int4/group128/zero"


@dataclass(frozen=True)
class Timed:
    """Median microseconds of one call, the quartiles' distance in medians, and bytes read and written."""

    microseconds: float
    spread: float
    nbytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.microseconds * 1e6


@dataclass(frozen=True)
class Contender:
    """A product: `call(i)` multiplies by copy i of the weight."""

    call: Callable[[int], Any]
    nbytes: int


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
    return to.microseconds / of.microseconds if max(of.spread, to.spread) <= SPREAD else None


def copies_of(nbytes: int, cache: int) -> int:
    """Copies of a weight that exceed a cache four times."""
    return max(2, -(-4 * cache // nbytes))


def graph_timer(call: Callable[[int], Any], copies: int) -> Callable[[], float]:
    """Capture the calls over all copies; a reading is microseconds of one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(copies):  # compiles, and chooses algorithms
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for index in range(copies):
            kept.append(call(index))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / copies

    return once


def contenders(m: int, k: int, n: int, copies: int) -> dict[str, Contender]:
    """cuBLAS bf16 first, ours, and torch's own int4, int8 and fp8 products where they take this shape."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(copies)]
    moved = 2 * m * (k + n)
    found = {"cuBLAS bf16": Contender(lambda i: torch.nn.functional.linear(x, dense[i]), 2 * n * k + moved)}

    weight = random_weight(k, n)
    weights = [dataclasses.replace(weight, packed=weight.packed.clone()) for _ in range(copies)]
    nbytes = weight.packed.nbytes + weight.scale.nbytes + n * k // 128 + moved
    found["qcompile w4a16"] = Contender(lambda i: linear_w(x, weights[i], Epilogue()), nbytes)

    for name, kind in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        codes = (torch.randn(m, k, device="cuda") * 30).to(kind)
        tables = [(torch.randn(n, k, device="cuda") * 30).to(kind) for _ in range(copies)]
        steps, channel = torch.rand(m, 1, device="cuda"), torch.rand(n, 1, device="cuda")
        found[f"qcompile {name}"] = Contender(_a8(codes, steps, tables, channel), n * k + m * k + 2 * m * n)
        if name == "int8" and m > 16:
            found["torch._int_mm"] = Contender(_int_mm(codes, tables), n * k + m * k + 4 * m * n)
        if name == "fp8" and torch.cuda.get_device_capability() >= (8, 9):
            found["torch._scaled_mm"] = Contender(_scaled_mm(codes, steps, tables, channel), n * k + m * k + 2 * m * n)
    if hasattr(torch, "_convert_weight_to_int4pack"):
        found["torch._weight_int4pack_mm"] = _tinygemm(x, n, k, copies, moved)
    return found


def random_weight(k: int, n: int) -> Weight:
    """A random int4 weight on the GPU."""
    form = Format.parse(INT4)
    q = quantize_tensor(torch.randn(n, k) / k**0.5, form)
    layout = layout_of(form)
    packed, scale, zero = prepare(q.stored(), q.scale, q.zero, q.group_scale, form, k)
    assert layout is not None and zero is not None
    return Weight(packed.cuda(), scale.cuda(), zero.cuda(), layout, k)


# Functions, so that each contender holds its own tensors.


def _a8(x: Tensor, steps: Tensor, tables: list[Tensor], scale: Tensor) -> Callable[[int], Tensor]:
    return lambda i: linear_a8(x, steps, tables[i], scale, Epilogue(), torch.bfloat16)


def _int_mm(x: Tensor, tables: list[Tensor]) -> Callable[[int], Tensor]:
    return lambda i: torch._int_mm(x, tables[i].t())


def _scaled_mm(x: Tensor, steps: Tensor, tables: list[Tensor], scale: Tensor) -> Callable[[int], Tensor]:
    return lambda i: torch._scaled_mm(x, tables[i].t(), steps, scale.t(), out_dtype=torch.bfloat16)


def _tinygemm(x: Tensor, n: int, k: int, copies: int, moved: int) -> Contender:
    bits = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = [torch._convert_weight_to_int4pack(bits, 8) for _ in range(copies)]
    scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
    nbytes = bits.nbytes + scales.nbytes + moved
    return Contender(lambda i: torch._weight_int4pack_mm(x, packed[i], 128, scales), nbytes)


def tune(shapes: Sequence[tuple[int, int]], rows: Sequence[int], rounds: int = 5) -> list[tuple[str, Launch, float]]:
    """Time the sound launches of int4 gemm_w for shapes (K, N) and rows, and keep the best in the user's cache."""
    here, found = gpu(torch.device("cuda")), []
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    for (k, n), m in track([(s, m) for s in shapes for m in rows], "tuning", transient=True):
        weight = random_weight(k, n)
        copies = copies_of(weight.packed.nbytes, cache)
        weights = [dataclasses.replace(weight, packed=weight.packed.clone()) for _ in range(copies)]
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        spec = scaled(GemmW("bf16", **weight.fields), m)

        def time(how: Launch, x: Tensor = x, weights: list[Weight] = weights) -> float:
            once = graph_timer(lambda i: linear_w(x, weights[i], Epilogue(), how), len(weights))
            return statistics.median(once() for _ in range(rounds + 1))

        best, microseconds = fastest(sound(spec, candidates(spec, m, here.capability), here.capability, problems), time)
        name = key(here, spec, n, k, m)
        remember(name, best, microseconds)
        found.append((name, best, microseconds))
    return found


def problems(spec: GemmW, how: Launch, architecture: int) -> list[str]:
    """What is wrong with a launch, found by compiling it."""
    try:
        return complaints(spec, how, architecture, build(spec, how, architecture))
    except Exception as error:  # the compiler raises whatever it likes
        return [str(error)]


@dataclass(frozen=True)
class Row:
    """All contenders of one shape."""

    m: int
    k: int
    n: int
    times: dict[str, Timed]


@dataclass(frozen=True)
class Comparison:
    """What was measured, on which machine."""

    machine: dict[str, Any]
    rows: list[Row]

    def table(self) -> Table:
        """Microseconds, and times as fast as cuBLAS bf16 in brackets ("?" where the machine was not quiet)."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.times))
        table = Table("K x N", "rows", *names)
        for row in self.rows:
            first = next(iter(row.times.values()))
            cells = []
            for name in names:
                timed = row.times.get(name)
                times = None if timed is None else ratio(timed, first)
                word = "?" if times is None else f"{times:.2f}x"
                cells.append("" if timed is None else f"{timed.microseconds:.1f} ({word})")
            table.add_row(f"{row.k}x{row.n}", str(row.m), *cells)
        return table

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def compare(shapes: Sequence[tuple[int, int]], rows: Sequence[int], rounds: int = ROUNDS) -> Comparison:
    """Time all contenders for every shape (K, N) and number of rows."""
    properties = torch.cuda.get_device_properties(0)
    machine = versions() | dict(gpu=properties.name, multiprocessors=properties.multi_processor_count)
    found = []
    for (k, n), m in track([(s, m) for s in shapes for m in rows], "timing", transient=True):
        copies = copies_of(n * k // 2, properties.L2_cache_size)
        timers = {
            name: (graph_timer(one.call, copies), one.nbytes) for name, one in contenders(m, k, n, copies).items()
        }
        found.append(Row(m, k, n, interleaved(timers, rounds)))
        torch.cuda.empty_cache()
    return Comparison(machine, found)
