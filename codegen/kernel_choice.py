"""Which kernel computes a site, and whether it is as fast as the float matmul: one answer type for all targets.

A target says how fast its kernels are (cpu_kernel_choice.py, gpu_kernel_choice.py); a site whose kernel does not reach
FLOOR of the float matmul's speed is kept float by the caller (qcompile/backend/float_fallback.py).
"""

from __future__ import annotations

from dataclasses import dataclass

FLOOR = 0.95  # of the float matmul's speed; a kernel below it counts as slower than float


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of one site at one M.

    Attributes:
        kernel: its name, as reports print it.
        ratio: time of the float matmul / time of the kernel, above 1 is faster; None where nothing was measured.
        note: the ratio in words, with its baseline; "" for none.
        has_kernel: False for formats that are dequantized before every matmul, which reads more memory than the float
            matmul does.
    """

    kernel: str
    ratio: float | None = None
    note: str = ""
    has_kernel: bool = True

    @property
    def slower_than_float(self) -> bool:
        """Whether the float matmul would be faster, as far as is known."""
        return not self.has_kernel or (self.ratio is not None and self.ratio < FLOOR)

    def __str__(self) -> str:
        return f"{self.kernel} ({self.note})" if self.note else self.kernel
