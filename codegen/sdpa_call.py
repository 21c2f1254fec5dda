"""A typed view of aten::scaled_dot_product_attention, and of the heads that share keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from qcompile.ir.aten_ops import RESHAPES, SDPA, aten
from qcompile.ir.op_calls import Operand

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class SDPACall:
    """The arguments of a call; queries [.., S, D], keys [.., T, D], values [.., T, E]."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: Operand = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @classmethod
    def of(cls, node: fx.Node) -> SDPACall:
        """The view of a node. Raises TypeError if the node calls something else."""
        if node.target is not SDPA:
            raise TypeError(f"{node.name} calls {node.target}, not {SDPA}")
        return cls(**dict(zip(_POSITIONAL, node.args, strict=False)), **node.kwargs)

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self.scale or 1 / math.sqrt(self.query.meta["val"].shape[-1])


def before_repeat(repeated: fx.Node) -> fx.Node:
    """The [B, groups, T, D] whose heads [B, heads, T, D] repeats, each as often; itself if it repeats nothing."""
    node = repeated
    while node.target in RESHAPES:  # the same elements in the same order
        node = node.all_input_nodes[0]
    if node.target is aten.repeat_interleave.self_int and node is repeated and tuple(node.args[2:]) in ((1,), (-3,)):
        return node.all_input_nodes[0]
    if node.target is not aten.expand.default:
        return repeated
    wide, source = node.meta["val"].shape, node.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten.unsqueeze.default or source.args[1] not in (2, -3):
        return repeated
    (groups, _, *rest), heads = wide[1:], repeated.meta["val"].shape[1]
    before = source.args[0]
    assert isinstance(before, fx.Node)
    same = before.meta["val"].shape[1] == groups and tuple(rest) == tuple(repeated.meta["val"].shape[2:])
    return before if len(wide) == 5 and same and heads == groups * wide[2] else repeated
