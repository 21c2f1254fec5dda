"""Attentions with a KV cache as GroupQueryAttention."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.head_layout import flatten_heads, replace_output, reshape_to_batch
from qcompile.codegen.onnx.fusions.attention.match_gqa import GroupQueryAttentionMatch, match_group_query_attentions
from qcompile.codegen.onnx.fusions.packed_matmul import OutputChannels, can_pack, pack
from qcompile.codegen.onnx.ops.attention_ops import AttentionLengthsCall, GroupQueryAttentionCall
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport

aten = torch.ops.aten


def fuse_group_query_attentions(program: Program, positions: int, report: PassReport) -> None:
    """Rewrite what match_gqa.py finds, in place.

    Args:
        program: a decoder with inputs (ids, attention_mask, caches ..).
        positions: how many the rotary tables have to hold.
        report: names what is fused, and what is skipped and why.
    """
    shared = _SharedOperands(program)
    for index, match in enumerate(match_group_query_attentions(program, positions)):
        if isinstance(match, Obstacle):
            report.skip("attention", match.reason, match.node)
        elif (reason := _unsupported_reason(match)) is not None:
            report.skip("attention", reason, match.node.name)
        else:
            report.done.append(match.node.name)
            _replace(program, match, shared, f"attention_{index}")
    report.notes.append(f"{len(report.done)} GroupQueryAttention")
    program.cleanup()
    _read_past_length_of_mask(program)


def _unsupported_reason(match: GroupQueryAttentionMatch) -> str | None:
    """What ONNX Runtime's kernel cannot do, or None."""
    size = match.past[0].meta["val"].shape[-1]
    if size % 8:
        return f"heads of {size}: GroupQueryAttention takes multiples of 8"
    if match.rotary is not None and match.rotary.cos.shape[1] % 8:
        return f"a rotary embedding of {2 * match.rotary.cos.shape[1]} channels: it takes multiples of 16"
    return None


class _SharedOperands:
    """Operands that several attentions read, each inserted once, for the first of them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._by_content: dict[bytes, fx.Node] = {}
        self._lengths: list[fx.Node] = []

    def table(self, name: str, values: Tensor) -> fx.Node:
        """A weight; equal ones are one."""
        key = name.encode() + values.numpy().tobytes()
        if key not in self._by_content:
            self._by_content[key] = self.program.add_weight(f"{name}_{len(self._by_content)}", values)
        return self._by_content[key]

    def lengths(self) -> list[fx.Node]:
        """seqlens_k and total_length of attention_mask."""
        if not self._lengths:
            call = AttentionLengthsCall(self.program.inputs[1])
            both = call.insert(self.program, after=self.program.placeholders[-1])
            self._lengths += self.program.unpack(both, 2)
        return self._lengths

    def bias(self, by_position: Tensor, before: fx.Node) -> fx.Node:
        """[H, positions] as what is added to the scores, [1, H, S, P + S]."""
        key = b"added" + by_position.numpy().tobytes()
        if key not in self._by_content:
            ids, mask = self.program.inputs[:2]
            nodes = [self.table("position_bias", by_position), ids, mask]
            self._by_content[key] = self.program.inline(_expand_bias, nodes, before=before)
        return self._by_content[key]


def _expand_bias(by_position: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """by_position [H, positions], ids [B, S], mask [B, P + S] -> [1, H, S, P + S]."""
    return by_position[None, :, None, : mask.shape[1]].expand(1, -1, ids.shape[1], -1).contiguous()


def _replace(program: Program, match: GroupQueryAttentionMatch, shared: _SharedOperands, name: str) -> None:
    cos = sin = None
    if match.rotary is not None:
        cos, sin = shared.table("cos_cache", match.rotary.cos), shared.table("sin_cache", match.rotary.sin)
    query, key, value = _qkv(program, match, name)
    seqlens_k, total_length = shared.lengths()
    call = GroupQueryAttentionCall(
        query=query,
        key=key,
        value=value,
        past_key=match.past[0],
        past_value=match.past[1],
        seqlens_k=seqlens_k,
        total_length=total_length,
        cos=cos,
        sin=sin,
        heads=match.heads,
        scale=match.scale,
        window=match.window,
        interleaved=match.rotary is not None and match.rotary.interleaved,
        softcap=match.softcap,
        bias=None if match.bias is None else shared.bias(match.bias, match.node),
    )
    out, *present = program.unpack(call.insert(program, before=match.node), 3)
    for old, new in zip(match.present, present, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user.op == "output")
    replace_output(program, match.node, match.heads, out)


def _qkv(
    program: Program, match: GroupQueryAttentionMatch, name: str
) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """Query, key and value; packed in the first, where linears make them that can be packed."""
    parts = match.queries, match.keys, match.values
    if can_pack(program, [part.source for part in parts]):
        channels = [OutputChannels(part.source, part.rows) for part in parts]
        packed = pack(program, channels, match.node, name)
        return reshape_to_batch(program, packed, match.node, sum(len(part.rows) for part in parts)), None, None
    query, key, value = (
        flatten_heads(program, part, match.node, f"{name}.{letter}") for part, letter in zip(parts, "qkv", strict=True)
    )
    return query, key, value


def _read_past_length_of_mask(program: Program) -> None:
    """Where something beside the attentions reads the length of a cache, compute it as mask length less new tokens.

    A runtime may pass a longer buffer to extend in place; the mask has the length of the text.
    """
    ids, mask, *caches = program.inputs
    reads = [
        user
        for cache in caches
        for user in cache.users
        if user.target is aten.sym_size.int and user.args[1] == 2 and user.users
    ]
    if reads:
        start = program.placeholders[-1]
        total = program.insert(aten.sym_size.int, (mask, 1), after=start)
        new = program.insert(aten.sym_size.int, (ids, 1), after=total)
        past = program.insert(operator.sub, (total, new), after=new)
        for node in reads:
            node.replace_all_uses_with(past)
    program.cleanup()
