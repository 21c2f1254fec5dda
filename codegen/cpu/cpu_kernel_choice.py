"""Which kernel for which format, and how fast: committed tables, and never slower in silence.

`measured-vnni.json` and `measured-avx2.json` hold microseconds of every kernel and of the float product over shapes,
rows and dtypes, on a processor with 8-bit dot products and on one without, measured with weights cold in memory
by `benches/cpu_linear.py`. A choice takes the nearest measured shape and rows (in log distance). Where the kernel
does not reach `FLOOR` of the float speed, the choice says so, and the caller leaves the site float.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from qcompile.codegen.cpu.traced_kernels import takes_nibbles
from qcompile.numerics.format import Format
from qcompile.numerics.int8_matmul import Processor, processor

_STANDS_FOR: dict[Processor, Processor] = {"amx": "vnni", "other": "avx2"}  # processors without a table of their own
FLOOR = 0.95  # of float speed; below it a kernel is "slower"


@dataclass(frozen=True)
class CpuChoice:
    """A kernel and how its time compares with the float product (above 1 is faster)."""

    kernel: str
    ratio: float
    where: str = ""  # the processor that it was measured on, if that is another kind

    @property
    def slower_than_float(self) -> bool:
        """Whether float would be faster."""
        return self.ratio < FLOOR

    def __str__(self) -> str:
        return f"{self.kernel} ({self.ratio:.1f}x float{f' on {self.where}' if self.where else ''})"


@functools.cache
def _table(of: Processor) -> dict[tuple[str, str], list[tuple[int, int, int, float]]]:
    data = json.loads((Path(__file__).parent / f"measured-{of}.json").read_text())
    table: dict[tuple[str, str], list[tuple[int, int, int, float]]] = {}
    for row in data["rows"]:
        ratio = row["float_us"] / row["us"]
        table.setdefault((row["kernel"], row["dtype"]), []).append((row["M"], row["K"], row["N"], ratio))
    return table


def ratio_to_float(kernel: str, dtype: torch.dtype, rows: int, k: int, n: int, of: Processor) -> float:
    """Float time over kernel time at the nearest measured place; 0 if never measured."""
    places = _table(of).get((kernel, str(dtype).removeprefix("torch.")), [])

    def distance(place: tuple[int, int, int, float]) -> float:
        m, pk, pn, _ = place
        return 2 * abs(math.log(m / rows)) + abs(math.log(pk * pn / (k * n)))

    return min(places, key=distance)[3] if places else 0.0


def kernel_of(form: Format, act: str) -> str:
    """The kernel that computes a site exactly as its Q/DQ graph means."""
    if act and Format.parse(act).is_int8_rows:
        if form == Format("int8"):
            return "int8_mm"
        if form.dual and takes_nibbles(form):
            return "dual_mm"
    if not act:
        if form == Format("int8"):
            return "int8_float"
        if takes_nibbles(form):
            return "nibble_float"
    return "dequant_mm"


def choose(form: Format, act: str, dtype: torch.dtype, rows: int, k: int, n: int) -> CpuChoice:
    """The kernel of one site and its measured speed for one number of rows."""
    name, here = kernel_of(form, act), processor()
    of = _STANDS_FOR.get(here, here)
    return CpuChoice(name, ratio_to_float(name, dtype, rows, k, n, of), of if of != here else "")
