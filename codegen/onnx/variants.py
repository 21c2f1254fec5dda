"""From the graph of an export, whose products have no way to be multiplied yet, to the file that runs.

Each way is written into the file in turn and proven, in the form that other processors run too; then all ways together.
What the module computes (`expected`) is asked for before the first session is opened, since both take room: numbers of
all weights there, the int8 weights that ONNX Runtime makes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from qcompile.codegen.onnx.lowering.matmul_integer import inexact
from qcompile.codegen.onnx.lowering.matmul_nbits import Way, by_tokens, is_dual, one_way
from qcompile.codegen.onnx.lowering.node_builder import every_node
from qcompile.codegen.onnx.tracing.onnx_linear import two_ways
from qcompile.codegen.onnx.tracing.signature import Plain, WithCache
from qcompile.codegen.onnx.verify_outputs import Reference, differences, prove, reference


@dataclass(frozen=True)
class Expected:
    """What a file must compute: multiplied in each way that it will have, and what the module itself computes."""

    by_way: dict[Way, Reference]
    as_it_is: Reference


def expected(path: Path, wrapper: WithCache | Plain, *, low_memory: bool) -> Expected:
    """Of the module behind an export; low_memory: a file that multiplies by 4-bit codes only."""
    ways: list[Way] = ["many"] if isinstance(wrapper, Plain) else ["few", "many"]
    if low_memory or not is_dual(_graph(path)):
        ways = ["few"]
    found = {way: reference(wrapper, lambda site, way=way: way == "few" and two_ways(site)) for way in ways}
    return Expected(found, reference(wrapper, lambda site: False) if len(ways) == 2 else found[ways[0]])


def finish(
    path: Path, wrapper: WithCache | Plain, must: Expected, accuracy_level: int, *, portable: bool
) -> tuple[float, float]:
    """Prove every way to multiply, on any processor, then write the file as it will run; the errors of both.

    Args:
        accuracy_level: of MatMulNBits, as it will run. portable: operators of the standard only.

    Raises:
        ExportMismatch: a way does not compute what the module does.
    """
    exported, error = _graph(path), 0.0
    for way, against in must.by_way.items():
        lowered = one_way(exported, way, portable)
        for variant in (inexact(lowered), lowered):  # what other processors run, then what this one does
            if variant is not None:
                onnx.save(variant, str(path))
                error = max(error, prove(path, wrapper, against))
    if len(must.by_way) == 2:
        onnx.save(by_tokens(exported), str(path))
    elif accuracy_level == 1:
        return error, error
    _set_accuracy_level(path, accuracy_level)
    return error, differences(path, wrapper, must.as_it_is)


def _graph(path: Path) -> onnx.ModelProto:
    """A file without its external data, which stays where it is."""
    return onnx.load(str(path), load_external_data=False)


def _set_accuracy_level(path: Path, level: int) -> None:
    """Rewrite the accuracy_level of every MatMulNBits of a file."""
    model = _graph(path)
    for node in every_node(model.graph.node):
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    onnx.save(model, str(path))
