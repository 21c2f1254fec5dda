"""Which CPU kernel computes which format, and how fast, from committed measurements.

`measured-amx.json`, `measured-vnni.json` and `measured-avx2.json` hold microseconds of every kernel and of the float
matmul over shapes, M and dtypes, on a processor with AMX tiles, on one with 8-bit dot products and on one without,
measured with weights cold in memory by `benches/cpu_linear.py`. A choice takes the nearest measured (M, K, N), in log
distance.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from qcompile.codegen.cpu.amx_tiles import has_amx_tiles
from qcompile.codegen.cpu.linear_weights import takes_nibbles
from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.numerics.format import Format
from qcompile.numerics.int8_matmul import MAX_K, Processor, processor

_STANDS_FOR: dict[Processor, Processor] = {"other": "avx2"}  # processors without a table of their own


class Measured(NamedTuple):
    """One measured shape: x [M, K] times a weight [N, K], and float time / kernel time."""

    m: int
    k: int
    n: int
    ratio: float


@functools.cache
def _table(measured_on: Processor) -> dict[tuple[str, str], list[Measured]]:
    """(kernel, dtype) -> all that was measured of it."""
    data = json.loads((Path(__file__).parent / f"measured-{measured_on}.json").read_text())
    table: dict[tuple[str, str], list[Measured]] = {}
    for row in data["rows"]:
        ratio = row["float_us"] / row["us"]
        table.setdefault((row["kernel"], row["dtype"]), []).append(Measured(row["M"], row["K"], row["N"], ratio))
    return table


def ratio_to_float(kernel: str, dtype: torch.dtype, m: int, k: int, n: int, measured_on: Processor) -> float:
    """Float time / kernel time at the nearest measured shape; 0 if the kernel was never measured."""
    known = _table(measured_on).get((kernel, str(dtype).removeprefix("torch.")), [])

    def distance(other: Measured) -> float:
        return 2 * abs(math.log(other.m / m)) + abs(math.log(other.k * other.n / (k * n)))

    return min(known, key=distance).ratio if known else 0.0


def kernel_of(form: Format, act: str) -> str:
    """The kernel that computes a site exactly as its Q/DQ graph means.

    Args:
        form: format of the weight.
        act: format of x, "" where it is float.
    """
    if act and Format.parse(act).is_int8_rows:
        if form.is_int8_rows and form.per == "row":
            return "int8_linear"
        if takes_nibbles(form) and not form.is_float:
            return "dual_linear" if form.dual else "group_linear"
    if not act:
        if form.is_int8_rows and form.per == "row":
            return "int8_float_linear"
        if takes_nibbles(form):
            return "table_linear"
    return "dequant_mm"


def choose_cpu_kernel(form: Format, act: str, dtype: torch.dtype, m: int, k: int, n: int) -> KernelChoice:
    """The kernel of x [M, K] times a weight [N, K] on this processor, and its measured speed.

    Args:
        form: format of the weight.
        act: format of x, "" where it is float.
        dtype: of the model.
        m: rows of x.
        k: input channels.
        n: output channels.
    """
    fits = k <= MAX_K and dtype != torch.float64
    kernel, here = kernel_of(form, act) if fits else "dequant_mm", processor()
    if kernel == "dequant_mm":  # the float matmul, and a pass over the weight before it
        return KernelChoice(kernel, has_kernel=False)
    measured_on = _STANDS_FOR.get(here, here)
    if here == "amx" and not has_amx_tiles():  # the system refuses them: the operators run as on such a processor
        measured_on = "vnni"
    ratio = ratio_to_float(kernel, dtype, m, k, n, measured_on)
    elsewhere = f" on {measured_on}" if measured_on != here else ""
    return KernelChoice(kernel, ratio, f"{ratio:.1f}x float{elsewhere}")
