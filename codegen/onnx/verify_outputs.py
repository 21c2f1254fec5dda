"""Whether a file computes what the module does: ONNX Runtime against PyTorch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.codegen.onnx.fusions.tied_embedding import Shared
from qcompile.codegen.onnx.tracing.signature import Check, Plain, WithCache
from qcompile.memory.process import release_freed_memory
from qcompile.modules.quant_linear import QuantLinear

_SUMS = 1e-3  # what another order of float sums may change an output by, of its norm

_ROUNDINGS = 2.5  # what two roundings may be apart, in what one changes: sqrt(2), and some of a few tokens' chance


class ExportMismatch(ValueError):
    """The exported model does not compute what the module does; the text holds the error."""


@dataclass(frozen=True)
class Reference:
    """Calls with the module's outputs, and by how much each output of a file may differ, of its norm."""

    checks: list[Check]
    allowed: list[list[float]]


def reference(module: WithCache | Plain, exempt: Callable[[QuantLinear], bool]) -> Reference:
    """What a file must compute that rounds the activations of all sites but the exempt ones.

    Where activations or the cache are rounded, a value near the middle of a step may fall to either side, and what
    follows sees it: deep in a model two correct computations are as far apart as two independent roundings, which is
    sqrt(2) times what rounding changes at all. That is measured, for every output: the largest of all calls, since
    a call with one token sees few roundings, and by chance hardly any.
    """
    release_freed_memory()  # this and opening a file take the most memory of an export: what was freed before must not add to it
    with unrounded(module, exempt), as_numbers(module):
        checks = module.checks()
    with unrounded(module, lambda site: True), as_numbers(module), unrounded_cache(module):
        plain = [torch.utils._pytree.tree_leaves(module(*arguments)) for arguments, _ in checks]
    changes = [
        [relative(other, want) for other, want in zip(others, wants, strict=True)]
        for others, (_, wants) in zip(plain, checks, strict=True)
    ]
    allowed = [max(_SUMS, _ROUNDINGS * max(of_output)) for of_output in zip(*changes, strict=True)]
    return Reference(checks, [allowed] * len(checks))


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, of norms: one value whose rounding fell to the other side must not decide."""
    return float((got.float() - want.float()).norm()) / max(float(want.float().norm()), 1e-6)


def prove(path: Path, wrapper: Any, against: Reference, *, exact: bool = True) -> float:
    """Open the file in ONNX Runtime and compare it with the module; the largest difference.

    Args:
        exact: multiply DequantizeLinear's numbers as they are: left to itself, ONNX Runtime rounds activations
            beside them to int8 in blocks (accuracy_level 4 of the operator that it fuses them to).

    Raises:
        ExportMismatch: one is larger than allowed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    release_freed_memory()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for (arguments, wants), allowed in zip(against.checks, against.allowed, strict=True):
        feeds = {n: t.numpy() for n, t in zip(wrapper.input_names, wrapper.flat(arguments), strict=True)}
        outputs = session.run(None, feeds)
        for name, mine, want, most in zip(wrapper.output_names, outputs, wants, allowed, strict=True):
            error = relative(torch.from_numpy(mine), want)
            if not error <= most:
                raise ExportMismatch(f"ONNX output {name} differs from the module by {error:.2e} (allowed {most:.2e})")
            worst = max(worst, error)
    return worst


def differences(path: Path, wrapper: Any, against: Reference) -> float:
    """As prove, for a file that rounds on purpose: how much, not whether."""
    anything = [[math.inf] * len(row) for row in against.allowed]
    return prove(path, wrapper, Reference(against.checks, anything), exact=False)


@contextlib.contextmanager
def unrounded(module: nn.Module, sites: Callable[[QuantLinear], bool]) -> Iterator[None]:
    """The module with the activations of some sites as they are."""
    found = [m for m in module.modules() if isinstance(m, QuantLinear) and m.act is not None and sites(m)]
    formats = [site.act for site in found]
    try:
        for site in found:
            site.act = None
        yield
    finally:
        for site, form in zip(found, formats, strict=True):
            site.act = form


@contextlib.contextmanager
def unrounded_cache(wrapper: WithCache | Plain) -> Iterator[None]:
    """The module with a cache that is not rounded."""
    before, wrapper.rounded = wrapper.rounded, False
    try:
        yield
    finally:
        wrapper.rounded = before


@contextlib.contextmanager
def as_numbers(module: nn.Module) -> Iterator[None]:
    """The module with its codes turned into numbers once, not in each call: where only weights are quantized.

    The largest first: making numbers of codes takes several times their room, and least is held then.
    """
    found = [
        (path, m)
        for path, m in module.named_modules()
        if isinstance(m, QuantLinear) and m.act is None and m.signs is None and not m.factors(torch.float32)
    ]
    found.sort(key=lambda part: part[1].in_features * part[1].out_features, reverse=True)
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
