"""Whether a file computes what the module does: ONNX Runtime against PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.codegen.onnx.calls import Check
from qcompile.codegen.onnx.tables import Shared
from qcompile.module import QuantLinear


class ExportMismatch(ValueError):
    """The exported model does not compute what the module does; the text holds the error."""


def prove(path: Path, wrapper: Any, checks: list[Check], tolerance: float) -> float:
    """Open the file in ONNX Runtime and compare it with the module."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for arguments, want in checks:
        feeds = {n: t.numpy() for n, t in zip(wrapper.input_names, wrapper.flat(arguments), strict=True)}
        for name, mine, theirs in zip(wrapper.output_names, session.run(None, feeds), want, strict=True):
            reference = theirs.float()
            difference = torch.from_numpy(mine).float() - reference
            error = float(difference.norm()) / max(float(reference.norm()), 1e-6)
            if not error <= tolerance:
                raise ExportMismatch(
                    f"ONNX output {name} differs from the module by {error:.2e} (allowed {tolerance:.0e})"
                )
            worst = max(worst, error)
    return worst


@contextlib.contextmanager
def as_numbers(module: nn.Module) -> Iterator[None]:
    """The module with its codes turned into numbers once, not in each call: where only weights are quantized."""
    found = [
        (path, m)
        for path, m in module.named_modules()
        if isinstance(m, QuantLinear) and m.act is None and m.signs is None and not m.factors(torch.float32)
    ]
    try:
        for path, source in found:
            linear = nn.Linear(source.in_features, source.out_features, source.bias is not None, device="meta")
            linear.weight = nn.Parameter(source.weight, requires_grad=False)
            if source.bias is not None:
                linear.bias = nn.Parameter(source.bias.float(), requires_grad=False)
            module.set_submodule(path, linear)
        yield
    finally:
        for path, source in found:
            module.set_submodule(path, source)


@contextlib.contextmanager
def holding(module: nn.Module, shared: list[Shared]) -> Iterator[None]:
    """The module with the tables of its embeddings as the file has them: rounded."""
    tables = [(module.get_parameter(table.name), table.numbers) for table in shared]
    before = [parameter.data for parameter, _ in tables]
    try:
        for parameter, numbers in tables:
            parameter.data = numbers
        yield
    finally:
        for (parameter, _), data in zip(tables, before, strict=True):
            parameter.data = data
