"""A program of ExecuTorch, written and run once: its outputs must be the module's, but for rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.api.edge_graph import EdgeCall
from qcompile.checkpoint.writers.executorch_program import run_program, write_program
from qcompile.checkpoint.writers.export_refusals import ExportError, quantized_linears
from qcompile.checkpoint.writers.torchao_weights import check_xnnpack_linear, take_intx_weights
from qcompile.codegen.onnx.verify_outputs import relative_error
from qcompile.modules.generation_hooks import detached

_SUMS = 1e-3  # what another order of float sums may change an output by, of its norm
_ROUNDINGS = 2.5  # sqrt(2) of two independent roundings, and some more for the chance of a few tokens


def write_edge_program(model: nn.Module, call: EdgeCall, path: Path) -> list[str]:
    """Write the program of a quantized model.

    Args:
        model: quantized; not changed. The program computes in float32.
        call: what is exported.
        path: the file.

    Returns:
        What was compared, as notes of a report.

    Raises:
        ExportError: a site without a kernel, a model that cannot be exported, or a program that computes something else
            than the module: beyond 2.5 times what rounding activations changes in it, or 1e-3 if that is more.
    """
    for site, linear in quantized_linears(model).items():
        check_xnnpack_linear(site, linear)
    work = copy.deepcopy(model).cpu().eval().requires_grad_(False).float()
    with detached(work):
        expected = call.expected(work)
        with _float_activations(work):
            unrounded = call.expected(work)
        allowed = max(_SUMS, _ROUNDINGS * _difference(unrounded, expected))
        count = take_intx_weights(work)
        graph = call.export(work)
    parts = write_program(graph, path, call.facts)
    error = _difference(run_program(path, call.checks), expected)
    if not error <= allowed:  # NaN is not
        raise ExportError(
            f"the program computes something else than the module: a relative error of {error:.3g}, {allowed:.3g} is "
            "what rounding explains. Fix: report it, with the versions of torch, torchao and executorch"
        )
    return [
        f"inputs: {call.inputs}",
        f"{count} weights read back by torchao, equal bit for bit",
        f"the program computes in float32, and XNNPACK runs {parts} parts of it",
        f"run by ExecuTorch: a relative error of {error:.1e} to the module, where {allowed:.1e} was allowed",
    ]


def _difference(got: list[list[Any]], want: list[list[Any]]) -> float:
    """The largest relative error of all outputs, of norms; infinite where their shapes differ."""
    errors = []
    for ours, theirs in zip(want, got, strict=True):
        if [tuple(t.shape) for t in ours] != [tuple(t.shape) for t in theirs]:
            return float("inf")
        errors += [relative_error(found, known) for found, known in zip(theirs, ours, strict=True)]
    return max(errors, default=float("inf"))


@contextmanager
def _float_activations(model: nn.Module) -> Iterator[None]:
    """Calls of a model whose quantized linears do not round their inputs."""
    linears = dict.fromkeys(quantized_linears(model).values())
    formats = [linear.act for linear in linears]
    try:
        for linear in linears:
            linear.act = None
        yield
    finally:
        for linear, form in zip(linears, formats, strict=True):
            linear.act = form
