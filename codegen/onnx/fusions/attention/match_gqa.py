"""Attentions with a cache, recognised by what they compute, as one GroupQueryAttention each.

    queries, keys, values   which channel of which value is channel d of head h: channel numbers sent
                            through the graph at position 0, where a rotary embedding turns nothing
    rotary embedding        which channels pair up, and the tables: unit vectors sent through it
    scores                  scale, soft cap, bias (match_scores.py); the mask is compared with a causal one for some lengths
    cache                   keys and values are cat(past, new), new ones behind, and are outputs

What does not fit stays as it is, with the reason: `Obstacle(node, reason)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.attention_scores import AttentionMatmul, products
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.mask import window_and_bias
from qcompile.codegen.onnx.fusions.attention.match_scores import Differs, ScoreFunction
from qcompile.codegen.onnx.fusions.attention.rotary_embedding import Rotary, Turning
from qcompile.codegen.onnx.fusions.attention.sample_inputs import Trial
from qcompile.codegen.onnx.fusions.probe import (
    Heads,
    Unknown,
    as_heads,
    evaluate,
    filled,
    heads_of,
    origin,
    through_layouts,
    token_values,
)
from qcompile.ir.program import Program, hint

aten = torch.ops.aten


@dataclass(frozen=True)
class CachedAttention:
    """One attention and all that GroupQueryAttention has to know about it.

    Attributes:
        node: what it gives, [B, H, S, D] or, `merged`, [B H, S, D].
        cap: of the scores, 0 for none. bias: [H, positions] float32, what every key's place adds to the scores
            of a head, None for nothing.
    """

    node: fx.Node
    merged: bool
    queries: Heads
    keys: Heads
    values: Heads
    past: tuple[fx.Node, fx.Node]
    present: tuple[fx.Node, fx.Node]
    heads: int
    scale: float
    cap: float
    bias: Tensor | None
    window: int
    rotary: Rotary | None


def find_attentions(program: Program, positions: int) -> list[CachedAttention | Obstacle]:
    """All attentions of a decoder whose inputs are ids, attention_mask and a cache.

    Args:
        positions: how many the rotary tables have to hold.
    """
    tokens = token_values(program, program.inputs[1])
    found: list[CachedAttention | Obstacle] = []
    for product in products(program):
        try:
            found.append(_Recogniser(program, product, tokens, positions).result())
        except Differs as difference:
            found.append(Obstacle(difference.args[0].name, difference.args[1]))
        except Unknown as unknown:
            found.append(Obstacle(product.node.name, f"depends on {unknown}"))
        except (RuntimeError, IndexError) as error:  # a table of the model that is shorter than that
            reason = f"cannot be computed for {positions} positions: {str(error).splitlines()[0]}"
            found.append(Obstacle(product.node.name, reason))
    return found


class _Recogniser:
    def __init__(self, program: Program, product: AttentionMatmul, tokens: set[fx.Node], positions: int) -> None:
        self.program, self.product, self.tokens, self.positions = program, product, tokens, positions
        self.trial = Trial(program)
        self.node = product.consumer
        self.scores = ScoreFunction(program, product)
        self.heads, self.size = self.scores.heads, self.scores.size

    def result(self) -> CachedAttention:
        product = self.product
        keys, values = self._cached(product.keys, product.turned), self._cached(product.values)
        queries, turn = self._projected(product.queries, None)
        new_keys, turn = self._projected(keys[1], turn, rotary=True)
        new_values, _ = self._projected(values[1], None, rotary=True)
        if new_values.factor != 1 or new_keys.factor != 1:
            raise Differs(self.node, "keys or values are multiplied by a constant")
        trial = self.trial
        curve = self.scores.curve(trial.inputs(), trial.rows, trial.new, trial.past + trial.new)
        window, bias = window_and_bias(trial, self.scores, self.positions)
        return CachedAttention(
            self.node, self.scores.merged, queries, new_keys, new_values, (keys[0], values[0]), (keys[2], values[2]),
            self.heads, curve.scale * queries.factor, curve.cap, bias, window, turn,
        )  # fmt: skip

    def _cached(self, node: fx.Node, turned: bool = False) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The past input, the new part and their join behind keys or values, heads repeated or not."""
        join = through_layouts(node)
        parts = join.args[0] if join.target is aten.cat.default else []
        if len(parts) != 2 or join.args[1] not in (-2, 2):
            raise Differs(join, "keys or values are not a cache with new ones behind it")
        past = parts[0]
        if past.target is aten.cat.default and len(past.args[0]) == 2:  # an empty tensor in front of the past
            first, past = past.args[0]
            if hint(first.meta["val"].numel()):
                raise Differs(join, "something lies in front of the cache")
        if past not in self.trial.caches:
            raise Differs(join, "the past is not an input of its own")
        groups = join.meta["val"].shape[1]
        numbers = filled(join, torch.arange(groups * self.size))
        got = as_heads(evaluate(self.program, node, {**self.trial.inputs(), join: numbers}), self.trial.rows)
        got = got.transpose(-1, -2) if turned else got
        want = torch.arange(groups * self.size).reshape(groups, -1).repeat_interleave(self.heads // groups, 0)
        if got.shape[1] == groups:
            want = torch.arange(groups * self.size).reshape(groups, -1)
        if not torch.equal(got[0, :, 0], want):
            raise Differs(node, "heads of the cache are not repeated in order")
        return past, parts[1], join

    def _projected(self, node: fx.Node, turn: Rotary | None, rotary: bool = False) -> tuple[Heads, Rotary | None]:
        """Where [B, H, S, D] comes from and how it is turned; with `rotary`, it must be as `turn` (None: not)."""
        heads = heads_of(self.program, node, origin(node, self.tokens), self.trial.inputs(past=0), self.trial.rows)
        if heads is None:
            raise Differs(node, "not the channels of one value at the first position")
        here = Turning(self.trial, node, heads, self.size).turn(self.positions)
        if rotary:
            same = (here is None) == (turn is None)
            if same and here is not None and turn is not None:
                same = torch.equal(here.cos, turn.cos) and torch.equal(here.sin, turn.sin)
                same &= here.interleaved == turn.interleaved
            if not same:
                raise Differs(node, "turned otherwise than the queries, or a value that is turned")
        return heads, here
