"""Attentions with a cache, recognised by what they compute, as one GroupQueryAttention each.

    queries, keys, values   which channel of which value is channel d of head h: channel numbers sent
                            through the graph at position 0, where a rotary embedding turns nothing
    rotary embedding        which channels pair up, and the tables: unit vectors sent through it
    mask                    computed for some lengths and compared with a causal one
    cache                   keys and values are cat(past, new), new ones behind, and are outputs

What does not fit stays as it is, with the reason: `Obstacle(node, reason)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.attention_flow import products
from qcompile.codegen.onnx.operators import causal, rotate
from qcompile.codegen.onnx.probe import Unknown, channels, evaluate, filled, origin, through_layouts, token_values
from qcompile.program import Program, hint
from qcompile.rotation_flow import Obstacle
from qcompile.row_flow import ATTENTION

aten = torch.ops.aten

_STRETCH = 2048  # positions of a rotary table that are probed at once


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values: channel `rows[h D + d]` of `source`, times `factor`."""

    source: fx.Node
    rows: Tensor
    factor: float


@dataclass(frozen=True)
class Rotary:
    """cos, sin [positions, R / 2] of the first R channels of each head."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True)
class CachedAttention:
    """One attention and all that GroupQueryAttention has to know about it."""

    node: fx.Node
    queries: Heads
    keys: Heads
    values: Heads
    past: tuple[fx.Node, fx.Node]
    present: tuple[fx.Node, fx.Node]
    heads: int
    scale: float
    window: int
    rotary: Rotary | None


class _Differs(Exception):
    """Not what the operator computes; args: node, reason."""


def find_attentions(program: Program, positions: int) -> list[CachedAttention | Obstacle]:
    """All attentions of a decoder whose inputs are ids, attention_mask and a cache.

    Args:
        positions: how many the rotary tables have to hold.
    """
    tokens = token_values(program, program.inputs[1])
    found: list[CachedAttention | Obstacle] = []
    for product in products(program):
        node = product.node
        try:
            if node.target is not ATTENTION:
                raise _Differs(node, "spelled out as two products around a softmax (a soft cap, a bias, eager code)")
            found.append(_Recogniser(program, node, tokens, positions).result())
        except _Differs as difference:
            found.append(Obstacle(difference.args[0].name, difference.args[1]))
        except Unknown as unknown:
            found.append(Obstacle(node.name, f"depends on {unknown}"))
    return found


class _Recogniser:
    def __init__(self, program: Program, node: fx.Node, tokens: set[fx.Node], positions: int) -> None:
        self.program, self.node, self.tokens, self.positions = program, node, tokens, positions
        ids, self.mask, *self.caches = program.inputs
        self.ids = ids
        shape = node.args[0].meta["val"].shape
        if not isinstance(shape[1], int) or not isinstance(shape[3], int):
            raise _Differs(node, "the number of heads is not fixed")
        self.heads, self.size = shape[1], shape[3]

    def result(self) -> CachedAttention:
        query, key, value = self.node.args[:3]
        keys, values = self._cached(key), self._cached(value)
        queries, turn = self._projected(query, None)
        new_keys, turn = self._projected(keys[1], turn, rotary=True)
        new_values, _ = self._projected(values[1], None, rotary=True)
        if new_values.factor != 1 or new_keys.factor != 1:
            raise _Differs(self.node, "keys or values are multiplied by a constant")
        window = self._window()
        scale = self.node.kwargs.get("scale") or self.size**-0.5
        return CachedAttention(
            self.node, queries, new_keys, new_values, (keys[0], values[0]), (keys[2], values[2]),
            self.heads, float(scale) * queries.factor, window, turn,
        )  # fmt: skip

    def _cached(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The past input, the new part and their join behind keys or values, heads repeated or not."""
        join = through_layouts(node)
        parts = join.args[0] if join.target is aten.cat.default else []
        if len(parts) != 2 or join.args[1] not in (-2, 2):
            raise _Differs(join, "keys or values are not a cache with new ones behind it")
        past = parts[0]
        if past.target is aten.cat.default and len(past.args[0]) == 2:  # an empty tensor in front of the past
            first, past = past.args[0]
            if hint(first.meta["val"].numel()):
                raise _Differs(join, "something lies in front of the cache")
        if past not in self.caches:
            raise _Differs(join, "the past is not an input of its own")
        groups = join.meta["val"].shape[1]
        got = evaluate(self.program, node, {**self._example(), join: filled(join, torch.arange(groups * self.size))})
        want = torch.arange(groups * self.size).reshape(groups, -1).repeat_interleave(self.heads // groups, 0)
        if got.shape[1] == groups:
            want = torch.arange(groups * self.size).reshape(groups, -1)
        if not torch.equal(got[0, :, 0], want):
            raise _Differs(node, "heads of the cache are not repeated in order")
        return past, parts[1], join

    def _projected(self, node: fx.Node, turn: Rotary | None, rotary: bool = False) -> tuple[Heads, Rotary | None]:
        """Where [B, H, S, D] comes from and how it is turned; with `rotary`, it must be as `turn` (None: not)."""
        source = origin(node, self.tokens)
        start = self._example(past=0)
        numbers = torch.arange(1.0, math.prod(channels(source)) + 1)
        ones = evaluate(self.program, node, {**start, source: filled(source, torch.ones_like(numbers))})[0, :, 0]
        factor = float(ones.flatten()[0])
        found = evaluate(self.program, node, {**start, source: filled(source, numbers)})[0, :, 0] / factor
        rows = found.round().long().flatten() - 1
        if not bool((ones == factor).all()) or not torch.allclose(found, found.round(), atol=1e-3):
            raise _Differs(node, "not the channels of one value at the first position")
        heads = Heads(source, rows, factor)
        here = self._turn(node, heads)
        if rotary:
            same = (here is None) == (turn is None)
            if same and here is not None and turn is not None:
                same = torch.equal(here.cos, turn.cos) and torch.equal(here.sin, turn.sin)
                same &= here.interleaved == turn.interleaved
            if not same:
                raise _Differs(node, "turned otherwise than the queries, or a value that is turned")
        return heads, here

    def _turn(self, node: fx.Node, heads: Heads) -> Rotary | None:
        """The rotary embedding between source and node: None if there is none."""
        units = torch.eye(self.size)
        matrix = torch.stack([self._respond(node, heads, unit)[-1] for unit in units])  # at the last position
        off = (matrix - torch.diag(matrix.diagonal())).abs() > 1e-6
        if not off.any():
            if not torch.allclose(matrix, units, atol=1e-5):
                raise _Differs(node, "channels are scaled by position")
            return None
        partner = off[0].nonzero().flatten().tolist()
        turned = int(off.any(1).sum())
        if len(partner) != 1 or turned % 2 or not off[:turned].any(1).all():
            raise _Differs(node, "channels do not turn in pairs")
        interleaved = partner[0] == 1 and turned > 2
        if partner[0] not in (1, turned // 2):
            raise _Differs(node, f"channel 0 pairs with {partner[0]}, not with 1 or {turned // 2}")
        first = torch.zeros(self.size)
        first[0 : turned : 2 if interleaved else 1][: turned // 2] = 1
        starts = range(0, self.positions, _STRETCH)
        parts = [self._respond(node, heads, first, (p, min(_STRETCH, self.positions - p))) for p in starts]
        for start, part in zip(starts, parts, strict=True):
            if not torch.allclose(part[:8], self._respond(node, heads, first, (start, min(8, len(part)))), atol=1e-5):
                raise _Differs(node, "the rotary table depends on the length of the text")
        long = torch.cat(parts)
        a, b = (long[:, 0:turned:2], long[:, 1:turned:2]) if interleaved else long[:, :turned].chunk(2, -1)
        found = Rotary(a.contiguous(), b.contiguous(), interleaved)
        x = torch.randn(math.prod(channels(heads.source)), generator=torch.Generator().manual_seed(0))
        given = {**self._example(), heads.source: filled(heads.source, x)}
        got = evaluate(self.program, node, given)[0] / heads.factor
        past, new = self._lengths()
        flat = x[heads.rows].reshape(-1, 1, self.size).expand(-1, new, -1)
        want = rotate(flat, found.cos[past : past + new], found.sin[past : past + new], interleaved)
        if not torch.allclose(got, want, atol=1e-4):
            raise _Differs(node, "turned in another way than a rotary embedding")
        return found

    def _respond(self, node: fx.Node, heads: Heads, unit: Tensor, at: tuple[int, int] | None = None) -> Tensor:
        """Head 0 of node, [S, D], if `unit` [D] stands in head 0 of its source at every position.

        `at`: the first position and how many, in one row; or those of the example.
        """
        x = torch.zeros(math.prod(channels(heads.source)))
        x[heads.rows[: self.size]] = unit
        if at is None:
            given = {**self._example(), heads.source: filled(heads.source, x)}
        else:
            past, length = at
            shape = [d if isinstance(d, int) else -1 for d in heads.source.meta["val"].shape]
            numbers = x.reshape([1 if d == -1 else d for d in shape])
            free = [i for i, d in enumerate(shape) if d == -1]
            for place in free:  # rows and tokens, or both in one
                shape[place] = length if place == free[-1] else 1
            given = {**self._example(1, length, past), heads.source: numbers.expand(shape).contiguous()}
        return evaluate(self.program, node, given)[0, 0] / heads.factor

    def _window(self) -> int:
        """The window of the mask, -1 for none."""
        mask = self.node.args[3] if len(self.node.args) > 3 else self.node.kwargs.get("attn_mask")
        if mask is None:
            raise _Differs(self.node, "no mask")
        far = self._allowed(mask, 1, 2, self.positions - 2)[0, 0]
        seen = int(far[-1].sum())
        window = -1 if seen == self.positions else seen
        past, new = self._lengths()
        for rows, length, before in ((2, new, past), (1, 2, self.positions - 2), (2, 6, 0)):
            if not (self._allowed(mask, rows, length, before) == causal(before, length, window)).all():
                raise _Differs(mask, "the mask is not causal")
        padded = torch.ones(2, 6, dtype=torch.long)
        padded[1, 4:] = 0
        got = self._allowed(mask, 2, 6, 0, padded)
        if not (got[0] == causal(0, 6, window)).all() or not (got[1, :, :4] == causal(0, 6, window)[:4]).all():
            raise _Differs(mask, "padding behind a text changes what it sees")
        return window

    def _allowed(self, node: fx.Node, rows: int, new: int, past: int, padding: Tensor | None = None) -> Tensor:
        example = self._example(rows, new, past)
        if padding is not None:
            example[self.mask] = padding
        mask = evaluate(self.program, node, example)
        if mask.dtype is not torch.bool:
            least = torch.finfo(mask.dtype).min / 2
            if bool(((mask != 0) & (mask > least)).any()):
                raise _Differs(node, "scores have a bias (ALiBi)")
            mask = mask == 0
        return mask.expand(rows, -1, -1, -1)

    def _lengths(self) -> tuple[int, int]:
        """Past and new tokens of the example."""
        return hint(self.caches[0].meta["val"].shape[2]), hint(self.ids.meta["val"].shape[1])

    def _example(self, rows: int | None = None, new: int | None = None, past: int | None = None) -> dict[fx.Node, Any]:
        """Inputs of given sizes (those of the example if not given), the caches without memory."""
        before, length = self._lengths()
        rows = hint(self.ids.meta["val"].shape[0]) if rows is None else rows
        new, past = length if new is None else new, before if past is None else past
        given = {
            self.ids: torch.zeros(rows, new, dtype=torch.long),
            self.mask: torch.ones(rows, past + new, dtype=torch.long),
        }
        for cache in self.caches:
            _, groups, _, size = cache.meta["val"].shape
            given[cache] = torch.zeros(1, 1, 1, 1).expand(rows, groups, past, size)
        return given
