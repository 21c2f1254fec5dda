"""A typed view of aten::scaled_dot_product_attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from qcompile.ir.aten_ops import SDPA
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
