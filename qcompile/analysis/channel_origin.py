"""Channel origins: which rows of which linears the channels of a value are made of.

Row indices are sent through the very operations of the graph, so no layout is assumed: heads, fused
projections, interleaved pairs all come out. Two readings of what may stand between:

    linear        every channel is a sum of rows times factors that do not depend on the model's
                  linears: casts, layouts, products with constants, sums (a rotary embedding)
    elementwise   every channel is some function of its rows, the same for all channels: also
                  activations, products of two values (a gate), the values of an attention

Whatever else is met stops the flow and is named.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.sites import Site
from qcompile.ir.aten_ops import (
    ACTIVATIONS,
    CASTS,
    JOINS,
    MATMULS,
    MOVES,
    SDPA,
    SPLITS,
    Ops,
    aten,
    is_cast,
    reads_elements,
)
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

_FUNCTIONS: Ops = ACTIVATIONS | {aten.pow.Tensor_Scalar, aten.square.default}
"""The same function of every element; a power is no activation by itself, but part of one (squared ReLU)."""

Terms = list[Tensor]
"""Row indices, one tensor of the value's shape for each summand; -1 where there is none."""


class FlowStops(Exception):
    """A node that the flow cannot pass, and why: args are (node name, reason)."""


class ChannelOrigins:
    """The terms of values, back to the linear sites.

    Attributes:
        producers: the linear sites behind the values, each with the index that its first row got.
        rows: the number of rows of all producers.
        memo: every node passed -> its terms; None where no site is upstream.
    """

    def __init__(self, program: Program, sites: list[Site], *, elementwise: bool = False) -> None:
        """`elementwise` chooses the reading (see above)."""
        self.program, self.elementwise = program, elementwise
        self.sites = {site.node: site for site in sites if site.kind == "linear"}
        self.producers: list[tuple[Site, int]] = []
        self.rows = 0
        self.memo: dict[fx.Node, Terms | list[Terms] | None] = {}

    def terms(self, node: fx.Node) -> Terms:
        """The rows behind each element of a value. Raises FlowStops."""
        found = self._visit(node)
        if not found or isinstance(found[0], list):
            raise FlowStops(node.name, "it does not come from a linear")
        return found

    def _visit(self, node: fx.Node) -> Terms | list[Terms] | None:
        """The terms of a node; None where no site is upstream."""
        if node not in self.memo:
            self.memo[node] = self._compute(node)
        return self.memo[node]

    def _compute(self, node: fx.Node) -> Terms | list[Terms] | None:
        if node.op != "call_function":
            return None
        if node in self.sites:
            return [self._rows_of(self.sites[node])]
        if self.elementwise and (node.target is SDPA or node.target in MATMULS):
            return self._attend(node)
        upstream = {a: self._visit(a) for a in node.all_input_nodes if reads_elements(node, a)}
        derived = [a for a, terms in upstream.items() if terms]
        if not derived:
            return None
        first = upstream[derived[0]]
        if is_cast(node) or node.target is aten.neg.default:
            return first
        if node.target in MOVES or node.target is aten.index.Tensor:
            return [self._move(node, term) for term in first]
        if node.target in SPLITS:
            parts = [self._move(node, term) for term in first]
            return [list(part) for part in zip(*parts, strict=True)]
        if node.target is operator.getitem:
            return first[node.args[1]]

        def spread() -> Terms:
            return [term.expand(_hints(node)) for a in derived for term in upstream[a]]

        if node.target in (aten.mul.Tensor, aten.div.Tensor) and len(derived) == 1:
            if self.elementwise:
                self._refuse_factors(node, derived[0], spread())
                return spread()
            is_divisor = node.target is aten.div.Tensor and derived[0] is not node.args[0]
            if not is_divisor and node.args.count(derived[0]) == 1:  # else a square
                return spread()
        if self.elementwise:
            if node.target in _FUNCTIONS | CASTS:
                return first
            if node.target is aten.mul.Tensor:
                return spread()
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and len(derived) == 2:
            return spread()
        if node.target in JOINS and all(upstream[a] for a in node.args[0]):
            return self._join(node, [upstream[a] for a in node.args[0]])
        what = "elementwise" if self.elementwise else "linear in each channel"
        raise FlowStops(node.name, f"{node.target} is not {what}")

    def attention_heads(self) -> list[Tensor]:
        """The rows [heads, D] of each attention passed, one tensor for each summand."""
        found = []
        for node, terms in self.memo.items():
            if node.target is SDPA or node.target in MATMULS:
                found += [t[..., 0, :].reshape(-1, t.shape[-1]) for t in terms or () if isinstance(t, Tensor)]
        return found

    def _attend(self, node: fx.Node) -> Terms:
        """An attention passes on the channels of its values, to every position."""
        values = node.args[2] if node.target is SDPA else node.args[1]
        shape, found = _hints(node), []
        for term in self.terms(values):
            first = term[..., :1, :]
            if not bool((term == first).all()):
                raise FlowStops(node.name, "the channels differ from position to position")
            if node.target is SDPA and node.kwargs.get("enable_gqa"):
                first = first.repeat_interleave(shape[1] // first.shape[1], 1)
            found.append(first.expand(shape))
        return found

    def _refuse_factors(self, node: fx.Node, derived: fx.Node, terms: Terms) -> None:
        """Refuse a factor that is another for other rows."""
        for other in node.all_input_nodes:
            if other is derived or not isinstance(other.meta.get("val"), Tensor):
                continue
            sizes = [1] * terms[0].ndim + _hints(other)
            for axis in range(-terms[0].ndim, 0):
                if sizes[axis] != 1 and any(bool((t != t.narrow(axis, 0, 1)).any()) for t in terms):
                    raise FlowStops(node.name, f"{other.name} holds a factor for each channel")

    def _constant(self, node: fx.Node) -> Tensor:
        name = self.program.weight_name(node)
        if name is not None:
            return self.program.weights[name]
        if node.op != "get_attr":
            raise FlowStops(node.name, "channels are picked by a computed index")
        found: Tensor = getattr(self.program.graph_module, str(node.target))
        return found

    def _rows_of(self, site: Site) -> Tensor:
        start, self.rows = self.rows, self.rows + site.N
        self.producers.append((site, start))
        return torch.arange(start, start + site.N).expand(_hints(site.node))

    def _move(self, node: fx.Node, term: Tensor) -> Any:
        if node.target is aten.index.Tensor:
            return node.target(term.contiguous(), [None if i is None else self._constant(i) for i in node.args[1]])
        args = fx.node.map_arg(node.args[1:], lambda n: hint(n.meta["val"]))
        return node.target(term.contiguous(), *args, **node.kwargs)

    def _join(self, node: fx.Node, parts: list[Terms]) -> Terms:
        longest = max(len(p) for p in parts)
        padded = [[*p, *[torch.full_like(p[0], -1)] * (longest - len(p))] for p in parts]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return [node.target(list(column), dim) for column in zip(*padded, strict=True)]

    def check_consumers(self, of: list[Tensor], ends: set[fx.Node]) -> None:
        """Refuse rows `of` some values that are read on the way by something else than `ends`."""
        used = {int(row) for term in of for row in term.unique() if row >= 0}
        for node, terms in list(self.memo.items()):
            for user in node.users if terms else ():
                if user in ends or user in self.memo or not reads_elements(user, node):
                    continue
                for term in terms[user.args[1]] if isinstance(terms[0], list) else terms:
                    if used & {int(row) for part in self._read_of(user, term) for row in part.unique()}:
                        raise FlowStops(user.name, f"{node.name} is read on another path too")

    def _read_of(self, node: fx.Node, term: Tensor) -> list[Tensor]:
        """What a node reads of a term: all of it but where the node only moves elements."""
        if node.target in SPLITS:
            parts = self._move(node, term)
            return [parts[part.args[1]] for part in node.users]
        return [self._move(node, term) if node.target in MOVES | {aten.index.Tensor} else term]


def _hints(node: fx.Node) -> list[int]:
    return [hint(s) for s in node.meta["val"].shape]


def one_position(terms: Terms) -> list[Tensor]:
    """Terms [.., K] -> the rows of each channel, [K]. Raises FlowStops where positions differ."""
    found = []
    for term in terms:
        flat = term.reshape(-1, term.shape[-1])
        if not bool((flat == flat[0]).all()):
            raise FlowStops("value", "the channels differ from position to position")
        found.append(flat[0])
    return found
