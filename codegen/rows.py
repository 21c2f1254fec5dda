"""How many rows a product has, which decides what is fast."""

from __future__ import annotations

import torch
from torch import fx


def rows_of(node: fx.Node) -> tuple[int, bool]:
    """Rows of a value, and whether the number is symbolic (then the hint is given)."""
    rows, symbolic = 1, False
    for size in node.meta["val"].shape[:-1]:
        symbolic |= isinstance(size, torch.SymInt)
        rows *= int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
    return max(rows, 1), symbolic


def regime(node: fx.Node) -> str:
    """How a report names the rows of a value."""
    rows, symbolic = rows_of(node)
    return f"rows {rows}" + (" (dynamic)" if symbolic else "")
