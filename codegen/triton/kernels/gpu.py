"""What kernels and their launches depend on of a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What launch sizes depend on; an H100 where there is none, so that the interpreter tiles as one would."""

    name: str = "no GPU"
    multiprocessors: int = 132
    capability: tuple[int, int] = (9, 0)
