"""From a traced program to one of operators that have a translation to ONNX."""

from __future__ import annotations

import torch

from qcompile.codegen.onnx.fuse_all import fuse_all
from qcompile.codegen.onnx.fusions.attention.decompose_sdpa import decompose_attentions
from qcompile.codegen.onnx.fusions.attention.int8_kv_cache import Int8KVCache, quantize_kv_cache
from qcompile.codegen.onnx.fusions.grouped_matmul import split_grouped_matmuls
from qcompile.codegen.onnx.fusions.int8_embedding import quantize_embeddings
from qcompile.codegen.onnx.fusions.last_token_logits import keep_last_token_logits
from qcompile.codegen.onnx.fusions.quantized_embedding import QuantizedEmbedding
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.codegen.onnx.tracing.cached_decoder import CachedDecoder
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError
from qcompile.codegen.onnx.tracing.trace import Traced
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.modules.static_quant import StaticQuantConv
from qcompile.recipe.report import PassReport


@torch.no_grad()
def rewrite(
    traced: Traced, options: OnnxOptions, cache: Int8KVCache | None
) -> tuple[PassReport, list[QuantizedEmbedding]]:
    """Rewrite the program in place, and the signature of the module where the file's differs.

    Args:
        traced: a module and its graph.
        options: what kind of file.
        cache: an int8 KV cache, or None.

    Returns:
        What became operators and what did not, and the embeddings that have quantized tables now.

    Raises:
        OnnxUnsupportedError: experts that are not multiplied as rows sorted by expert, logits whose product is not
            found, or attentions that cannot read an int8 cache.
    """
    module, program = traced.module, traced.program
    is_decoder = isinstance(module, CachedDecoder)
    grouped = split_grouped_matmuls(program, options.contrib_ops)
    if options.contrib_ops:
        report, embeddings = fuse_all(program, traced.positions if is_decoder else None)
    else:
        report, embeddings = PassReport("operators of the ONNX standard"), []
    if decomposed := decompose_attentions(program):
        report.notes.append(f"{decomposed} attentions in standard operators")
    is_quantized = any(isinstance(m, QuantLinear | QuantStack | StaticQuantConv) for m in module.modules())
    if is_quantized and not options.float_embeddings:
        parameters = {name for name, _ in module.named_parameters()}
        embeddings += quantize_embeddings(program, parameters, report)
    if grouped:
        report.notes.append(f"{grouped} grouped matmuls, split by expert")
    if options.last_logits:
        if (obstacle := keep_last_token_logits(program)) is not None:
            raise OnnxUnsupportedError(
                f"last_logits: {obstacle.reason} (node {obstacle.node}). Fix: export all logits, without last_logits"
            )
        assert isinstance(module, CachedDecoder)
        module.return_last_logits()
    if cache is not None:
        assert isinstance(module, CachedDecoder)
        quantize_kv_cache(program, module, cache, report)
    return report, embeddings
