"""A captured model in operators that ONNX Runtime has: attentions, norms, activations, packed matmuls.

Nothing is matched by name. Attentions are recognized by what they compute (match_gqa.py with a KV cache, match_mha.py
without), norms come from qcompile.analysis.norms, linears are packed where they read the same value. What has no
operator is skipped and named in the report.
"""

from __future__ import annotations

from qcompile.codegen.onnx.fusions.attention.gqa import fuse_group_query_attentions
from qcompile.codegen.onnx.fusions.attention.mha import fuse_multi_head_attentions
from qcompile.codegen.onnx.fusions.gelu import fuse_activations
from qcompile.codegen.onnx.fusions.packed_matmul import pack_matmuls
from qcompile.codegen.onnx.fusions.quantized_embedding import QuantizedEmbedding
from qcompile.codegen.onnx.fusions.skip_norm import fuse_norms
from qcompile.codegen.onnx.fusions.tied_embedding import share_tied_embeddings
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport


def fuse_all(program: Program, positions: int | None) -> tuple[PassReport, list[QuantizedEmbedding]]:
    """Rewrite in place.

    Args:
        program: a captured model.
        positions: length of the rotary tables of a decoder with inputs (ids, attention_mask, caches ..); else None.

    Returns:
        What became operators and what did not, and the embeddings that gather from the codes of the logits now.
    """
    report = PassReport("operators of ONNX Runtime")
    if positions is None:
        fuse_multi_head_attentions(program, report)
    else:
        fuse_group_query_attentions(program, positions, report)
    report.notes.append(f"{pack_matmuls(program)} matmuls packed into another of the same input")
    fuse_activations(program, report)
    fuse_norms(program, report)
    program.cleanup()
    embeddings = share_tied_embeddings(program)
    report.notes += [_describe(embedding) for embedding in embeddings]
    return report, embeddings


def _describe(embedding: QuantizedEmbedding) -> str:
    text = f"{embedding.name} is gathered from the codes of the logits"
    if embedding.matrix is None:
        return text
    return f"{text} and multiplied by a matrix, {embedding.error_ratio:.2f} times the error of quantizing it itself"
