"""Obstacle: why an analysis says no, and at which node."""

from __future__ import annotations

from dataclasses import dataclass

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Obstacle:
    """Why a flow is open: the node and what it does to the basis."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason} at {self.node}"
