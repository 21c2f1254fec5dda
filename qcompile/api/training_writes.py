"""Which module takes the place of another where a pass made its product one that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qcompile.ir.program import Program

Build = Callable[[Program, fx.Node, nn.Module], nn.Module]
"""build(rewritten program, the product that trains, the module that was captured) -> what takes its place."""

BUILDERS: dict[Any, Build] = {}
"""Operator -> how to build the module that calls it."""
