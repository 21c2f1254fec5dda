"""An embedding whose table nothing else reads holds it in 8 bits: a quarter of its bytes.

Of a small encoder the table of tokens is half of all weights, and of a decoder whose logits have a weight of their own
one of its largest. Its rows are only copied, so rounding them to int8 in blocks of at most 128 changes what follows far
less than rounding products to 8 or 4 bits does. A table that tied logits hold in codes is gathered from those
(tied_embedding.py).
"""

from __future__ import annotations

import torch

from qcompile.codegen.onnx.fusions.tied_embedding import Shared
from qcompile.codegen.onnx.tracing.onnx_linear import block_of, to_blocks
from qcompile.ir.program import Program
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.recipe.report import PassReport

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

LEAST = 2**20  # numbers of a table, below which there is little to save
_INT8 = Format("int8")


def round_tables(program: Program, parameters: set[str], report: PassReport) -> list[Shared]:
    """Let embeddings gather from 8-bit codes of their tables.

    Args:
        parameters: names of weights that are a module's parameters. report: names the tables that are.

    Returns:
        The tables with the numbers that they have now.
    """
    found = []
    for placeholder in list(program.placeholders):
        name = program.weight_name(placeholder)
        if name not in parameters or (table := program.weights[name]).numel() < LEAST or table.ndim != 2:
            continue
        gathers = [n for n in placeholder.users if n.target is aten.embedding.default and n.args[0] is placeholder]
        if not gathers or len(gathers) < len(placeholder.users):
            continue
        rows, k = table.shape
        form = Format("int8", "group", block_of(_INT8, k))
        rounded = quantize_tensor(table, form)
        codes, scales, _ = to_blocks(QuantLinear(k, rows, form, None, dict(codes=rounded.codes, scale=rounded.scale)))
        nodes = [program.add_weight(f"{name}_{part}", made) for part, made in (("codes", codes), ("scales", scales))]
        for gather in gathers:
            args = (gather.args[1], *nodes, None, k, form.bits, form.group)
            gather.replace_all_uses_with(program.insert(ops.gather_nbits.default, args, before=gather))
            program.graph.erase_node(gather)
        found.append(Shared(name, rounded.dequantize()))
        report.notes.append(f"{name} is held in 8 bits")
    program.cleanup()
    return found
