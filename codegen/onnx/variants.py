"""Write each kernel variant of an exported graph, verify it, then write the file that runs.

Each variant is verified in the form that other processors run too; then the whole file is compared. What the module
computes (`expected_outputs`) is computed before the first session is opened, since both take memory: dequantized
weights there, the int8 weights that ONNX Runtime makes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qcompile.codegen.onnx.lowering.lower_graph import Variant, has_dual_linears, lower, lower_by_tokens
from qcompile.codegen.onnx.lowering.matmul_integer import for_inexact_processors
from qcompile.codegen.onnx.tracing.onnx_support import has_int4_and_int8_kernels
from qcompile.codegen.onnx.tracing.signature import TracedModule
from qcompile.codegen.onnx.tracing.stateless_module import StatelessModule
from qcompile.codegen.onnx.verify_outputs import Reference, measure_error, reference, verify


@dataclass(frozen=True)
class ExpectedOutputs:
    """What a file must compute.

    Attributes:
        variants: with the activations that a variant quantizes, for each variant that the file has.
        module: with those that the module quantizes.
    """

    variants: Mapping[Variant, Reference]
    module: Reference


def expected_outputs(path: Path, module: TracedModule, *, low_memory: bool) -> ExpectedOutputs:
    """Compute what the file of an exported graph must compute.

    Args:
        path: of the exported graph.
        module: the module.
        low_memory: the file multiplies by 4-bit codes only.
    """
    if low_memory or not has_dual_linears(ir.load(path)):
        variants: list[Variant] = ["decode"]
    else:
        variants = ["prefill"] if isinstance(module, StatelessModule) else ["decode", "prefill"]
    found = {
        v: reference(module, lambda site, v=v: v == "decode" and has_int4_and_int8_kernels(site)) for v in variants
    }
    return ExpectedOutputs(found, reference(module, lambda site: False) if len(found) == 2 else found[variants[0]])


def write_variants(
    path: Path, module: TracedModule, expected: ExpectedOutputs, accuracy_level: int, *, contrib_ops: bool
) -> tuple[float, float]:
    """Verify every variant, on any processor, then write the file that runs.

    Args:
        path: of the exported graph; overwritten.
        module: the module.
        expected: what the file must compute.
        accuracy_level: of MatMulNBits, as it will run.
        contrib_ops: use ONNX Runtime's operators; else those of the ONNX standard only.

    Returns:
        The largest error of the variants, and that of the file as it runs.

    Raises:
        ExportMismatch: a variant does not compute what the module does.
    """
    exported, error = ir.load(path), 0.0
    for variant, outputs in expected.variants.items():
        lowered = lower(exported, variant, contrib_ops=contrib_ops)
        for model in (for_inexact_processors(lowered), lowered):  # what other processors run, then what this one does
            if model is not None:
                ir.save(model, path)
                error = max(error, verify(path, module, outputs))
    if len(expected.variants) == 2:
        lowered = lower_by_tokens(exported)
    elif accuracy_level == 1:
        return error, error
    for node in lowered.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", accuracy_level))
    ir.save(lowered, path)
    return error, measure_error(path, module, expected.module)
