"""Products with a weight that are no sites: convolutions, recurrent layers, products whose weight is computed.

They stay float. A report names them all the same, so that nobody takes "all sites quantized" for the whole model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from qcompile.ir.aten_ops import CONVOLUTIONS, PRODUCTS, RECURRENT
from qcompile.ir.op_calls import OUR_OPS
from qcompile.ir.program import Program


@dataclass(frozen=True)
class OtherProduct:
    """One product that is no site.

    Attributes:
        name: the attribute path of its largest weight.
        node: the product.
        reason: why it stays float.
    """

    name: str
    node: fx.Node
    reason: str


def other_products(program: Program, sites: Collection[fx.Node]) -> list[OtherProduct]:
    """The products with a weight that are not among `sites` (their nodes), in graph order; each weight once."""
    of_weights = _computed_of_weights(program)
    found: dict[str, OtherProduct] = {}
    for node in program.graph.nodes:
        if node.target not in CONVOLUTIONS | RECURRENT | PRODUCTS or node in sites:
            continue
        operands = [operand for operand in node.all_input_nodes if operand in of_weights]
        weights = [weight for operand in operands for weight in _weights_behind(program, operand)]
        if not weights or len(operands) == len(node.all_input_nodes):  # no activation takes part
            continue
        name = max(weights, key=lambda weight: program.weights[weight].numel())
        if program.weights[name].ndim >= 2:
            direct = any(program.weight_name(operand) == name for operand in operands)
            found.setdefault(name, OtherProduct(name, node, _reason(node, direct)))
    return list(found.values())


def _reason(node: fx.Node, direct: bool) -> str:
    if node.target in CONVOLUTIONS:
        return "a convolution, which no recipe quantizes"
    if node.target in RECURRENT:
        return "a recurrent layer, which no recipe quantizes"
    what = "stands on the left, or with other sizes than x W^T" if direct else "is computed from parameters"
    return f"the weight of this product {what}"


def _computed_of_weights(program: Program) -> set[fx.Node]:
    """Weights, constants, and what is computed of them only."""
    found = set[fx.Node]()
    for node in program.graph.nodes:
        if program.weight_name(node) is not None or node.op == "get_attr":
            found.add(node)
        elif node.op == "call_function" and node.target not in OUR_OPS and node.all_input_nodes:
            if all(operand in found for operand in node.all_input_nodes):
                found.add(node)
    return found


def _weights_behind(program: Program, node: fx.Node) -> set[str]:
    found, work, visited = set[str](), [node], set[fx.Node]()
    while work:
        value = work.pop()
        if value in visited:
            continue
        visited.add(value)
        name = program.weight_name(value)
        found |= set() if name is None else {name}
        work += value.all_input_nodes
    return found
