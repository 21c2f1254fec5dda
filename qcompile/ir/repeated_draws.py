"""Runs of a model that draws random values can be compared: each draws the same ones, and none of the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeated_draws() -> Iterator[None]:
    """In the block PyTorch's global generators begin with one seed; afterwards they are as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
