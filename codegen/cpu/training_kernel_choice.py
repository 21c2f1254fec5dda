"""Whether a site trains faster in fixed point than in float, from committed measurements.

`measured-training-vnni.json` and `measured-training-avx2.json` hold microseconds of a site's forward and backward pass
in both forms, over shapes of linears and convolutions and two dtypes, on one thread, as `benches/training_shapes.py`
measured them; the second on a processor that had been told to use no more than AVX2. A choice takes the nearest
measured shape of the same kernel, in log distance.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.numerics.code_convolution import WIDE
from qcompile.numerics.int8_matmul import Processor, processor

_STANDS_FOR: dict[Processor, Processor] = {"amx": "vnni", "other": "avx2"}  # processors without a table of their own


class TrainingShape(NamedTuple):
    """The sizes of a site that its speed depends on.

    Attributes:
        rows: M, the rows of x; of a convolution the batch times the positions of its output.
        inputs: input channels, of a convolution those of one group.
        outputs: output channels.
        taps: positions of x that one output reads, 1 of a linear.
        stride: the largest of a convolution.
        dimensions: 0 of a linear, else the spatial ones.
        groups: of channels.
    """

    rows: int
    inputs: int
    outputs: int
    taps: int = 1
    stride: int = 1
    dimensions: int = 0
    groups: int = 1

    @property
    def kernel(self) -> str:
        """What computes it; a convolution with few channels has a form of its own (numerics/code_convolution.py)."""
        if not self.dimensions:
            return "fixed_point_linear"
        if self.groups > 1:
            return "fixed_point_conv_grouped"
        return "fixed_point_conv" if min(self.inputs, self.outputs) >= WIDE else "fixed_point_conv_narrow"

    def distance(self, other: TrainingShape) -> float:
        """How far another shape of the same kernel is, in logarithms; one dimension is as far from two as can be."""
        far = sum(abs(math.log(a / b)) for a, b in zip(self._sizes(), other._sizes(), strict=True))
        return far + 100.0 * (self.dimensions != other.dimensions)

    def _sizes(self) -> tuple[int, ...]:
        return self.rows, self.inputs, self.outputs, self.taps, self.stride, self.groups


@functools.cache
def training_ratios(measured_on: Processor) -> dict[tuple[str, str], dict[TrainingShape, float]]:
    """(kernel, dtype) -> float time / time in fixed point of every shape that was measured."""
    data = json.loads((Path(__file__).parent / f"measured-training-{measured_on}.json").read_text())
    table: dict[tuple[str, str], dict[TrainingShape, float]] = {}
    for row in data["rows"]:
        shape = TrainingShape(*row["shape"])
        table.setdefault((shape.kernel, row["dtype"]), {})[shape] = row["float_us"] / row["us"]
    return table


def choose_training_kernel(shape: TrainingShape, dtype: torch.dtype) -> KernelChoice:
    """The kernel of a site that trains on this processor, and its measured speed.

    Args:
        shape: of the site.
        dtype: of the float site.

    Returns:
        The kernel; without a ratio where nothing was measured, as for float16 and float64.
    """
    here = processor()
    measured_on = _STANDS_FOR.get(here, here)
    known = training_ratios(measured_on).get((shape.kernel, str(dtype).removeprefix("torch.")), {})
    if not known:
        return KernelChoice(shape.kernel)
    ratio = known[min(known, key=shape.distance)]
    elsewhere = f" on {measured_on}" if measured_on != here else ""
    return KernelChoice(shape.kernel, ratio, f"{ratio:.1f}x float{elsewhere}")
