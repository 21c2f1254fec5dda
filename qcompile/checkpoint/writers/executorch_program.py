"""A program of ExecuTorch for its XNNPACK kernels: lowered from an exported graph, and run to compare it.

XNNPACK runs what it has kernels for, products with quantized weights among it; ExecuTorch's own operators run the rest.
Source: ExecuTorch 1.5, backends/xnnpack/partition/xnnpack_partitioner.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.writers.export_refusals import ExportError, refuse
from qcompile.checkpoint.writers.torchao_weights import TARGET

_QUANTIZED = ("quantize_affine", "choose_qparams_affine")  # operators of torchao, dequantize_affine too


def require_executorch() -> None:
    """Refuse to begin where a package is missing. Raises ExportError."""
    for name in ("torchao", "executorch"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ExportError(
                f"{error}. Fix: pip install 'torch-qcompile[edge]', in an environment of its own"
            ) from error


def write_program(graph: torch.export.ExportedProgram, path: Path, facts: dict[str, Any]) -> int:
    """Lower a graph to a file.

    Args:
        graph: exported, with the weights of `take_intx_weights`.
        path: the file.
        facts: of the model, which runners ask the program for: name of a method -> what it returns.

    Returns:
        How many parts of the graph XNNPACK runs.

    Raises:
        ExportError: a quantized product for which it has no kernel.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad():
        lowered = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()], constant_methods=facts or None)
    nodes = list(lowered.exported_program().graph.nodes)
    for node in nodes:
        if any(name in str(node.target) for name in _QUANTIZED):
            refuse(TARGET, _place_of(node), f"{node.target}, for which XNNPACK has no kernel", "keep the site float")
    program = lowered.to_executorch()
    with path.open("wb") as file:
        program.write_to_file(file)
    return sum("call_delegate" in str(node.target) for node in nodes)


def run_program(path: Path, calls: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The outputs of calls, one after the other, of a program that was just opened.

    Args:
        path: the file.
        calls: tensors in the order of the program's inputs.
    """
    from executorch.runtime import Runtime

    forward = Runtime.get().load_program(path).load_method("forward")
    return [[out.clone() for out in forward.execute(list(call)) if isinstance(out, Tensor)] for call in calls]


def _place_of(node: Any) -> str:
    """The module that a node of a graph stands in."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return str(modules[-1][0]) if modules else str(node.name)
