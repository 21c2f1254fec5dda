"""A decoder of one attention with a cache, written in eager operators, with variants of each part."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qcompile.ir.capture import from_exported
from qcompile.ir.program import Program

HEADS, SIZE = 2, 16


class SmallDecoder(nn.Module):
    """Two heads of the cache with 16 channels.

    Args:
        between: what stands between the scores and the mask.
        repeat: how the heads of the cache are repeated for four query heads; "one each": for two they are not.
        new_first: new keys stand before the cached ones.
        hide: from the difference of positions (query less key) [S, T], which keys are hidden beside later ones.
    """

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = lambda scores: scores / 4,
        repeat: str = "one each",
        new_first: bool = False,
        hide: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.between, self.repeat, self.new_first, self.hide = between, repeat, new_first, hide
        self.embed = nn.Embedding(16, 32)
        self.heads = HEADS if repeat == "one each" else 2 * HEADS
        sizes = [self.heads * SIZE, HEADS * SIZE, HEADS * SIZE]
        self.linears = nn.ModuleList(nn.Linear(32, size) for size in sizes)
        self.last = nn.Linear(self.heads * SIZE, 32)

    def forward(self, ids, mask, keys, values):
        q, k, v = (linear(self.embed(ids)).unflatten(-1, (-1, SIZE)).transpose(1, 2) for linear in self.linears)
        order = (lambda past, new: [new, past]) if self.new_first else (lambda past, new: [past, new])
        keys, values = torch.cat(order(keys, k), 2), torch.cat(order(values, v), 2)
        new, total = ids.shape[1], mask.shape[1]
        distance = torch.arange(new)[:, None] + total - new - torch.arange(total)
        hidden = distance < 0 if self.hide is None else (distance < 0) | self.hide(distance)
        hidden = hidden | (mask == 0)[:, None, None]
        scores = self.between(q @ self._repeat(keys).transpose(-1, -2))
        weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
        return self.last((weights @ self._repeat(values)).transpose(1, 2).flatten(2)), keys, values

    def _repeat(self, x):
        if self.repeat == "repeat_interleave":
            return x.repeat_interleave(2, 1)
        if self.repeat == "expand":
            return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
        return x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2) if self.repeat == "tile" else x


def trace_small_decoder(model: SmallDecoder) -> Program:
    """Its graph, with dynamic batch, new and past tokens."""
    model = model.eval().requires_grad_(False)
    dynamic = torch.export.Dim.DYNAMIC
    arguments = (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))
    arguments += (torch.randn(2, HEADS, 5, SIZE), torch.randn(2, HEADS, 5, SIZE))
    shapes = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}, {0: dynamic, 2: dynamic})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return from_exported(torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False), model)
