"""The ends of a network: products that read the model's input with no product before, and that give its output.

Recipes keep them in higher precision: what is lost in the first is lost for all, and the last gives the result itself.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import fx

from qcompile.ir.aten_ops import CONVOLUTIONS, PRODUCTS, RECURRENT, aten
from qcompile.ir.op_calls import OUR_PRODUCTS

_BETWEEN: frozenset[Any] = (
    PRODUCTS
    | CONVOLUTIONS
    | RECURRENT
    | OUR_PRODUCTS
    | {aten.mm.default, aten.addmm.default, aten._grouped_mm.default, aten.embedding.default}
)
"""What multiplies by a weight. A look-up in a table is the product of a one-hot row with it."""


def is_first(product: fx.Node) -> bool:
    """Whether nothing that a product reads comes from another product."""
    work, visited = list(product.all_input_nodes), set[fx.Node]()
    while work:
        node = work.pop()
        if node.target in _BETWEEN:
            return False
        if node not in visited:
            visited.add(node)
            work += node.all_input_nodes
    return True


def is_last(product: fx.Node, products: Set[Any] = _BETWEEN) -> bool:
    """Whether the output of a product reaches the outputs of the graph, and no further one of `products`."""
    work, visited = list(product.users), set[fx.Node]()
    meets_output = False
    while work:
        node = work.pop()
        if node.target in products:
            return False
        meets_output = meets_output or node.op == "output"
        if node not in visited:
            visited.add(node)
            work += node.users
    return meets_output
