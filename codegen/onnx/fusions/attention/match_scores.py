"""What an attention computes of its scores before the softmax: a scale, a soft cap, a bias and a mask.

    weights = softmax(cap tanh(scale s / cap) + bias)       without a cap: softmax(scale s + bias)

An attention is one operator, or two matmuls around a softmax in any spelling. The part between the scores and the
softmax is evaluated for chosen scores, and what comes out tells scale, cap and bias. Where a mask hides a token the
bias is -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.attention_scores import AttentionMatmul
from qcompile.codegen.onnx.fusions.attention.mismatch import Mismatch
from qcompile.codegen.onnx.fusions.partial_evaluation import evaluate
from qcompile.codegen.sdpa_call import SDPACall
from qcompile.ir.aten_ops import SDPA, SOFTMAX
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

_HIDDEN = -1e30  # masks add the lowest float or -inf, biases never so little
_LARGE = 1e6  # a score far beyond any soft cap
_PROBES = (-300.0, -20.0, -3.0, -0.5, 0.25, 1.0, 8.0, 60.0, 1000.0)


@dataclass(frozen=True)
class ScoreCurve:
    """cap tanh(scale s / cap), or scale s where cap is 0."""

    scale: float
    cap: float

    def __call__(self, scores: Tensor) -> Tensor:
        """Of scores of any shape."""
        x = scores * self.scale
        return self.cap * torch.tanh(x / self.cap) if self.cap else x


class ScoreFunction:
    """From the scores of one attention to what its softmax is taken of.

    Attributes:
        merged: whether batch and heads are one dimension: scores [B H, S, T]; else [B, H, S, T].
        batch: B of the traced example.
        heads: H.
        size: D.
        softmax: the node, or None in a fused attention.

    Raises:
        Mismatch: heads or their size are dynamic.
    """

    def __init__(self, program: Program, product: AttentionMatmul) -> None:
        self.program, self.product = program, product
        shape = product.queries.meta["val"].shape
        self.merged = len(shape) == 3
        self.batch = hint((program.inputs[0].meta["val"] if self.merged else product.queries.meta["val"]).shape[0])
        self.heads: int = hint(shape[0]) // self.batch if self.merged else shape[1]
        self.size: int = shape[-1]
        if len(shape) not in (3, 4) or not isinstance(self.heads, int) or not isinstance(self.size, int):
            raise Mismatch(product.node, "the number of heads is not fixed")
        self.softmax = None if product.node.target is SDPA else _softmax_behind(product)

    def split_batch(self, value: Tensor, batch: int) -> Tensor:
        """[B H, ..] as [B, H, ..]; a value [B, H, ..] as it is."""
        return value.unflatten(0, (batch, -1)) if self.merged else value

    def bias(self, given: Mapping[fx.Node, Any], batch: int, new: int, total: int) -> Tensor:
        """What is added to the scores [batch, H, new, total], float64; -inf where a token is hidden.

        Args:
            given: values of the inputs, of these sizes.
            batch: B.
            new: S.
            total: T.
        """
        found = self._logits(given, torch.zeros(batch, self.heads, new, total, dtype=torch.float64))
        return found.masked_fill(found < _HIDDEN, -torch.inf)

    def curve(self, given: Mapping[fx.Node, Any], batch: int, new: int, total: int) -> ScoreCurve:
        """Scale and cap; arguments as of `bias`.

        Raises:
            Mismatch: the softmax reads another function of the scores.
        """
        bias = self.bias(given, batch, new, total)
        visible = bias > -torch.inf
        sizes = (batch, self.heads, new, total)

        def at(score: float) -> float:
            found = (self._logits(given, torch.full(sizes, score, dtype=torch.float64)) - bias)[visible]
            return float(found.mean())

        top = at(_LARGE)
        if at(-_LARGE) * top >= 0 or top < 0:
            raise Mismatch(self.product.node, "the scores are not scaled by a positive number")
        cap = 0.0 if abs(top / at(_LARGE / 2) - 2) < 1e-3 else top
        scale = top / _LARGE
        if cap:
            knee = cap / (at(1e-2) * 1e2)  # about where the scaled score is the cap: there tanh bends most
            scale = cap * math.atanh(min(at(knee) / cap, 1 - 1e-9)) / knee
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(sizes, generator=generator, dtype=torch.float64) * 4 / scale
        found = ScoreCurve(scale, cap)
        probes = [torch.full(sizes, score / scale, dtype=torch.float64) for score in _PROBES]
        for scores in (*probes, mixed):
            got, want = (self._logits(given, scores) - bias)[visible], found(scores)[visible]
            if not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
                raise Mismatch(self.product.node, "the softmax reads more of the scores than a scale and a soft cap")
        self._check_weights(given, mixed)
        return found

    def _logits(self, given: Mapping[fx.Node, Any], scores: Tensor) -> Tensor:
        """What the softmax is taken of, float64."""
        node = self.product.node
        if self.softmax is None:
            return scores * SDPACall.of(node).score_scale + self._sdpa_mask(given, scores)
        values = {**given, node: scores.flatten(0, 1) if self.merged else scores}
        found = evaluate(self.program, self.softmax.args[0], values)
        found = found if found.ndim == 4 else self.split_batch(found, len(scores))
        if found.shape != scores.shape:
            raise Mismatch(self.softmax, "a softmax of more than the scores")
        return found.double()

    def _sdpa_mask(self, given: Mapping[fx.Node, Any], scores: Tensor) -> Tensor:
        """What a fused attention adds to its scores."""
        call = SDPACall.of(self.product.node)
        if call.is_causal:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        elif call.attn_mask is None:
            return torch.zeros((), dtype=torch.float64)
        else:
            mask = evaluate(self.program, call.attn_mask, given)
        if mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        return mask.double()

    def _check_weights(self, given: Mapping[fx.Node, Any], scores: Tensor) -> None:
        """That the values are multiplied by the softmax and nothing else."""
        if self.softmax is None:
            return
        values = {**given, self.product.node: scores.flatten(0, 1) if self.merged else scores}
        weights = self.product.value_product.args[1 - self.product.values_at]
        got = self.split_batch(evaluate(self.program, weights, values), len(scores))
        want = self._logits(given, scores).softmax(-1)
        if got.shape != want.shape or not torch.allclose(got.double(), want, atol=1e-5):
            raise Mismatch(self.product.value_product, "the values are multiplied by something else than the softmax")


def _softmax_behind(product: AttentionMatmul) -> fx.Node:
    node = product.node
    while node.target not in SOFTMAX:
        node = next(iter(node.users))
    if node.args[1] not in (-1, node.meta["val"].ndim - 1):
        raise Mismatch(node, "a softmax over something else than the keys")
    return node
