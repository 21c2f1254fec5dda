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

from qcompile.ir.program import Program

aten = torch.ops.aten

_STACKED = {aten.bmm.default, aten.baddbmm.default, aten.matmul.default}


@dataclass(frozen=True)
class Site:
    """One weight-carrying product.

    Attributes:
        name: the weight's attribute path; what rules match and reports print.
        kind: "linear" (weight [N, K]) or "experts" (weight 3-D, one matrix for each expert).
        node: the product; `input` its left operand; `weight` its placeholder; `bias` or None.
        grouped: (experts) rows sorted by expert, with the end of each expert's rows as third operand.
        rows_first: (experts) the weight is stored [E, N, K], else [E, K, N].
        siblings: names of the other sites on the same input.
        shared_with: other readers of the same weight (tied embeddings), as node names.
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
        plain = self.node.target in (aten.bmm.default, aten.matmul.default)
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
        consumers = tuple(u.name for u in site.weight.users if u is not site.node and site.node not in u.users)
        complete.append(replace(site, siblings=others, shared_with=consumers))
    return complete


def _linear(program: Program, node: fx.Node) -> Site | None:
    if node.target is not aten.linear.default:
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
    if not _multiplies_stacks(node):
        return None
    for operand in node.args:
        weight, turns = through_transposes(operand)
        name = program.weight_name(weight)
        if name is None or weight.meta["val"].ndim != 3:
            continue
        value = node.meta.get("val")
        first = node.args[0]
        if not isinstance(value, torch.Tensor) or not isinstance(first, fx.Node) or first is operand:
            continue
        k = first.meta["val"].shape[-1]
        shape = [int(s) for s in weight.meta["val"].shape]
        rest = [s for s in shape[1:]]
        if not isinstance(k, int) or k not in rest:
            continue
        n = rest[0] if rest[1] == k else rest[1]
        grouped = grouped_operands(node) is not None
        rows_first = turns % 2 == 1 if grouped else rest[1] == k
        if grouped:  # its operand is [E, K, N]
            n = rest[0] if rows_first else rest[1]
        return Site(name, "experts", node, first, weight, None, n, k, grouped, rows_first)
    return None


def grouped_operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Of a node that multiplies rows sorted by expert: x [T, K], a stack [E, K, N], and the end of each's rows [E]."""
    if "grouped_mm" not in str(node.target) or len(node.all_input_nodes) != 3:
        return None
    x, stack, ends = node.all_input_nodes
    shapes = [getattr(operand.meta.get("val"), "shape", ()) for operand in (x, stack, ends)]
    if [len(shape) for shape in shapes] != [2, 3, 1] or ends.meta["val"].is_floating_point():
        return None  # with a bias in the place of the ends, or of products of another kind
    return x, stack, ends


def through_transposes(operand: Any) -> tuple[Any, int]:
    """The value behind transposes of its last two axes, and how many there are."""
    turns = 0
    while isinstance(operand, fx.Node) and _is_transpose(operand):
        operand, turns = operand.args[0], turns + 1
    return operand, turns


def _is_transpose(node: fx.Node) -> bool:
    if node.target not in (aten.transpose.int, aten.permute.default):
        return False
    axes = range(ndim) if (ndim := node.meta["val"].ndim) else ()
    if node.target is aten.permute.default:
        return [axes[a] for a in node.args[1]] == [*axes[:-2], ndim - 1, ndim - 2]
    return {axes[a] for a in node.args[1:]} == {ndim - 2, ndim - 1}


def _multiplies_stacks(node: fx.Node) -> bool:
    """Batched products, and the grouped products that libraries register under their own names."""
    return node.target in _STACKED or "grouped_mm" in str(node.target)
