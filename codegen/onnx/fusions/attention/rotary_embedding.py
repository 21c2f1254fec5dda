"""The rotary embedding (RoPE, arXiv:2104.09864) between a value and an attention: its tables, however it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.fusions.attention.head_channels import (
    HeadChannels,
    fill_channels,
    fixed_sizes,
    split_batch,
)
from qcompile.codegen.onnx.fusions.attention.mismatch import Mismatch
from qcompile.codegen.onnx.fusions.attention.sample_inputs import SampleInputs
from qcompile.codegen.onnx.fusions.partial_evaluation import evaluate
from qcompile.codegen.onnx.ops.attention_ops import apply_rotary

CHUNK = 2048  # positions of a rotary table that are evaluated at once


@dataclass(frozen=True)
class RotaryTables:
    """A rotary embedding of the first R channels of each head.

    Attributes:
        cos: [positions, R / 2] float32.
        sin: [positions, R / 2] float32.
        interleaved: whether pairs are channels (2 i, 2 i + 1); else (i, i + R / 2).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def equals(self, other: RotaryTables | None) -> bool:
        """Whether both rotate alike."""
        return (
            other is not None
            and torch.equal(self.cos, other.cos)
            and torch.equal(self.sin, other.sin)
            and self.interleaved == other.interleaved
        )


class RotaryProbe:
    """The path of queries or keys from the linear that makes them to an attention.

    Args:
        samples: inputs of the decoder.
        node: the queries or keys, [B, H, S, D] or [B H, S, D].
        heads: the channels that they are at the first position, where nothing rotates.
        size: D.
    """

    def __init__(self, samples: SampleInputs, node: fx.Node, heads: HeadChannels, size: int) -> None:
        self.samples, self.node, self.heads, self.size = samples, node, heads, size

    def find(self, positions: int) -> RotaryTables | None:
        """The tables for that many positions; None: no rotary embedding.

        Raises:
            Mismatch: something else depends on the position.
        """
        units = torch.eye(self.size)
        responses = torch.stack([self._respond(unit)[-1] for unit in units])  # at the last position
        mixes = (responses - torch.diag(responses.diagonal())).abs() > 1e-6
        if not mixes.any():
            if not torch.allclose(responses, units, atol=1e-5):
                raise Mismatch(self.node, "channels are scaled by position")
            return None
        rotary, interleaved = self._pairs(mixes)
        first = torch.zeros(self.size)
        first[0 : rotary : 2 if interleaved else 1][: rotary // 2] = 1
        table = self._table(first, positions)
        cos, sin = (table[:, 0:rotary:2], table[:, 1:rotary:2]) if interleaved else table[:, :rotary].chunk(2, -1)
        found = RotaryTables(cos.contiguous(), sin.contiguous(), interleaved)
        self._check(found)
        return found

    def _pairs(self, mixes: Tensor) -> tuple[int, bool]:
        """R and `interleaved`, of which channels mix: [D, D] bool."""
        partner = mixes[0].nonzero().flatten().tolist()
        rotary = int(mixes.any(1).sum())
        if len(partner) != 1 or rotary % 2 or not mixes[:rotary].any(1).all():
            raise Mismatch(self.node, "channels do not rotate in pairs")
        if partner[0] not in (1, rotary // 2):
            raise Mismatch(self.node, f"channel 0 pairs with {partner[0]}, not with 1 or {rotary // 2}")
        return rotary, partner[0] == 1 and rotary > 2

    def _table(self, first: Tensor, positions: int) -> Tensor:
        """The response [positions, D] to the first channels of all pairs."""
        starts = range(0, positions, CHUNK)
        chunks = [self._respond(first, (p, min(CHUNK, positions - p))) for p in starts]
        for start, chunk in zip(starts, chunks, strict=True):
            if not torch.allclose(chunk[:8], self._respond(first, (start, min(8, len(chunk)))), atol=1e-5):
                raise Mismatch(self.node, "the rotary table depends on the length of the text")
        return torch.cat(chunks)

    def _check(self, found: RotaryTables) -> None:
        """That random channels are rotated as the tables say."""
        heads, samples = self.heads, self.samples
        x = torch.randn(math.prod(fixed_sizes(heads.source)), generator=torch.Generator().manual_seed(0))
        given = {**samples.values(), heads.source: fill_channels(heads.source, x)}
        got = split_batch(evaluate(samples.program, self.node, given), samples.batch)[0] / heads.factor
        past, new = samples.past, samples.new
        channels = x[heads.rows].reshape(-1, 1, self.size).expand(-1, new, -1)
        want = apply_rotary(channels, found.cos[past : past + new], found.sin[past : past + new], found.interleaved)
        if not torch.allclose(got, want, atol=1e-4):
            raise Mismatch(self.node, "rotated in another way than by a rotary embedding")

    def _respond(self, unit: Tensor, span: tuple[int, int] | None = None) -> Tensor:
        """Head 0 of `node`, [S, D], if `unit` [D] stands in head 0 of its source at every position.

        Args:
            unit: the channels of one head.
            span: the first position and how many, with batch 1; None: those of the traced example.
        """
        heads, samples = self.heads, self.samples
        batch = samples.batch if span is None else 1
        x = torch.zeros(math.prod(fixed_sizes(heads.source)))
        x[heads.rows[: self.size]] = unit
        if span is None:
            given = {**samples.values(), heads.source: fill_channels(heads.source, x)}
        else:
            past, length = span
            shape = [d if isinstance(d, int) else -1 for d in heads.source.meta["val"].shape]
            channels = x.reshape([1 if d == -1 else d for d in shape])
            dynamic = [i for i, d in enumerate(shape) if d == -1]
            for axis in dynamic:  # batch and tokens, or both in one
                shape[axis] = length if axis == dynamic[-1] else 1
            given = {**samples.values(1, length, past), heads.source: channels.expand(shape).contiguous()}
        return split_batch(evaluate(samples.program, self.node, given), batch)[0, 0] / heads.factor
