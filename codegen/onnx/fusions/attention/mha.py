"""Attentions without a KV cache as MultiHeadAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.head_channels import HeadChannels
from qcompile.codegen.onnx.fusions.attention.head_layout import flatten_heads, replace_output, reshape_to_batch
from qcompile.codegen.onnx.fusions.attention.match_mha import MultiHeadAttentionMatch, match_multi_head_attentions
from qcompile.codegen.onnx.fusions.packed_matmul import split_bias
from qcompile.codegen.onnx.ops.attention_ops import MultiHeadAttentionCall
from qcompile.ir.op_calls import Operand
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport

aten = torch.ops.aten

QKV = Sequence[HeadChannels | fx.Node]
"""Queries, keys and values, as channels of a value or as a value."""


def fuse_multi_head_attentions(program: Program, report: PassReport) -> None:
    """Rewrite what match_mha.py finds, in place.

    Args:
        program: one that keeps no cache.
        report: names what is fused, and what is skipped and why.
    """
    shared = _SharedMasks(program)
    for index, match in enumerate(match_multi_head_attentions(program)):
        if isinstance(match, Obstacle):
            report.skip("attention", match.reason, match.node)
        else:
            report.done.append(match.node.name)
            _replace(program, match, shared, f"attention_{index}")
    report.notes.append(f"{len(report.done)} MultiHeadAttention")
    program.cleanup()


class _SharedMasks:
    """Masks that several attentions read, each computed once, for the first of them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[tuple[fx.Node, ...], fx.Node] = {}

    def of(
        self, nodes: tuple[fx.Node, ...], function: Callable[..., Tensor], args: list[fx.Node], before: fx.Node
    ) -> fx.Node:
        """What a function computes of `nodes`; `args` are its arguments."""
        if nodes not in self._known:
            self._known[nodes] = self.program.inline(function, args, before=before)
        return self._known[nodes]


def _replace(program: Program, match: MultiHeadAttentionMatch, shared: _SharedMasks, name: str) -> None:
    qkv, qkv_bias = _split_biases(program, match, name)
    flat = []
    for letter, part in zip("qkv", qkv, strict=True):
        if isinstance(part, HeadChannels):
            flat.append(flatten_heads(program, part, match.node, f"{name}.{letter}"))
        else:
            order = (0, 3, 1, 2) if match.keys_transposed and letter == "k" else (0, 2, 1, 3)
            permuted = program.insert(aten.permute.default, (part, order), before=match.node)
            width = permuted.meta["val"].shape[2] * permuted.meta["val"].shape[3]
            flat.append(reshape_to_batch(program, permuted, match.node, width))
    padding_mask = bias = None
    if match.padding_mask is not None:
        padding_mask = shared.of((match.padding_mask,), _to_int32_mask, [match.padding_mask], match.node)
    if match.biases:
        bias = shared.of(match.biases, _sum_biases, [*flat[:2], *match.biases], match.node)
    query, key, value = flat
    call = MultiHeadAttentionCall(
        query=query,
        key=key,
        value=value,
        qkv_bias=qkv_bias,
        padding_mask=padding_mask,
        bias=bias,
        heads=match.heads,
        scale=match.scale,
        is_causal=match.is_causal,
    )
    replace_output(program, match.node, match.heads, call.insert(program, before=match.node))


def _to_int32_mask(padding_mask: Tensor) -> Tensor:
    """[B, T] of any dtype as int32 ones and zeros."""
    return (padding_mask != 0).to(torch.int32)


def _sum_biases(query: Tensor, key: Tensor, *biases: Tensor) -> Tensor:
    """What is added to the scores of query [B, S, ..] and key [B, T, ..] as [B or 1, H or 1, S, T] floats."""
    lowest = torch.finfo(query.dtype).min
    floats = [torch.where(b, 0.0, lowest) if b.dtype is torch.bool else b.to(query.dtype) for b in biases]
    total = sum(floats[1:], floats[0])
    total = total.reshape([1] * (4 - total.ndim) + list(total.shape))
    return total.expand(-1, -1, query.shape[1], key.shape[1]).clamp_min(lowest).contiguous()


def _split_biases(program: Program, match: MultiHeadAttentionMatch, name: str) -> tuple[QKV, Operand]:
    """Queries, keys and values without the biases of their linears, and those as one vector, where that saves nodes."""
    split: dict[fx.Node, tuple[fx.Node, Operand] | None] = {}
    for part in match.qkv:
        if isinstance(part, HeadChannels) and part.source not in split:
            split[part.source] = split_bias(program, part.source)
    qkv, biases = list[HeadChannels | fx.Node](), list[Tensor]()
    for part in match.qkv:
        pair = split[part.source] if isinstance(part, HeadChannels) else None
        if pair is None or not isinstance(part, HeadChannels):
            return match.qkv, None
        linear, bias = pair
        qkv.append(HeadChannels(linear, part.rows, part.factor))
        biases.append(torch.zeros(len(part.rows)) if bias is None else program.weight_of(bias)[part.rows])
    if not any(bool(bias.any()) for bias in biases):
        return match.qkv, None
    return qkv, program.add_weight(f"{name}.bias", torch.cat(biases))
