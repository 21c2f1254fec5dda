"""What the nodes of a file are (each int8 product counted once, though written for two processors), and wrong ones."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import onnx
import pytest

from qcompile.codegen.onnx.lowering.matmul_integer import EXACT
from qcompile.codegen.onnx.lowering.node_builder import Steps


def operators(nodes: Iterable[onnx.NodeProto]) -> collections.Counter[str]:
    """How many of each operator; a choice of processor counts as the product that both its branches hold."""
    counts: collections.Counter[str] = collections.Counter()
    for node in nodes:
        if node.op_type == "If" and node.input[0].endswith(EXACT):
            products = [[n for n in branch.g.node if "MatMul" in n.op_type] for branch in node.attribute]
            assert [[n.op_type for n in found] for found in products] == [["MatMulIntegerToFloat"]] * 2
            counts["MatMulIntegerToFloat"] += 1
        else:
            counts[node.op_type] += 1
    return counts


def bend(monkeypatch: pytest.MonkeyPatch, module: Any, made: str, operator: str) -> None:
    """From now on, what `module` calls `made` is computed by another operator."""

    class Bent(Steps):
        def __call__(self, name: str, right: str, *inputs: str, **attributes: Any) -> str:
            return super().__call__(name, operator if name == made else right, *inputs, **attributes)

    monkeypatch.setattr(module, "Steps", Bent)
