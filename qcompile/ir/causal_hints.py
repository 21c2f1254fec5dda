"""PyTorch's transformer stacks look at the values of a mask to choose a kernel; a tracer has shapes only.

nn.TransformerEncoder, nn.TransformerDecoder and their layers compare a mask with the causal one when the caller says
nothing, and hand the answer on as a hint. The mask itself is applied either way, so "not known to be causal" is always
right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def _as_told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """What the caller says of a mask, without a look at its values."""
    return is_causal is True


@contextmanager
def causal_hints_as_told() -> Iterator[None]:
    """While the block runs, transformer stacks take masks for causal only where their caller says so."""
    module, name = nn.modules.transformer, "_detect_is_causal_mask"
    before = getattr(module, name, None)
    if before is None:  # a private function of PyTorch, which may go
        yield
        return
    setattr(module, name, _as_told)
    try:
        yield
    finally:
        setattr(module, name, before)
