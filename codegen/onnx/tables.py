"""An embedding whose table the logits have in codes reads those codes: one table in the file.

A tied model's logits are the products with its own embedding table. When they were quantized, their
codes are a rounding of that table; the rows of the embedding can then be gathered from the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.codegen.onnx.operators import blocks_to_numbers
from qcompile.program import Program

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

_STEP = 0.55  # of a step: what rounding may change a number by
_CLIPPED = 0.1  # share of numbers that a searched clip may change by more


@dataclass(frozen=True)
class Shared:
    """A table that is gathered from codes: its name, and the numbers that it now holds."""

    name: str
    numbers: Tensor


def share_tables(program: Program) -> list[Shared]:
    """Let embeddings gather from the codes of products that hold a rounding of their table."""
    products = [n for n in program.graph.nodes if n.target in (ops.nbits_linear.default, ops.dual_linear.default)]
    found = []
    for node in list(program.graph.find_nodes(op="call_function", target=aten.embedding.default)):
        name = program.weight_name(node.args[0])
        for product in products:
            numbers = None if name is None else _rounding_of(program, program.weights[name], product)
            if numbers is None or name is None:
                continue
            _, codes, scales, zeros, _, k, bits, block = product.args[:8]
            args = (node.args[1], codes, scales, zeros, k, bits, block)
            node.replace_all_uses_with(program.insert(ops.gather_nbits.default, args, before=node))
            program.graph.erase_node(node)
            found.append(Shared(name, numbers))
            break
    program.cleanup()
    return found


def _rounding_of(program: Program, table: Tensor, product: fx.Node) -> Tensor | None:
    """The numbers of a product's codes if they are a rounding of the table [V, K], else None."""
    names = [program.weight_name(a) for a in product.args[1:4]]
    codes, scales, zeros = (program.weights[n] if n is not None else None for n in names)
    assert codes is not None and scales is not None
    k, bits, block = product.args[5:8]
    if tuple(table.shape) != (codes.shape[0], k) or (zeros is not None and zeros.is_floating_point()) or bits < 4:
        return None  # GatherBlockQuantized reads codes of 4 and 8 bits, with zero points of the same
    numbers = blocks_to_numbers(codes, scales, zeros, bits, block)[:, :k]
    step = scales.abs().repeat_interleave(block, 1)[:, :k]
    far = (numbers - table).abs() > _STEP * step
    return numbers if float(far.float().mean()) <= _CLIPPED else None
