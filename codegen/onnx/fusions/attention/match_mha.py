"""Attentions without a KV cache, recognized by what they compute, as one MultiHeadAttention each.

    queries, keys, values   channels of a linear in some order, or else any value, whose heads are flattened
    scores                  scale and bias (match_scores.py); a soft cap has no operator here
    mask                    none, causal, an input that says which tokens are padding, or any bias of the graph

What does not match is skipped, with the reason: `Obstacle(node, reason)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.analysis.attention_scores import AttentionMatmul, attention_matmuls
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.head_channels import HeadChannels, channel_source, find_head_channels
from qcompile.codegen.onnx.fusions.attention.match_scores import ScoreFunction
from qcompile.codegen.onnx.fusions.attention.mismatch import Mismatch, match_or_obstacle
from qcompile.codegen.onnx.fusions.partial_evaluation import evaluate, inputs_behind, token_dependent_nodes
from qcompile.codegen.onnx.ops.attention_ops import causal_mask
from qcompile.codegen.sdpa_call import SDPACall
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

aten = torch.ops.aten

_TRIES = 3  # random paddings that a mask is compared with


@dataclass(frozen=True)
class MultiHeadAttentionMatch:
    """One attention and all that MultiHeadAttention needs to know about it.

    Attributes:
        node: what it returns, [B, H, S, D] or [B H, S, D].
        qkv: queries, keys and values, as channels of a value or as a value [B, H, S, D].
        keys_transposed: whether keys that are a value are [B, H, D, S].
        heads: H.
        scale: of the scores.
        is_causal: token i attends to tokens up to i.
        padding_mask: the input [B, T] that is 0 at padding, or None.
        biases: nodes whose sum is added to the scores.
    """

    node: fx.Node
    qkv: tuple[HeadChannels | fx.Node, ...]
    keys_transposed: bool
    heads: int
    scale: float
    is_causal: bool
    padding_mask: fx.Node | None
    biases: tuple[fx.Node, ...]


def match_multi_head_attentions(program: Program) -> list[MultiHeadAttentionMatch | Obstacle]:
    """All attentions of a program that keeps no cache."""
    return [
        match_or_obstacle(product, MultiHeadAttentionMatcher(program, product).match)
        for product in attention_matmuls(program)
    ]


class MultiHeadAttentionMatcher:
    """Matches one attention."""

    def __init__(self, program: Program, product: AttentionMatmul) -> None:
        self.program, self.product = program, product
        self.new = product.queries.meta["val"].shape[-2]
        self.total = product.values.meta["val"].shape[-2]

    def match(self) -> MultiHeadAttentionMatch:
        """The match.

        Raises:
            Mismatch: MultiHeadAttention computes something else.
        """
        product = self.product
        scores = self.scores = ScoreFunction(self.program, product)
        operands = (product.queries, product.keys, product.values)
        if any(len(t.meta["val"].shape) == 4 and t.meta["val"].shape[1] != scores.heads for t in operands):
            raise Mismatch(product.node, "queries share keys, which MultiHeadAttention does not support")
        qkv = [self._head_channels(t, is_transposed=product.keys_transposed and t is product.keys) for t in operands]
        curve = scores.curve(self._inputs(), scores.batch, hint(self.new), hint(self.total))
        if curve.cap:
            raise Mismatch(product.node, "a soft cap on the scores: only GroupQueryAttention has one, with a cache")
        scale = curve.scale
        for part in qkv[:2]:
            scale *= part.factor if isinstance(part, HeadChannels) else 1
        if isinstance(qkv[2], HeadChannels) and qkv[2].factor != 1:
            raise Mismatch(product.node, "values are multiplied by a constant")
        is_causal, padding_mask, biases = self._mask()
        return MultiHeadAttentionMatch(
            node=product.value_product,
            qkv=tuple(qkv),
            keys_transposed=product.keys_transposed,
            heads=scores.heads,
            scale=scale,
            is_causal=is_causal,
            padding_mask=padding_mask,
            biases=biases,
        )

    def _head_channels(self, node: fx.Node, is_transposed: bool) -> HeadChannels | fx.Node:
        """Queries, keys or values as channels of a value, if they are that; else as they are."""
        if not is_transposed:
            source = channel_source(node, token_dependent_nodes(self.program, None))
            shape = getattr(source.meta["val"], "shape", ())
            known = len(shape) == 3 or (len(shape) == 2 and self.program.inputs[0].meta["val"].ndim == 2)
            if known and isinstance(shape[-1], int):
                given, batch = self._inputs(), self.scores.batch
                heads = find_head_channels(self.program, node, source, given, batch, all_positions=True)
                if heads is not None:
                    return heads
        if self.scores.merged:
            raise Mismatch(node, "batch and heads are one dimension, and not the channels of a linear")
        return node

    def _mask(self) -> tuple[bool, fx.Node | None, tuple[fx.Node, ...]]:
        """`is_causal`, `padding_mask` and `biases` of the match."""
        node, softmax = self.product.node, self.scores.softmax
        logits: fx.Node | None = SDPACall.of(node).attn_mask if softmax is None else softmax.args[0]
        inputs = set() if logits is None else inputs_behind(self.program, logits, node)
        if len(inputs) <= 1 and all(self._may_be_padding_mask(n) for n in inputs):
            padding_mask = next(iter(inputs), None)
            for is_causal in (False, True):
                if all(self._hides_only(length, padding_mask, is_causal) for length in self._lengths()):
                    return is_causal, padding_mask, ()
        return False, None, self._biases(logits)

    def _may_be_padding_mask(self, node: fx.Node) -> bool:
        value = node.meta["val"]
        return value.ndim == 2 and [hint(d) for d in value.shape] == [self.scores.batch, hint(self.total)]

    def _lengths(self) -> list[int]:
        """Lengths to try: the traced example's, and others if it is dynamic."""
        is_dynamic = not isinstance(self.total, int)
        return [hint(self.total), *([2, hint(self.total) + 3] if is_dynamic else [])]

    def _hides_only(self, length: int, padding_mask: fx.Node | None, is_causal: bool) -> bool:
        """Whether all that is added to the scores is what hides padding and, if causal, later tokens."""
        new = length if not isinstance(self.new, int) else self.new
        generator = torch.Generator().manual_seed(length)
        for _ in range(_TRIES):
            given = self._inputs(length)
            visible = torch.ones(self.scores.batch, 1, new, length, dtype=torch.bool)
            if padding_mask is not None:
                kept = torch.rand(self.scores.batch, length, generator=generator) < 0.6
                kept[:, 0] = True  # a text of padding only: its result does not matter
                given[padding_mask] = kept.to(given[padding_mask].dtype)
                visible = visible & kept[:, None, None]
            if is_causal:
                visible = visible & causal_mask(0, length, -1)[:new]
            got = self.scores.bias(given, self.scores.batch, new, length)
            if not torch.equal(got, torch.zeros_like(got).masked_fill(~visible, -torch.inf)):
                return False
        return True

    def _biases(self, logits: fx.Node | None) -> tuple[fx.Node, ...]:
        """Nodes whose sum is added to the scores."""
        scores, node = self.scores, self.product.node
        if logits is None:
            raise Mismatch(node, "a causal mask of another length than the keys")
        if scores.softmax is None:
            self._check_every_row_attends(logits)
            return (logits,)
        biases, at = list[fx.Node](), logits
        while at is not node:
            path = [n for n in at.all_input_nodes if node in _upstream(n)]
            if len(path) != 1:
                raise Mismatch(at, "the bias of the scores depends on them")
            if at.target is aten.add.Tensor:
                biases += [n for n in at.all_input_nodes if n is not path[0]]
            at = path[0]
        given = self._inputs()
        total = sum((evaluate(self.program, n, given).double() for n in biases), torch.zeros(()))
        want = scores.bias(given, scores.batch, hint(self.new), hint(self.total))
        if not torch.allclose(torch.where(total < -1e30, -torch.inf, total).expand_as(want), want, atol=1e-5):
            raise Mismatch(node, "the bias of the scores is no value of its own")
        return tuple(biases)

    def _check_every_row_attends(self, mask: fx.Node) -> None:
        """SDPA returns zeros for a token that attends to none; a softmax of equal scores does not."""
        if mask.meta["val"].dtype is not torch.bool:
            return
        for padding_mask in filter(self._may_be_padding_mask, inputs_behind(self.program, mask, self.product.node)):
            given = self._inputs()
            kept = torch.zeros_like(given[padding_mask])
            kept[:, 0] = 1
            sizes = self.scores.batch, hint(self.new), hint(self.total)
            bias = self.scores.bias({**given, padding_mask: kept}, *sizes)
            if bool((bias == -torch.inf).all(-1).any()):
                raise Mismatch(mask, "beside padding, tokens may attend to none: only SDPA defines the result")

    def _inputs(self, length: int | None = None) -> dict[fx.Node, Any]:
        """Inputs of zeros and ones, of the traced example's sizes or with `length` tokens."""
        given = {}
        for node in self.program.inputs:
            value = node.meta["val"]
            sizes = [hint(d) for d in value.shape]
            for axis, size in enumerate(value.shape):
                if axis and length is not None and not isinstance(size, int) and hint(size) == hint(self.total):
                    sizes[axis] = length
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
