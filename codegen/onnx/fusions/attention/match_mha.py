"""Attentions without a cache, recognised by what they compute, as one MultiHeadAttention each.

    queries, keys, values   channels of a product in some order, or else whatever they are, heads laid in a row
    scores                  scale and bias (match_scores.py); a soft cap has no operator here
    mask                    none, causal, an input that says which tokens are padding, or any bias of the graph

What does not fit stays as it is, with the reason: `Obstacle(node, reason)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.analysis.attention_scores import AttentionMatmul, products
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.match_scores import Differs, ScoreFunction
from qcompile.codegen.onnx.fusions.probe import (
    Heads,
    Unknown,
    evaluate,
    heads_of,
    inputs_behind,
    origin,
    token_values,
)
from qcompile.codegen.onnx.ops.attention_ops import causal
from qcompile.ir.program import Program, hint

aten = torch.ops.aten

_TRIES = 3  # random paddings that a mask is compared with


@dataclass(frozen=True)
class PlainAttention:
    """One attention and all that MultiHeadAttention has to know about it.

    Attributes:
        node: what it gives, [B, H, S, D] or [B H, S, D].
        parts: queries, keys and values, as channels of a value or as a value [B, H, S, D] (turned: [B, H, D, S]).
        padding: the input [B, T] that is 0 where nobody looks. added: nodes whose sum is added to the scores.
    """

    node: fx.Node
    parts: tuple[Heads | fx.Node, ...]
    turned: bool
    heads: int
    scale: float
    is_causal: bool
    padding: fx.Node | None
    added: tuple[fx.Node, ...]


def find_plain_attentions(program: Program) -> list[PlainAttention | Obstacle]:
    """All attentions of a program that keeps no cache."""
    found: list[PlainAttention | Obstacle] = []
    for product in products(program):
        try:
            found.append(_Recogniser(program, product).result())
        except Differs as difference:
            found.append(Obstacle(difference.args[0].name, difference.args[1]))
        except Unknown as unknown:
            found.append(Obstacle(product.node.name, f"depends on {unknown}"))
    return found


class _Recogniser:
    def __init__(self, program: Program, product: AttentionMatmul) -> None:
        self.program, self.product = program, product
        self.scores = ScoreFunction(program, product)
        self.new = product.queries.meta["val"].shape[-2]
        self.total = product.values.meta["val"].shape[-2]

    def result(self) -> PlainAttention:
        product, scores = self.product, self.scores
        three = (product.queries, product.keys, product.values)
        if any(len(t.meta["val"].shape) == 4 and t.meta["val"].shape[1] != scores.heads for t in three):
            raise Differs(product.node, "queries share keys, which MultiHeadAttention does not know")
        parts = [self._part(t, turned=product.turned and t is product.keys) for t in three]
        given = self._inputs()
        sizes = (scores.rows, hint(self.new), hint(self.total))
        curve = scores.curve(given, *sizes)
        if curve.cap:
            raise Differs(product.node, "a soft cap on the scores: only GroupQueryAttention knows one, with a cache")
        scale = curve.scale
        for part in parts[:2]:
            scale *= part.factor if isinstance(part, Heads) else 1
        if isinstance(parts[2], Heads) and parts[2].factor != 1:
            raise Differs(product.node, "values are multiplied by a constant")
        causal, padding, added = self._mask()
        return PlainAttention(
            product.consumer, tuple(parts), product.turned, scores.heads, scale, causal, padding, added
        )  # fmt: skip

    def _part(self, node: fx.Node, turned: bool) -> Heads | fx.Node:
        """Queries, keys or values as channels of a value, if they are that; else as they are."""
        if not turned:
            source = origin(node, token_values(self.program, None))
            shape = getattr(source.meta["val"], "shape", ())
            known = len(shape) == 3 or (len(shape) == 2 and self.program.inputs[0].meta["val"].ndim == 2)
            if known and isinstance(shape[-1], int):
                heads = heads_of(self.program, node, source, self._inputs(), self.scores.rows, everywhere=True)
                if heads is not None:
                    return heads
        if self.scores.merged:
            raise Differs(node, "rows and heads are one dimension, and not the channels of a product")
        return node

    def _mask(self) -> tuple[bool, fx.Node | None, tuple[fx.Node, ...]]:
        """Whether it is causal, the input that says which tokens are padding, nodes of what else is added."""
        scores, node = self.scores, self.product.node
        before = node.args[3] if scores.softmax is None and len(node.args) > 3 else node.kwargs.get("attn_mask")
        before = before if scores.softmax is None else scores.softmax.args[0]
        inputs = set() if before is None else inputs_behind(self.program, before, node)
        if len(inputs) <= 1 and all(self._is_padding(n) for n in inputs):
            padding = next(iter(inputs), None)
            for is_causal in (False, True):
                if all(self._hides(size, padding, is_causal) for size in self._sizes()):
                    return is_causal, padding, ()
        return False, None, self._added(before)

    def _is_padding(self, node: fx.Node) -> bool:
        value = node.meta["val"]
        return value.ndim == 2 and [hint(d) for d in value.shape] == [self.scores.rows, hint(self.total)]

    def _sizes(self) -> list[int]:
        """Lengths to try: the example's, and others if it is free."""
        free = not isinstance(self.total, int)
        return [hint(self.total), *([2, hint(self.total) + 3] if free else [])]

    def _hides(self, length: int, padding: fx.Node | None, is_causal: bool) -> bool:
        """Whether all that is added to the scores is what hides padding, and what comes later."""
        new = length if not isinstance(self.new, int) else self.new
        generator = torch.Generator().manual_seed(length)
        for _ in range(_TRIES):
            given = self._inputs(length)
            seen = torch.ones(self.scores.rows, 1, new, length, dtype=torch.bool)
            if padding is not None:
                kept = torch.rand(self.scores.rows, length, generator=generator) < 0.6
                kept[:, 0] = True  # a text of padding only: nothing is asked of it
                given[padding] = kept.to(given[padding].dtype)
                seen = seen & kept[:, None, None]
            if is_causal:
                seen = seen & causal(0, length, -1)[:new]
            got = self.scores.bias(given, self.scores.rows, new, length)
            if not torch.equal(got, torch.zeros_like(got).masked_fill(~seen, -torch.inf)):
                return False
        return True

    def _added(self, before: fx.Node | None) -> tuple[fx.Node, ...]:
        """Nodes whose sum is added to the scores."""
        scores, node = self.scores, self.product.node
        if before is None:
            raise Differs(node, "a causal mask of another length than the keys")
        if scores.softmax is None:
            self._check_every_row_sees(before)
            return (before,)
        found, at = [], before
        while at is not node:
            way = [n for n in at.all_input_nodes if node in _upstream(n)]
            if len(way) != 1:
                raise Differs(at, "the bias of the scores depends on them")
            if at.target is aten.add.Tensor:
                found += [n for n in at.all_input_nodes if n is not way[0]]
            at = way[0]
        given = self._inputs()
        sizes = (scores.rows, hint(self.new), hint(self.total))
        whole = sum((evaluate(self.program, n, given).double() for n in found), torch.zeros(()))
        want = scores.bias(given, *sizes)
        if not torch.allclose(torch.where(whole < -1e30, -torch.inf, whole).expand_as(want), want, atol=1e-5):
            raise Differs(node, "the bias of the scores is no value of its own")
        return tuple(found)

    def _check_every_row_sees(self, mask: fx.Node) -> None:
        """SDPA gives zeros for a token that sees none; a softmax of equal numbers does not."""
        if mask.meta["val"].dtype is not torch.bool:
            return
        for padding in filter(self._is_padding, inputs_behind(self.program, mask, self.product.node)):
            given = self._inputs()
            kept = torch.zeros_like(given[padding])
            kept[:, 0] = 1
            bias = self.scores.bias({**given, padding: kept}, self.scores.rows, hint(self.new), hint(self.total))
            if bool((bias == -torch.inf).all(-1).any()):
                raise Differs(mask, "beside padding, tokens may see none: only SDPA knows what comes of that")

    def _inputs(self, length: int | None = None) -> dict[fx.Node, Any]:
        """Inputs of zeros and ones, of the example's sizes or with `length` tokens."""
        given = {}
        for node in self.program.inputs:
            value = node.meta["val"]
            sizes = [hint(d) for d in value.shape]
            for place, size in enumerate(value.shape):
                if place and length is not None and not isinstance(size, int) and hint(size) == hint(self.total):
                    sizes[place] = length
            given[node] = (torch.zeros if value.is_floating_point() else torch.ones)(sizes, dtype=value.dtype)
        return given


def _upstream(node: fx.Node) -> set[fx.Node]:
    found, stack = set[fx.Node](), [node]
    while stack:
        top = stack.pop()
        if top not in found:
            found.add(top)
            stack.extend(top.all_input_nodes)
    return found
