"""Traces a model to the program that is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qcompile.codegen.onnx.tracing.cached_decoder import CachedDecoder
from qcompile.codegen.onnx.tracing.onnx_linear import onnx_linears
from qcompile.codegen.onnx.tracing.quiet import quiet_exporter
from qcompile.codegen.onnx.tracing.signature import TracedModule
from qcompile.codegen.onnx.tracing.stateless_module import StatelessModule
from qcompile.ir.capture import from_exported
from qcompile.ir.program import Program

_DEFAULT_POSITIONS = 4096


@dataclass(frozen=True)
class Traced:
    """A module and its graph.

    Attributes:
        module: the model, wrapped to the signature of the file.
        program: its graph, whose quantized linears are operators of ONNX Runtime.
        positions: the longest text that the model takes, in tokens.
    """

    module: TracedModule
    program: Program
    positions: int


def trace(model: nn.Module, example: Any, contrib_ops: bool) -> Traced:
    """Trace a float32 model in eval mode.

    Args:
        model: with QuantLinear modules, which are the same afterwards.
        example: keyword arguments of a module without a cache; None for a causal LM, which is traced with its cache.
        contrib_ops: whether the file may use operators of ONNX Runtime beside those of the ONNX standard.
    """
    positions = max_positions(getattr(model, "config", None))
    with onnx_linears(model, contrib_ops), torch.no_grad(), quiet_exporter():
        module = CachedDecoder(model, positions) if example is None else StatelessModule(model, example)
        exported = torch.export.export(
            module, module.sample_inputs(), dynamic_shapes=module.dynamic_shapes(), strict=False
        )
        program = from_exported(exported, module)
    if isinstance(module, StatelessModule):
        module.note_dynamic_length([node.meta["val"] for node in program.inputs])
    return Traced(module, program, positions)


def max_positions(config: Any) -> int:
    """How many tokens a model's config says that it takes; 4096 if it does not say."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    sizes = (getattr(config, name, None) for name in names)
    return next((size for size in sizes if isinstance(size, int)), _DEFAULT_POSITIONS)
