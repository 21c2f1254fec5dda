"""What an attention makes of its scores before the softmax: a scale, a soft cap, a bias and a mask.

    weights = softmax(cap tanh(scale s / cap) + bias)       without a cap: softmax(scale s + bias)

An attention is one operator, or two products around a softmax in any spelling. The part between the scores
and the softmax is computed for chosen scores, and what comes out says scale, cap and bias. A place
that a mask hides has the bias -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.attention_scores import AttentionMatmul
from qcompile.analysis.channel_origin import ATTENTION
from qcompile.codegen.onnx.fusions.probe import evaluate
from qcompile.ir.program import Program, hint

aten = torch.ops.aten

_HIDDEN = -1e30  # what masks add is the least float or -inf, what biases add is not
_LARGE = 1e6  # a score that no cap lets through
_CURVE = (-300.0, -20.0, -3.0, -0.5, 0.25, 1.0, 8.0, 60.0, 1000.0)


class Differs(Exception):
    """Not what an operator computes; args: node, reason."""


@dataclass(frozen=True)
class Curve:
    """cap tanh(scale s / cap), or scale s where cap is 0."""

    scale: float
    cap: float

    def __call__(self, scores: Tensor) -> Tensor:
        """Of scores of any shape."""
        x = scores * self.scale
        return self.cap * torch.tanh(x / self.cap) if self.cap else x


class ScoreFunction:
    """One attention: H heads of D channels, its scores [B, H, S, T] or, heads and rows in one, [B H, S, T].

    Raises:
        Differs: heads or their size are not fixed.
    """

    def __init__(self, program: Program, product: AttentionMatmul) -> None:
        self.program, self.product = program, product
        shape = product.queries.meta["val"].shape
        self.merged = len(shape) == 3
        self.rows = hint((program.inputs[0].meta["val"] if self.merged else product.queries.meta["val"]).shape[0])
        self.heads: int = hint(shape[0]) // self.rows if self.merged else shape[1]
        self.size: int = shape[-1]
        if len(shape) not in (3, 4) or not isinstance(self.heads, int) or not isinstance(self.size, int):
            raise Differs(product.node, "the number of heads is not fixed")
        self.softmax = None if product.node.target is ATTENTION else _softmax(product)

    def split(self, value: Tensor, rows: int) -> Tensor:
        """A value [B, H, ..] as it is, [B H, ..] as [B, H, ..]."""
        return value.unflatten(0, (rows, -1)) if self.merged else value

    def bias(self, given: Mapping[fx.Node, Any], rows: int, new: int, total: int) -> Tensor:
        """What is added to the scores [rows, H, new, total], float64; -inf where a token is not seen."""
        found = self._logits(given, torch.zeros(rows, self.heads, new, total, dtype=torch.float64))
        return found.masked_fill(found < _HIDDEN, -torch.inf)

    def curve(self, given: Mapping[fx.Node, Any], rows: int, new: int, total: int) -> Curve:
        """Scale and cap.

        Raises:
            Differs: the softmax sees something else of the scores.
        """
        bias = self.bias(given, rows, new, total)
        seen = bias > -torch.inf
        sizes = (rows, self.heads, new, total)

        def at(score: float) -> float:
            found = (self._logits(given, torch.full(sizes, score, dtype=torch.float64)) - bias)[seen]
            return float(found.mean())

        top = at(_LARGE)
        if at(-_LARGE) * top >= 0 or top < 0:
            raise Differs(self.product.node, "the scores are not scaled by a positive number")
        cap = 0.0 if abs(top / at(_LARGE / 2) - 2) < 1e-3 else top
        scale = top / _LARGE
        if cap:
            bend = cap / (at(1e-2) * 1e2)  # about where the scaled score is the cap: there it bends most
            scale = cap * math.atanh(min(at(bend) / cap, 1 - 1e-9)) / bend
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(sizes, generator=generator, dtype=torch.float64) * 4 / scale
        found = Curve(scale, cap)
        checks = [torch.full(sizes, score / scale, dtype=torch.float64) for score in _CURVE]
        for scores in (*checks, mixed):
            got, want = (self._logits(given, scores) - bias)[seen], found(scores)[seen]
            if not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
                raise Differs(self.product.node, "the softmax sees more of the scores than a scale and a soft cap")
        self._check_weights(given, mixed)
        return found

    def _logits(self, given: Mapping[fx.Node, Any], scores: Tensor) -> Tensor:
        """What the softmax is taken of, float64."""
        node = self.product.node
        if self.softmax is None:
            return scores * (node.kwargs.get("scale") or self.size**-0.5) + self._mask(given, scores)
        values = {**given, node: scores.flatten(0, 1) if self.merged else scores}
        found = evaluate(self.program, self.softmax.args[0], values)
        found = found if found.ndim == 4 else self.split(found, len(scores))
        if found.shape != scores.shape:
            raise Differs(self.softmax, "a softmax of more than the scores")
        return found.double()

    def _mask(self, given: Mapping[fx.Node, Any], scores: Tensor) -> Tensor:
        node = self.product.node
        args = [*node.args, None, None, None][3:6]
        mask, is_causal = args[0] or node.kwargs.get("attn_mask"), args[2] or node.kwargs.get("is_causal")
        if is_causal:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        elif mask is None:
            return torch.zeros((), dtype=torch.float64)
        else:
            mask = evaluate(self.program, mask, given)
        if mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        return mask.double()

    def _check_weights(self, given: Mapping[fx.Node, Any], scores: Tensor) -> None:
        """That the values are multiplied with the softmax and nothing else."""
        if self.softmax is None:
            return
        values = {**given, self.product.node: scores.flatten(0, 1) if self.merged else scores}
        read = self.product.consumer.args[1 - self.product.values_at]
        got = self.split(evaluate(self.program, read, values), len(scores))
        want = self._logits(given, scores).softmax(-1)
        if got.shape != want.shape or not torch.allclose(got.double(), want, atol=1e-5):
            raise Differs(self.product.consumer, "the values are multiplied with something else than the softmax")


def _softmax(product: AttentionMatmul) -> fx.Node:
    node = product.node
    while node.target not in (aten.softmax.int, aten._softmax.default):
        node = next(iter(node.users))
    if node.args[1] not in (-1, node.meta["val"].ndim - 1):
        raise Differs(node, "a softmax over something else than the keys")
    return node
