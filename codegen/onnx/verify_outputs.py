"""Whether a file computes what the module does: ONNX Runtime against PyTorch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qcompile.codegen.onnx.fusions.quantized_embedding import QuantizedEmbedding
from qcompile.codegen.onnx.tracing.signature import ReferenceCall, TracedModule
from qcompile.memory.process import release_freed_memory
from qcompile.modules.quant_linear import QuantLinear
from qcompile.modules.static_quant import StaticQuantConv, StaticQuantLinear

_SUMS = 1e-3  # what another order of float sums may change an output by, of its norm
_ROUNDINGS = 2.5  # sqrt(2), as below, and some more for the chance of a few tokens


class ExportMismatch(ValueError):
    """The exported model does not compute what the module does; the text holds the error."""


@dataclass(frozen=True)
class Reference:
    """Calls of a module, and how much an output of the file may differ from the module's.

    Attributes:
        calls: arguments and outputs.
        tolerances: of each output, as a share of its norm.
    """

    calls: list[ReferenceCall]
    tolerances: Sequence[float]


def reference(module: TracedModule, keeps_float: Callable[[QuantLinear], bool]) -> Reference:
    """What a file must compute that quantizes the activations of all sites but those that keep them float.

    Where activations or the cache are rounded, a value near the middle of two codes may fall to either side, and what
    follows changes with it: deep in a model two correct computations are as far apart as two independent roundings,
    which is sqrt(2) times what rounding changes at all. That is measured, for every output: the largest of all calls,
    since a call with one token sees few roundings, and by chance hardly any.
    """
    release_freed_memory()  # this and opening a file take the most memory of an export
    with float_activations(module, keeps_float), dequantized_weights(module):
        calls = module.reference_calls()
    floats = float_activations(module, lambda site: True), unrounded_static(module), float_cache(module)
    with floats[0], floats[1], floats[2], dequantized_weights(module):
        unrounded = [module.call(arguments)[1] for arguments, _ in calls]
    changes = [
        [relative_error(other, output) for other, output in zip(others, outputs, strict=True)]
        for others, (_, outputs) in zip(unrounded, calls, strict=True)
    ]
    return Reference(calls, [max(_SUMS, _ROUNDINGS * max(of_output)) for of_output in zip(*changes, strict=True)])


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, of norms: one value that was rounded to the other side must not decide."""
    return float((got.float() - want.float()).norm()) / max(float(want.float().norm()), 1e-6)


def verify(path: Path, module: TracedModule, expected: Reference, *, exact: bool = True) -> float:
    """Open the file in ONNX Runtime and compare it with the module.

    Args:
        path: of model.onnx.
        module: names the inputs and outputs.
        expected: what it computes.
        exact: multiply DequantizeLinear's values as they are: by default, ONNX Runtime rounds activations beside them
            to int8 in blocks (accuracy_level 4 of the operator that it fuses them to).

    Returns:
        The largest relative error.

    Raises:
        ExportMismatch: one is larger than its tolerance.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a failing operator is told by the exception
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    release_freed_memory()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    largest, names = 0.0, module.signature.output_names
    for arguments, outputs in expected.calls:
        inputs = zip(module.signature.input_names, module.flatten(arguments), strict=True)
        feeds = {name: tensor.numpy() for name, tensor in inputs}
        try:
            found = session.run(None, feeds)
        except Exception as failure:  # ONNX Runtime has a class of its own for every status code
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise ExportMismatch(
                f"the ONNX file does not run for inputs of other sizes than the example's ({shapes}), as happens where "
                f"the model's own Python code computes with them: {str(failure).splitlines()[0]}. Fix: use "
                "torch.compile(model, backend='qcompile'), which traces such sizes anew"
            ) from failure
        for name, got, want, most in zip(names, found, outputs, expected.tolerances, strict=True):
            error = relative_error(torch.from_numpy(got), want)
            if not error <= most:
                raise ExportMismatch(f"ONNX output {name} differs from the module by {error:.2e} (allowed {most:.2e})")
            largest = max(largest, error)
    return largest


def measure_error(path: Path, module: TracedModule, expected: Reference) -> float:
    """As `verify`, for a file that rounds on purpose: how much, not whether."""
    anything = [math.inf] * len(expected.tolerances)
    return verify(path, module, replace(expected, tolerances=anything), exact=False)


@contextlib.contextmanager
def float_activations(module: nn.Module, keeps_float: Callable[[QuantLinear], bool]) -> Iterator[None]:
    """The module with the activations of some sites in float."""
    sites = [m for m in module.modules() if isinstance(m, QuantLinear) and m.act is not None and keeps_float(m)]
    formats = [site.act for site in sites]
    try:
        for site in sites:
            site.act = None
        yield
    finally:
        for site, form in zip(sites, formats, strict=True):
            site.act = form


@contextlib.contextmanager
def unrounded_static(module: nn.Module) -> Iterator[None]:
    """The module with activations of a static range in float: clamped to it, not rounded."""
    sites = [m for m in module.modules() if isinstance(m, StaticQuantLinear | StaticQuantConv)]
    try:
        for site in sites:
            site.rounds = False
        yield
    finally:
        for site in sites:
            site.rounds = True


@contextlib.contextmanager
def float_cache(module: TracedModule) -> Iterator[None]:
    """The module with a cache that is not rounded."""
    before, module.rounds_cache = module.rounds_cache, False
    try:
        yield
    finally:
        module.rounds_cache = before


@contextlib.contextmanager
def dequantized_weights(module: nn.Module) -> Iterator[None]:
    """The module with weight-only linears dequantized once, not in each call.

    The largest first: dequantizing takes several times a weight's memory, and least is in use then.
    """
    sites = [
        (path, m)
        for path, m in module.named_modules()
        if type(m) is QuantLinear and m.act is None and m.signs is None and not m.factors(torch.float32)
    ]
    sites.sort(key=lambda site: site[1].in_features * site[1].out_features, reverse=True)
    try:
        for path, source in sites:
            linear = nn.Linear(source.in_features, source.out_features, source.bias is not None, device="meta")
            linear.weight = nn.Parameter(source.weight, requires_grad=False)
            if source.bias is not None:
                linear.bias = nn.Parameter(source.bias.float(), requires_grad=False)
            module.set_submodule(path, linear)
        yield
    finally:
        for path, source in sites:
            module.set_submodule(path, source)


@contextlib.contextmanager
def quantized_embeddings(module: nn.Module, embeddings: Sequence[QuantizedEmbedding]) -> Iterator[None]:
    """The module with the tables of its embeddings as the file has them."""
    tables = [module.get_parameter(embedding.name) for embedding in embeddings]
    before = [table.data for table in tables]
    try:
        for table, embedding in zip(tables, embeddings, strict=True):
            table.data = embedding.values
        yield
    finally:
        for table, data in zip(tables, before, strict=True):
            table.data = data
