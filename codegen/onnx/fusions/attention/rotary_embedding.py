"""How channels turn with their position between a value and an attention: the tables of a rotary embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.fusions.attention.match_scores import Differs
from qcompile.codegen.onnx.fusions.attention.sample_inputs import Trial
from qcompile.codegen.onnx.fusions.probe import Heads, as_heads, channels, evaluate, filled
from qcompile.codegen.onnx.ops.attention_ops import rotate

STRETCH = 2048  # positions of a rotary table that are probed at once


@dataclass(frozen=True)
class Rotary:
    """cos, sin [positions, R / 2] of the first R channels of each head."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


class Turning:
    """The way of queries or keys from their source to `node`, [B, H, S, D] or [B H, S, D]."""

    def __init__(self, trial: Trial, node: fx.Node, heads: Heads, size: int) -> None:
        self.trial, self.node, self.heads, self.size = trial, node, heads, size

    def turn(self, positions: int) -> Rotary | None:
        """The rotary embedding between source and node: None if there is none."""
        heads, trial, size = self.heads, self.trial, self.size
        units = torch.eye(size)
        matrix = torch.stack([self._respond(unit)[-1] for unit in units])  # at the last position
        off = (matrix - torch.diag(matrix.diagonal())).abs() > 1e-6
        if not off.any():
            if not torch.allclose(matrix, units, atol=1e-5):
                raise Differs(self.node, "channels are scaled by position")
            return None
        partner = off[0].nonzero().flatten().tolist()
        turned = int(off.any(1).sum())
        if len(partner) != 1 or turned % 2 or not off[:turned].any(1).all():
            raise Differs(self.node, "channels do not turn in pairs")
        interleaved = partner[0] == 1 and turned > 2
        if partner[0] not in (1, turned // 2):
            raise Differs(self.node, f"channel 0 pairs with {partner[0]}, not with 1 or {turned // 2}")
        first = torch.zeros(size)
        first[0 : turned : 2 if interleaved else 1][: turned // 2] = 1
        starts = range(0, positions, STRETCH)
        parts = [self._respond(first, (p, min(STRETCH, positions - p))) for p in starts]
        for start, part in zip(starts, parts, strict=True):
            if not torch.allclose(part[:8], self._respond(first, (start, min(8, len(part)))), atol=1e-5):
                raise Differs(self.node, "the rotary table depends on the length of the text")
        long = torch.cat(parts)
        a, b = (long[:, 0:turned:2], long[:, 1:turned:2]) if interleaved else long[:, :turned].chunk(2, -1)
        found = Rotary(a.contiguous(), b.contiguous(), interleaved)
        x = torch.randn(math.prod(channels(heads.source)), generator=torch.Generator().manual_seed(0))
        given = {**trial.inputs(), heads.source: filled(heads.source, x)}
        got = as_heads(evaluate(trial.program, self.node, given), trial.rows)[0] / heads.factor
        past, new = trial.past, trial.new
        flat = x[heads.rows].reshape(-1, 1, size).expand(-1, new, -1)
        want = rotate(flat, found.cos[past : past + new], found.sin[past : past + new], interleaved)
        if not torch.allclose(got, want, atol=1e-4):
            raise Differs(self.node, "turned in another way than a rotary embedding")
        return found

    def _respond(self, unit: Tensor, at: tuple[int, int] | None = None) -> Tensor:
        """Head 0 of node, [S, D], if `unit` [D] stands in head 0 of its source at every position.

        `at`: the first position and how many, in one row; or those of the example.
        """
        heads, trial = self.heads, self.trial
        rows = trial.rows if at is None else 1
        x = torch.zeros(math.prod(channels(heads.source)))
        x[heads.rows[: self.size]] = unit
        if at is None:
            given = {**trial.inputs(), heads.source: filled(heads.source, x)}
        else:
            past, length = at
            shape = [d if isinstance(d, int) else -1 for d in heads.source.meta["val"].shape]
            numbers = x.reshape([1 if d == -1 else d for d in shape])
            free = [i for i, d in enumerate(shape) if d == -1]
            for place in free:  # rows and tokens, or both in one
                shape[place] = length if place == free[-1] else 1
            given = {**trial.inputs(1, length, past), heads.source: numbers.expand(shape).contiguous()}
        return as_heads(evaluate(trial.program, self.node, given), rows)[0, 0] / heads.factor
