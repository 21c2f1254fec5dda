"""What computes a site on a GPU, how it compares with float, and whether that was measured.

The same contract as codegen/cpu/cpu_kernel_choice.py: a site whose fastest way does not reach FLOOR of the float product's speed
is `slower`, and the caller leaves it float. Times are those of `qcompile kernels tune` on this GPU (measured_times.py). Where
there are none, a site with a kernel is quantized and says that it was not measured; a format without one is
dequantized before every product, which reads more than the float product does, at any number of rows: slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.codegen.triton.launch.measured_times import FEW, by_codes, by_numbers, dequantizes, times
from qcompile.numerics.format import Format

FLOOR = 0.95  # of float speed; below it a way is "slower"
LOWEST = {"fp8": (8, 9)}  # compute capability that has products of a format, and casts to it
NONE = "dequantize, then cuBLAS"

Kind = Literal["", "numbers", "codes"]


@dataclass(frozen=True)
class GpuChoice:
    """What computes a site.

    Attributes:
        kernel: its name. ratio: times as fast as the float product; None where it was not measured.
        has_kernel: False for formats that are dequantized before every product.
    """

    kernel: str
    ratio: float | None = None
    has_kernel: bool = True

    @property
    def slower_than_float(self) -> bool:
        """Whether float would be faster, as far as is known."""
        return not self.has_kernel or (self.ratio is not None and self.ratio < FLOOR)

    def __str__(self) -> str:
        if not self.has_kernel:
            return self.kernel
        word = "not measured on this GPU" if self.ratio is None else f"{self.ratio:.2f}x cuBLAS"
        return f"{self.kernel} ({word})"


def kind_of(form: Format, act: str, dtype: torch.dtype, capability: tuple[int, int]) -> Kind:
    """Which kernels compute a format: of x in numbers, of x in codes, or none.

    Args:
        form: of the weight. act: of x, "" for numbers. dtype: of the model. capability: of the GPU.
    """
    if dtype not in NAMES or capability < (8, 0):
        return ""
    if not act:
        return "numbers" if layout_of(form) is not None else ""
    if capability < LOWEST.get(form.dtype, (8, 0)):
        return ""
    one = form.dual or (form.dtype in ("int8", "fp8") and form.per == "row" and form.zero == "none")
    codes = "int8" if form.dual else form.dtype
    return "codes" if one and act in (f"{codes}/row", f"{codes}/tensor") else ""


def choose(here: Gpu, form: Format, act: str, dtype: torch.dtype, rows: int, k: int, n: int) -> GpuChoice:
    """What computes a product of x [rows, K] with a weight [N, K], and how fast it was measured to be."""
    kind = kind_of(form, act, dtype, here.capability)
    if not kind:
        return GpuChoice(NONE, has_kernel=False)
    if kind == "codes":
        product = by_codes("int8" if form.dual else form.dtype, NAMES[dtype])
        way, name = "kernel", "gemm_a8" + ", int8 of dual codes" * form.dual
    else:
        product = by_numbers(form.bits, form.group, form.zero, NAMES[dtype])
        way = "dequant" if dequantizes(here, product, n, k, rows) else "kernel"
        name = "dequant, then cuBLAS" if way == "dequant" else "gemv_w" if rows <= FEW else "gemm_w"
    found = times(here, product, n, k, rows)
    return GpuChoice(name, found["float"] / found[way] if "float" in found and way in found else None)
