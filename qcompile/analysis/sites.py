"""Sites: every matmul whose weight is the model's own.

A site is found by its arithmetic, `linear(x, W, b)` with W a weight of the program, or a product
of routed rows with a 3-D stack of expert weights. Sites that read the same value are siblings:
they share one activation quantization, one smoothing scale, one Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from qcompile.ir.aten_ops import LINEAR, MATMULS, aten
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint


@dataclass(frozen=True)
class Site:
    """One weight-carrying product.

    Attributes:
        name: the weight's attribute path; what rules match and reports print.
        kind: "linear" (weight [N, K]) or "experts" (weight 3-D, one matrix for each expert).
        node: the product.
        input: its left operand, [.., K].
        weight: the placeholder of the weight.
        bias: of a linear, [N], or None.
        N: rows of the weight, the channels of the output.
        K: columns of the weight, the channels of the input.
        grouped: (experts) rows sorted by expert, with the end of each expert's rows as third operand.
        rows_first: (experts) the weight is stored [E, N, K], else [E, K, N].
        siblings: names of the other sites on the same input.
        shared_with: names of other nodes that read the same weight (tied embeddings) or the same bias.
    """

    name: str
    kind: Literal["linear", "experts"]
    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    N: int
    K: int
    grouped: bool = False
    rows_first: bool = True
    siblings: tuple[str, ...] = ()
    shared_with: tuple[str, ...] = field(default=())

    @property
    def batched(self) -> bool:
        """(experts) A product [E, T, K] by [E, K, N]: row t of expert e meets matrix e."""
        shape = self.input.meta["val"].shape
        plain = self.node.target in MATMULS
        return plain and len(shape) == 3 and shape[0] == self.weight.meta["val"].shape[0]

    def __str__(self) -> str:
        return f"{self.name} [{self.N}x{self.K}]"


def find_sites(program: Program) -> list[Site]:
    """All sites of a program in graph order, with siblings and sharing filled in."""
    found: list[Site] = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        site = _linear(program, node) or _experts(program, node)
        if site is not None:
            found.append(site)
    by_input: dict[fx.Node, list[str]] = {}
    for site in found:
        by_input.setdefault(site.input, []).append(site.name)
    complete: list[Site] = []
    for site in found:
        others = tuple(n for n in by_input[site.input] if n != site.name)
        users = dict.fromkeys([*site.weight.users, *(site.bias.users if isinstance(site.bias, fx.Node) else ())])
        own = [site.node, *(u for u in users if site.node in u.users and _is_transpose(u))]
        consumers = tuple(u.name for u in users if u not in own)
        complete.append(replace(site, siblings=others, shared_with=consumers))
    return complete


def _linear(program: Program, node: fx.Node) -> Site | None:
    if node.target is not LINEAR:
        return None
    x, weight = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    name = program.weight_name(weight)
    if name is None or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    n, k = weight.meta["val"].shape
    return Site(name, "linear", node, x, weight, bias, int(n), int(k))


def _experts(program: Program, node: fx.Node) -> Site | None:
    """A product with a 3-D weight: grouped or batched, straight or through a transpose."""
    if node.target not in MATMULS and not is_grouped_matmul(node):
        return None
    for operand in node.args:
        weight, transposes = through_transposes(operand)
        name = program.weight_name(weight)
        if name is None or weight.meta["val"].ndim != 3:
            continue
        value = node.meta.get("val")
        first = node.args[0]
        if not isinstance(value, torch.Tensor) or not isinstance(first, fx.Node) or first is operand:
            continue
        k = first.meta["val"].shape[-1]
        rows_first = transposes % 2 == 1  # the product reads [E, K, N]
        shape = [int(s) for s in weight.meta["val"].shape]
        n, depth = (shape[1], shape[2]) if rows_first else (shape[2], shape[1])
        if not isinstance(k, int) or k != depth:
            continue
        grouped = grouped_operands(node) is not None
        return Site(name, "experts", node, first, weight, None, n, k, grouped, rows_first)
    return None


def grouped_operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The operands of a product of rows that are sorted by expert, under whatever name a library registers it.

    Args:
        node: any node.

    Returns:
        x [T, K], a stack [E, K, N] and the end of each expert's rows [E], of a node that gives [T, N] and reads
        nothing else; None for any other node.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.all_input_nodes) != 3:
        return None
    x, stack, ends = node.all_input_nodes
    value, *values = [operand.meta.get("val") for operand in (node, x, stack, ends)]
    if not all(isinstance(v, torch.Tensor) for v in (value, *values)) or values[2].is_floating_point():
        return None
    shapes = [[hint(size) for size in v.shape] for v in (value, *values)]
    if [len(shape) for shape in shapes] != [2, 2, 3, 1]:
        return None
    (rows, columns), (t, k), (experts, depth, n), (count,) = shapes
    return (x, stack, ends) if (rows, columns, depth, count) == (t, n, k, experts) else None


def is_grouped_matmul(node: fx.Node) -> bool:
    """Whether a node multiplies rows by the weights of their experts; PyTorch's own needs no ends for equal counts."""
    return node.target is aten._grouped_mm.default or grouped_operands(node) is not None


def through_transposes(operand: Any) -> tuple[Any, int]:
    """The value behind transposes of its last two axes, and how many there are."""
    count = 0
    while isinstance(operand, fx.Node) and _is_transpose(operand):
        operand, count = operand.args[0], count + 1
    return operand, count


def _is_transpose(node: fx.Node) -> bool:
    if node.target is aten.mT.default:
        return True
    if node.target not in (aten.transpose.int, aten.permute.default):
        return False
    axes = range(ndim) if (ndim := node.meta["val"].ndim) else ()
    if node.target is aten.permute.default:
        return [axes[a] for a in node.args[1]] == [*axes[:-2], ndim - 1, ndim - 2]
    return {axes[a] for a in node.args[1:]} == {ndim - 2, ndim - 1}
