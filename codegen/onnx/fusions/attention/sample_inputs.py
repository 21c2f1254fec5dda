"""Inputs of any size to evaluate parts of a decoder's graph with: ids, attention_mask, and caches without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint


class SampleInputs:
    """Inputs (ids [B, S], attention_mask [B, P + S], caches [B, G, P, D] ..) of a decoder's graph.

    Attributes:
        program: the decoder.
        ids: its input.
        mask: its input.
        caches: its inputs, keys and values interleaved, layer by layer.
        batch: B of the traced example.
        past: P of the traced example.
        new: S of the traced example.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ids, self.mask, *self.caches = program.inputs
        self.batch = hint(self.ids.meta["val"].shape[0])
        self.past, self.new = hint(self.caches[0].meta["val"].shape[2]), hint(self.ids.meta["val"].shape[1])

    def values(self, batch: int | None = None, new: int | None = None, past: int | None = None) -> dict[fx.Node, Any]:
        """Zeros, with a mask of ones, of given sizes (those of the traced example where not given)."""
        batch = self.batch if batch is None else batch
        new, past = self.new if new is None else new, self.past if past is None else past
        given = {
            self.ids: torch.zeros(batch, new, dtype=torch.long),
            self.mask: torch.ones(batch, past + new, dtype=torch.long),
        }
        for cache in self.caches:
            _, groups, _, size = cache.meta["val"].shape
            given[cache] = torch.zeros(1, 1, 1, 1).expand(batch, groups, past, size)
        return given
