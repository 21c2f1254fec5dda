"""What kernels and their launches depend on of a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU; by default an H100's sizes, so that the interpreter tiles as one would where there is no GPU.

    Attributes:
        name: as the driver gives it; measurements are kept under it.
        multiprocessors: how many.
        capability: compute capability, (9, 0) for sm_90.
    """

    name: str = "no GPU"
    multiprocessors: int = 132
    capability: tuple[int, int] = (9, 0)
