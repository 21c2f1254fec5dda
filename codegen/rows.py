"""M, the rows of x that a linear layer multiplies: it decides which kernel is fast."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.ir.size_hint import hint


def rows_of(node: fx.Node) -> tuple[int, bool]:
    """M of a value [.., K], and whether it is symbolic (then M is the hint, the size that was traced first)."""
    rows, symbolic = 1, False
    for size in node.meta["val"].shape[:-1]:
        symbolic |= isinstance(size, torch.SymInt)
        rows *= int(hint(size))
    return max(rows, 1), symbolic


def rows_label(node: fx.Node) -> str:
    """M of a value as a report writes it: "rows 20", or "rows 20 (dynamic)" where it is symbolic."""
    rows, symbolic = rows_of(node)
    return f"rows {rows}" + (" (dynamic)" if symbolic else "")
