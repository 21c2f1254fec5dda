"""Why an attention of a graph is not one of ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import fx

from qcompile.analysis.attention_scores import AttentionMatmul
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.partial_evaluation import UnknownInputError

Match = TypeVar("Match")


class Mismatch(Exception):
    """A node that is not what an operator computes, and the reason."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(node, reason)
        self.node, self.reason = node, reason


def match_or_obstacle(product: AttentionMatmul, match: Callable[[], Match]) -> Match | Obstacle:
    """What `match` returns for an attention; where it raises Mismatch or UnknownInputError, the obstacle."""
    try:
        return match()
    except Mismatch as mismatch:
        return Obstacle(mismatch.node.name, mismatch.reason)
    except UnknownInputError as unknown:
        return Obstacle(product.node.name, f"depends on {unknown}")
