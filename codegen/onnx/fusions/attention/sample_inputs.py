"""Inputs of any size to try parts of a decoder's graph with: ids, attention_mask and caches without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir.program import Program, hint


class Trial:
    """A decoder's graph and its inputs (ids [B, S], attention_mask [B, P + S], caches [B, G, P, D] ..)."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ids, self.mask, *self.caches = program.inputs
        self.rows = hint(self.ids.meta["val"].shape[0])  # of the example, as are these:
        self.past, self.new = hint(self.caches[0].meta["val"].shape[2]), hint(self.ids.meta["val"].shape[1])

    def inputs(self, rows: int | None = None, new: int | None = None, past: int | None = None) -> dict[fx.Node, Any]:
        """Inputs of given sizes (those of the example if not given)."""
        rows = self.rows if rows is None else rows
        new, past = self.new if new is None else new, self.past if past is None else past
        given = {
            self.ids: torch.zeros(rows, new, dtype=torch.long),
            self.mask: torch.ones(rows, past + new, dtype=torch.long),
        }
        for cache in self.caches:
            _, groups, _, size = cache.meta["val"].shape
            given[cache] = torch.zeros(1, 1, 1, 1).expand(rows, groups, past, size)
        return given
