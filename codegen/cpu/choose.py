"""Which kernel for which rows: a committed table of measurements, and never slower in silence.

`table.json` holds microseconds of every kernel and of the float product over shapes, rows and
dtypes, measured with weights cold in memory by `benches/cpu_linear.py`. A choice takes the nearest
measured shape and rows (in log distance). Where no kernel reaches `FLOOR` of the float speed, the
choice says so, and the caller leaves the site float.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from qcompile.codegen.cpu.kernels import int4pack_block, int4pack_group
from qcompile.formats import Format

FLOOR = 0.9  # of float speed; below it a kernel is "slower"
FEW = 8  # rows up to which int4pack may run; it costs as much again for each row


@dataclass(frozen=True)
class Choice:
    """A kernel and how its time compares with the float product (above 1 is faster)."""

    kernel: str
    ratio: float

    @property
    def slower(self) -> bool:
        """Whether float would be faster."""
        return self.ratio < FLOOR

    def __str__(self) -> str:
        return f"{self.kernel} ({self.ratio:.1f}x float)"


@functools.lru_cache(maxsize=1)
def _table() -> dict[tuple[str, str], list[tuple[int, int, int, float]]]:
    data = json.loads((Path(__file__).parent / "table.json").read_text())
    table: dict[tuple[str, str], list[tuple[int, int, int, float]]] = {}
    for row in data["rows"]:
        ratio = row["float_us"] / row["us"]
        table.setdefault((row["kernel"], row["dtype"]), []).append((row["M"], row["K"], row["N"], ratio))
    return table


def ratio_to_float(kernel: str, dtype: torch.dtype, rows: int, k: int, n: int) -> float:
    """Float time over kernel time at the nearest measured place; 0 if never measured."""
    places = _table().get((kernel, str(dtype).removeprefix("torch.")), [])

    def distance(place: tuple[int, int, int, float]) -> float:
        m, pk, pn, _ = place
        return 2 * abs(math.log(m / rows)) + abs(math.log(pk * pn / (k * n)))

    return min(places, key=distance)[3] if places else 0.0


def candidates(form: Format, act: str, dtype: torch.dtype, rows: int, k: int, n: int) -> list[str]:
    """The kernels that compute this site exactly as its Q/DQ graph means, best guesses first."""
    integer = act == "int8/row"
    found: list[str] = []
    if integer and form == Format("int8"):
        return ["int8_mm"]
    nibbles = form.dtype == "int4" and form.per == "group" and (integer if form.dual else not act)
    if nibbles:
        packs = int4pack_block() and n % int4pack_block() == 0 and int4pack_group(form, k)
        # Codes up to 127 and integer group scales are exact in bfloat16, float scales are not quite;
        # the result of int4pack is rounded to bfloat16, which a bfloat16 model does anyway.
        if packs and dtype == torch.bfloat16 and rows <= FEW:
            found.append("int4pack")
        if rows == 1:
            found.append("nibble_gemv")
        found.append("nibble_mm" if form.dual else "nibble_dequant_mm")
        return [name for name in found if not (name == "nibble_mm" and rows == 1)]
    if not act and form == Format("int8"):
        if rows == 1:
            found.append("int8_gemv")
        if dtype == torch.bfloat16 and rows <= FEW:
            found.append("int8pack")
    return [*found, "dequant_mm"]


def choose(form: Format, act: str, dtype: torch.dtype, rows: int, k: int, n: int) -> Choice:
    """The fastest measured kernel for one site and one number of rows."""
    options = [
        Choice(name, ratio_to_float(name, dtype, rows, k, n)) for name in candidates(form, act, dtype, rows, k, n)
    ]
    return max(options, key=lambda choice: choice.ratio)
