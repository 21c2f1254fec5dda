"""Obstacle: why an analysis says no, and at which node."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ObstacleKind(Enum):
    """What would remove an obstacle."""

    FLOW = "flow"
    """Nothing: the model computes something that the analysis cannot follow."""
    GAIN = "gain"
    """Folding the gain of a norm into its consumers (the pass FoldNorm)."""


@dataclass(frozen=True)
class Obstacle:
    """Why a flow ends at a node.

    Attributes:
        node: the name of the node.
        reason: what it does that the flow cannot pass.
        kind: what would remove it.
    """

    node: str
    reason: str
    kind: ObstacleKind = ObstacleKind.FLOW

    def __str__(self) -> str:
        return f"{self.reason} at {self.node}"
