"""An embedding whose table nothing else reads holds it in int8: a quarter of its bytes.

Of a small encoder the table of tokens is half of all weights, and of a decoder whose logits have a weight of their own
one of its largest. Its rows are only copied, so quantizing them to int8 in blocks of at most 128 changes what follows
far less than quantizing matmuls to 8 or 4 bits does. A table that is tied to quantized logits is gathered from their
codes (tied_embedding.py).
"""

from __future__ import annotations

import torch

from qcompile.codegen.onnx.fusions.quantized_embedding import QuantizedEmbedding
from qcompile.codegen.onnx.ops.embedding_ops import GatherNBitsCall
from qcompile.codegen.onnx.tracing.weight_layouts import block_size_of, to_matmul_nbits
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.recipe.report import PassReport

aten = torch.ops.aten

MIN_ELEMENTS = 2**20  # of a table, below which there is little to save


def quantize_embeddings(program: Program, parameters: set[str], report: PassReport) -> list[QuantizedEmbedding]:
    """Let embeddings gather from int8 codes of their tables, in place.

    Args:
        program: may hold tables that are constants, which stay float.
        parameters: names of weights that are parameters of the module.
        report: gets a note for each table.

    Returns:
        The tables with the values that they have now.
    """
    quantized = []
    for placeholder in list(program.placeholders):
        name = program.weight_name(placeholder)
        if name not in parameters or (table := program.weights[name]).numel() < MIN_ELEMENTS or table.ndim != 2:
            continue
        gathers = [n for n in placeholder.users if n.target is aten.embedding.default and n.args[0] is placeholder]
        if not gathers or len(gathers) < len(placeholder.users):
            continue
        k = table.shape[1]
        form = Format("int8", "group", block_size_of(Format("int8"), k))
        q = quantize_tensor(table, form)
        codes, scales, _ = to_matmul_nbits(q)
        stored = program.add_weight(f"{name}_codes", codes), program.add_weight(f"{name}_scales", scales)
        for gather in gathers:
            call = GatherNBitsCall(gather.args[1], stored[0], stored[1], None, k, form.bits, form.group)
            gather.replace_all_uses_with(call.insert(program, before=gather))
            program.graph.erase_node(gather)
        quantized.append(QuantizedEmbedding(name, q.dequantize()))
        report.notes.append(f"{name} is an int8 embedding table")
    program.cleanup()
    return quantized
