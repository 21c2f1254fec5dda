"""A captured model in operators that ONNX Runtime has: attentions, norms, activations, joined products.

Nothing is matched by name. Attentions are recognised by what they compute (match_gqa.py with a cache, mha.py
without), norms come from qcompile.analysis.norms, products are joined where they read the same value. What has no operator
is left as it is and named in the report.
"""

from __future__ import annotations

from qcompile.codegen.onnx.fusions.activation import rewrite_activations
from qcompile.codegen.onnx.fusions.attention.gqa import rewrite_cached
from qcompile.codegen.onnx.fusions.attention.mha import rewrite_plain
from qcompile.codegen.onnx.fusions.packed_matmul import join_siblings
from qcompile.codegen.onnx.fusions.skip_norm import rewrite_norms
from qcompile.codegen.onnx.fusions.tied_embedding import Shared, share_tables
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport


def rewrite(program: Program, positions: int | None) -> tuple[PassReport, list[Shared]]:
    """Rewrite in place.

    Args:
        positions: for a decoder with inputs (ids, attention_mask, caches ..): the length of its rotary tables.

    Returns:
        What became operators and what did not, and the embeddings that gather from codes now.
    """
    report = PassReport("operators of ONNX Runtime")
    if positions is None:
        rewrite_plain(program, report)
    else:
        rewrite_cached(program, positions, report)
    joined = join_siblings(program)
    report.notes.append(f"{joined} products joined to another of the same input")
    rewrite_activations(program, report)
    rewrite_norms(program, report)
    program.cleanup()
    shared = share_tables(program)
    for table in shared:
        far = f", {table.farther:.2f} times as far from its numbers as they are from their own rounding"
        turned = "" if table.turn is None else f" and multiplied by a matrix{far}"
        report.notes.append(f"{table.name} is gathered from the codes of the logits{turned}")
    return report, shared
