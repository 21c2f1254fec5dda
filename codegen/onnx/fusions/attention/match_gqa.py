"""Attentions with a KV cache, recognized by what they compute, as one GroupQueryAttention each.

    queries, keys, values   which channel of which value is channel d of head h: channel indices sent
                            through the graph at position 0, where a rotary embedding rotates by zero
    rotary embedding        which channels pair up, and the tables: unit vectors sent through it
    scores                  scale, soft cap, bias (match_scores.py); the mask is compared with a causal one
    KV cache                keys and values are cat(past, new), new ones behind, and are outputs

What does not match is skipped, with the reason: `Obstacle(node, reason)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.attention_scores import AttentionMatmul, attention_matmuls
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.head_channels import (
    HeadChannels,
    before_layouts,
    channel_source,
    fill_channels,
    find_head_channels,
    split_batch,
)
from qcompile.codegen.onnx.fusions.attention.mask import find_window_and_bias
from qcompile.codegen.onnx.fusions.attention.match_scores import ScoreFunction
from qcompile.codegen.onnx.fusions.attention.mismatch import Mismatch, match_or_obstacle
from qcompile.codegen.onnx.fusions.attention.rotary_embedding import RotaryProbe, RotaryTables
from qcompile.codegen.onnx.fusions.attention.sample_inputs import SampleInputs
from qcompile.codegen.onnx.fusions.partial_evaluation import evaluate, token_dependent_nodes
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupQueryAttentionMatch:
    """One attention and all that GroupQueryAttention needs to know about it.

    Attributes:
        node: what it returns, [B, H, S, D] or [B H, S, D].
        queries: channels of a value.
        keys: channels of a value, not repeated.
        values: channels of a value, not repeated.
        past: inputs, the cached keys and values [B, G, P, D].
        present: outputs, the keys and values [B, G, P + S, D].
        heads: H.
        scale: of the scores.
        softcap: of the scores, 0 for none.
        bias: [H, positions] float32, what the position of a key adds to the scores of a head, or None.
        window: how many tokens a token attends to, -1 for all.
        rotary: the tables of queries and keys, or None.
    """

    node: fx.Node
    queries: HeadChannels
    keys: HeadChannels
    values: HeadChannels
    past: tuple[fx.Node, fx.Node]
    present: tuple[fx.Node, fx.Node]
    heads: int
    scale: float
    softcap: float
    bias: Tensor | None
    window: int
    rotary: RotaryTables | None


@dataclass(frozen=True)
class CachedHeads:
    """Keys or values as a cache with new tokens behind it: present = cat(past, new)."""

    past: fx.Node
    new: fx.Node
    present: fx.Node


def match_group_query_attentions(program: Program, positions: int) -> list[GroupQueryAttentionMatch | Obstacle]:
    """All attentions of a decoder whose inputs are ids, attention_mask and a cache.

    Args:
        program: the decoder.
        positions: how many the rotary tables have to hold.
    """
    tokens = token_dependent_nodes(program, program.inputs[1])
    return [
        match_or_obstacle(product, GroupQueryAttentionMatcher(program, product, tokens, positions).match_positions)
        for product in attention_matmuls(program)
    ]


class GroupQueryAttentionMatcher:
    """Matches one attention."""

    def __init__(self, program: Program, product: AttentionMatmul, tokens: set[fx.Node], positions: int) -> None:
        self.program, self.product, self.tokens, self.positions = program, product, tokens, positions
        self.samples = SampleInputs(program)
        self.node = product.value_product

    def match_positions(self) -> GroupQueryAttentionMatch:
        """As `match`; a graph that cannot be evaluated for so many positions is a mismatch."""
        try:
            return self.match()
        except (RuntimeError, IndexError) as error:  # a table of the model that is shorter than that
            reason = f"cannot be computed for {self.positions} positions: {str(error).splitlines()[0]}"
            raise Mismatch(self.product.node, reason) from error

    def match(self) -> GroupQueryAttentionMatch:
        """The match.

        Raises:
            Mismatch: GroupQueryAttention computes something else.
        """
        product, samples = self.product, self.samples
        self.scores = ScoreFunction(self.program, product)
        self.heads, self.size = self.scores.heads, self.scores.size
        keys, values = self._cached(product.keys, product.keys_transposed), self._cached(product.values)
        queries, rotary = self._head_channels(product.queries)
        new_keys, key_rotary = self._head_channels(keys.new)
        self._check_rotary(keys.new, key_rotary, rotary)
        new_values, value_rotary = self._head_channels(values.new)
        self._check_rotary(values.new, value_rotary, None)
        if new_values.factor != 1 or new_keys.factor != 1:
            raise Mismatch(self.node, "keys or values are multiplied by a constant")
        curve = self.scores.curve(samples.values(), samples.batch, samples.new, samples.past + samples.new)
        window, bias = find_window_and_bias(samples, self.scores, self.positions)
        return GroupQueryAttentionMatch(
            node=self.node,
            queries=queries,
            keys=new_keys,
            values=new_values,
            past=(keys.past, values.past),
            present=(keys.present, values.present),
            heads=self.heads,
            scale=curve.scale * queries.factor,
            softcap=curve.cap,
            bias=bias,
            window=window,
            rotary=rotary,
        )

    def _cached(self, node: fx.Node, is_transposed: bool = False) -> CachedHeads:
        """The cache and the new tokens behind keys or values, whose heads may be repeated for the queries'."""
        present = before_layouts(node)
        parts = present.args[0] if present.target is aten.cat.default else []
        if len(parts) != 2 or present.args[1] not in (-2, 2):
            raise Mismatch(present, "keys or values are not a cache with new ones behind it")
        past = parts[0]
        if past.target is aten.cat.default and len(past.args[0]) == 2:  # an empty tensor in front of the past
            first, past = past.args[0]
            if hint(first.meta["val"].numel()):
                raise Mismatch(present, "something lies in front of the cache")
        if past not in self.samples.caches:
            raise Mismatch(present, "the past is not an input of its own")
        groups = present.meta["val"].shape[1]
        indices = torch.arange(groups * self.size)
        given = {**self.samples.values(), present: fill_channels(present, indices)}
        got = split_batch(evaluate(self.program, node, given), self.samples.batch)
        got = got.transpose(-1, -2) if is_transposed else got
        want = indices.reshape(groups, -1)
        if got.shape[1] != groups:
            want = want.repeat_interleave(self.heads // groups, 0)
        if not torch.equal(got[0, :, 0], want):
            raise Mismatch(node, "heads of the cache are not repeated in order")
        return CachedHeads(past, parts[1], present)

    def _head_channels(self, node: fx.Node) -> tuple[HeadChannels, RotaryTables | None]:
        """Where queries, keys or values [B, H, S, D] come from, and the rotary embedding between."""
        source = channel_source(node, self.tokens)
        heads = find_head_channels(self.program, node, source, self.samples.values(past=0), self.samples.batch)
        if heads is None:
            raise Mismatch(node, "not the channels of one value at the first position")
        return heads, RotaryProbe(self.samples, node, heads, self.size).find(self.positions)

    def _check_rotary(self, node: fx.Node, got: RotaryTables | None, want: RotaryTables | None) -> None:
        if (got is None and want is not None) or (got is not None and not got.equals(want)):
            raise Mismatch(node, "rotated otherwise than the queries, or a value that is rotated")
