"""Export a module with quantized linears to an ONNX folder, and verify it by running it.

    trace -> Program -> rewrite (fusions/) -> translate (torch.onnx) -> kernel variants, each verified (variants.py)

A decoder is traced with its KV cache as plain tensors: inputs `input_ids [batch, sequence]`,
`attention_mask [batch, past + sequence]`, `past_key_values.i.key/value`; outputs `logits` and
`present.i.key/value`. The number and the shape of the caches are read from one eager call.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.codegen.onnx.folder_files import write_folder_files
from qcompile.codegen.onnx.fusions.attention.int8_kv_cache import Int8KVCache
from qcompile.codegen.onnx.fusions.quantized_embedding import QuantizedEmbedding
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.codegen.onnx.rewrite_graph import rewrite
from qcompile.codegen.onnx.sentence_embedding import PooledEncoder
from qcompile.codegen.onnx.tracing.onnx_support import check_supported
from qcompile.codegen.onnx.tracing.signature import TracedModule
from qcompile.codegen.onnx.tracing.trace import trace
from qcompile.codegen.onnx.translate_graph import translate
from qcompile.codegen.onnx.variants import expected_outputs, write_variants
from qcompile.codegen.onnx.verify_outputs import quantized_embeddings
from qcompile.recipe.report import PassReport

MODEL = "model.onnx"


@dataclass(frozen=True)
class Exported:
    """What an export measured and did.

    Attributes:
        error: the largest relative difference (of norms) to the module, computed in float.
        error_as_run: the same with the accuracy level that the file asks for.
        rewritten: what became operators of ONNX Runtime, and what did not and why.
    """

    error: float
    error_as_run: float
    rewritten: PassReport


def export_module(
    model: nn.Module,
    folder: Path,
    options: OnnxOptions,
    *,
    example: Any = None,
    tokenizer: Any = None,
    cache: Int8KVCache | None = None,
) -> Exported:
    """Write model.onnx (+ model.onnx.data) and the files beside it into an existing folder.

    Args:
        model: float32 or castable; not changed.
        folder: where to write.
        options: what kind of file.
        example: keyword arguments of a module without a cache; None for a causal LM.
        tokenizer: saved beside the model.
        cache: an int8 KV cache; None: it is float.

    Raises:
        OnnxUnsupportedError: formats without an operator (before any work); once the graph is known, stacks of experts
            that are not multiplied as rows sorted by expert, or attentions that cannot read an int8 cache.
        ExportMismatch: the file computes something else than the module.
    """
    check_supported(model, options.contrib_ops)
    module, rewritten, embeddings = _write_graph(_prepare(model, options), folder, options, example, tokenizer, cache)
    with torch.no_grad(), quantized_embeddings(module, embeddings):
        expected = expected_outputs(folder / MODEL, module, low_memory=options.low_memory)
    del embeddings  # opening sessions needs the memory
    error, error_as_run = write_variants(
        folder / MODEL, module, expected, options.accuracy_level, contrib_ops=options.contrib_ops
    )
    return Exported(error, error_as_run, rewritten)


def _prepare(model: nn.Module, options: OnnxOptions) -> nn.Module:
    """The model in float32 and eval mode; an encoder with its pooling."""
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        model = copy.deepcopy(model).float()
    model.eval()
    pooling = options.sentence_pooling
    return model if pooling is None else PooledEncoder(model, pooling).eval()


def _write_graph(
    model: nn.Module, folder: Path, options: OnnxOptions, example: Any, tokenizer: Any, cache: Int8KVCache | None
) -> tuple[TracedModule, PassReport, list[QuantizedEmbedding]]:
    """Write the graph, without kernels, and the files beside it.

    The program and its weights are freed on return: they are in the file, and verifying it needs the memory.
    """
    traced = trace(model, example, options.contrib_ops)
    rewritten, embeddings = rewrite(traced, options, cache)
    translate(traced, folder / MODEL, options.contrib_ops)
    write_folder_files(folder, traced, options, tokenizer)
    return traced.module, rewritten, embeddings
