"""An embedding whose table is tied to quantized logits gathers from their codes: one table in the file.

The logits of a tied model are the product with its own embedding table. When they were quantized, their codes are a
quantization of that table, and GatherBlockQuantized can gather rows from them. Passes may untie the two: a rotation
folds the last norm's gain into the logits' weight and rotates both. Then rows are gathered from the codes and
multiplied by the matrix that comes nearest to the table, if that is about as near as quantizing the table itself would
be (change_of_basis.py). So are tables of codes that a search chose by the logits' inputs (GPTQ), not by the table.
Every token reads the whole matrix: behind 4-bit codes it has 8 bits. A table of its own would stay in float32, 4 V K
bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.fusions.change_of_basis import fit_change_of_basis
from qcompile.codegen.onnx.fusions.quantized_embedding import QuantizedEmbedding
from qcompile.codegen.onnx.ops.embedding_ops import GatherNBitsCall
from qcompile.codegen.onnx.ops.matmul_ops import DualLinearCall, NBitsLinearCall, dequantize_blocks
from qcompile.codegen.onnx.tracing.weight_layouts import to_matmul_nbits
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor

aten = torch.ops.aten

Product = Callable[[fx.Node, fx.Node], fx.Node]
"""Inserts the product of a value with a matrix, before a node."""

_MAX_ROUNDING = 0.55  # of a scale: what rounding changes a value by, and some more
_MAX_CLIPPED = 0.1  # share of values that a searched clip may change by more


def share_tied_embeddings(program: Program) -> list[QuantizedEmbedding]:
    """Let embeddings gather from the codes of products whose weight is a quantization of their table, in place."""
    kinds = NBitsLinearCall, DualLinearCall
    products = [call.of(node) for node in program.graph.nodes for call in kinds if call.matches(node)]
    shared: dict[str, QuantizedEmbedding] = {}
    multiply: dict[str, Product] = {}
    for node in list(program.graph.find_nodes(op="call_function", target=aten.embedding.default)):
        table, ids = node.args[:2]
        name = program.weight_name(table)
        if name is None:
            continue
        for product in products:
            if (embedding := _from_codes(program, name, product)) is None:
                continue
            weight = product.codes, product.scales, product.zeros, product.k, product.bits, product.block
            rows = GatherNBitsCall(ids, *weight).insert(program, before=node)
            if embedding.matrix is not None:
                if name not in multiply:
                    multiply[name] = _matrix_product(program, f"basis_of_{name}", embedding.matrix)
                rows = multiply[name](rows, node)
            node.replace_all_uses_with(rows)
            program.graph.erase_node(node)
            shared[name] = embedding
            break
    program.cleanup()
    return list(shared.values())


def _from_codes(program: Program, name: str, product: NBitsLinearCall) -> QuantizedEmbedding | None:
    """A table [V, K] as the codes of a product give it, alone or times a matrix [K, K]; None if they do not."""
    table = program.weights[name]
    codes, scales = program.weight_of(product.codes), program.weight_of(product.scales)
    zeros = None if product.zeros is None else program.weight_of(product.zeros)
    k, bits, block = product.k, product.bits, product.block
    if tuple(table.shape) != (codes.shape[0], k) or (zeros is not None and zeros.is_floating_point()) or bits < 4:
        return None  # GatherBlockQuantized reads codes of 4 and 8 bits, with zero points of the same
    values = dequantize_blocks(codes, scales, zeros, bits, block)[:, :k]
    scale = scales.abs().repeat_interleave(block, 1)[:, :k]
    changed_more = (values - table).abs() > _MAX_ROUNDING * scale
    if float(changed_more.float().mean()) <= _MAX_CLIPPED:
        return QuantizedEmbedding(name, values)
    form = Format.parse(f"int{bits}/group{block}" + ("" if zeros is None else "/zero"))
    return fit_change_of_basis(name, table, values, form)


def _matrix_product(program: Program, name: str, matrix: QTensor | Tensor) -> Product:
    """The product with a matrix [K, K] (a linear's weight), which becomes a weight of the program."""
    if isinstance(matrix, Tensor):
        transposed = program.add_weight(name, matrix.t().contiguous())
        return lambda rows, before: program.insert(aten.matmul.default, (rows, transposed), before=before)
    layout = to_matmul_nbits(matrix)
    codes, scales = (
        program.add_weight(f"{name}_{part}", tensor) for part, tensor in zip(("codes", "scales"), layout, strict=False)
    )
    sizes = matrix.columns, matrix.format.bits, matrix.format.group

    def multiply(rows: fx.Node, before: fx.Node) -> fx.Node:
        return NBitsLinearCall(rows, codes, scales, None, None, *sizes).insert(program, before=before)

    return multiply
