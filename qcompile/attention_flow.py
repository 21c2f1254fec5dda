"""Attention flow: which rows of which linears meet in the scores of an attention.

Between the linears that make queries and keys and the product q k^T lie only operations that are
linear in each channel (a rotary embedding, layouts, repeated heads). Sending row numbers through
them shows, for each head and channel of the product, the rows that contribute. Rows that meet,
directly or through others, form a class: a rotary embedding mixes a channel with its partner, and
grouped heads share a key. Keys of a class may be divided by a factor if its queries are multiplied
by it, and the scores stay. What is not linear (a norm of queries) stops the flow and is named.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.norms import CASTS
from qcompile.program import Program
from qcompile.rotation_flow import Obstacle
from qcompile.sites import Site

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
_MOVES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.permute.default,
    aten.clone.default, aten.contiguous.default, aten.repeat_interleave.self_int, aten.flatten.using_ints,
}  # fmt: skip
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_JOINS = {aten.cat.default, aten.stack.default}
_SIZES = {aten.sym_size.int, aten.sym_size.default}
_MATMULS = {aten.matmul.default, aten.bmm.default}
_BETWEEN = {  # what stands between scores and the product with the values
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.tanh.default, aten.to.dtype, aten._to_copy.default,
    aten.masked_fill.Scalar, aten.where.self, aten.softmax.int, aten._softmax.default, aten.dropout.default,
    aten.view.default, aten.expand.default, aten.clone.default, aten.detach.default,
}  # fmt: skip

Terms = list[Tensor]
"""Row numbers, one tensor of the value's shape for each summand; -1 where there is none."""


@dataclass(frozen=True)
class Scores:
    """The product q k^T of one attention.

    Attributes:
        node: the attention, or the product. keys: the node of the keys, [.., T, D] or turned.
        makers: sites whose rows the classes count, with the number of each one's first row.
        classes: [rows of all makers] the class of each row, -1 for rows that do not take part.
        query: [rows] whether a row makes a query (else a key).
        of_key: [heads, D] the class of each channel of the keys.
        between: names of the nodes from the makers to the product.
    """

    node: fx.Node
    keys: fx.Node
    makers: tuple[tuple[Site, int], ...]
    classes: Tensor
    query: Tensor
    of_key: Tensor
    between: frozenset[str]


@dataclass(frozen=True)
class Product:
    """Where an attention multiplies: queries [.., T, D], keys [.., T, D] or turned [.., D, T], values."""

    node: fx.Node
    queries: fx.Node
    keys: fx.Node
    turned: bool
    reader: fx.Node  # who reads the values, as argument `values_at`
    values_at: int

    @property
    def values(self) -> fx.Node:
        """The values, [.., T, D]."""
        found: fx.Node = self.reader.args[self.values_at]
        return found


def products(program: Program) -> list[Product]:
    """Every attention of a program, fused or spelled out as two products around a softmax."""
    found = []
    for node in program.graph.nodes:
        if node.target is ATTENTION:
            found.append(Product(node, node.args[0], node.args[1], False, node, 2))
        elif node.target in _MATMULS:
            reader = _beyond_softmax(node)
            if reader is not None:
                found.append(Product(node, node.args[0], node.args[1], True, reader, 1))
    return found


def _beyond_softmax(node: fx.Node) -> fx.Node | None:
    """The product with the values, if `node` makes scores."""
    passed = False
    while len(node.users) == 1:
        node = next(iter(node.users))
        passed |= node.target in (aten.softmax.int, aten._softmax.default)
        if passed and node.target in _MATMULS:
            return node
        if node.target not in _BETWEEN:
            return None
    return None


def scores(program: Program, sites: list[Site]) -> list[Scores | Obstacle]:
    """The classes of every attention, or what stops the flow."""
    return [_classes(program, sites, p.node, p.queries, p.keys, p.turned) for p in products(program)]


def _classes(
    program: Program, sites: list[Site], node: fx.Node, q: fx.Node, k: fx.Node, turned: bool
) -> Scores | Obstacle:
    walk = _Walk(program, {s.node: s for s in sites if s.kind == "linear"})
    try:
        queries = _heads(walk.terms(q), False)
        keys = _heads(walk.terms(k), turned)
        walk.check_readers(node)
    except _Stop as stop:
        return Obstacle(*stop.args)
    heads, of_keys = queries[0].shape[0], keys[0].shape[0]
    shared_heads = of_keys == 1 or bool(node.kwargs.get("enable_gqa"))
    repeats = heads // of_keys if shared_heads else 1
    count = walk.rows
    shared = [m.name for m, _ in walk.makers if m.shared_with]
    if shared:
        return Obstacle(node.name, f"the weight {shared[0]} is shared")
    parent = list(range(count))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    is_query = torch.zeros(count, dtype=torch.bool)
    is_key = torch.zeros(count, dtype=torch.bool)
    for marks, terms in ((is_query, queries), (is_key, keys)):
        for term in terms:
            marks[term[term >= 0]] = True
    if bool((is_query & is_key).any()):
        return Obstacle(node.name, "one row makes both queries and keys")
    wide_keys = [term.repeat_interleave(repeats, 0) for term in keys]
    if wide_keys[0].shape != queries[0].shape:
        return Obstacle(node.name, "queries and keys have different heads")
    for column in torch.stack([*queries, *wide_keys]).flatten(1).t().tolist():
        members = [row for row in column if row >= 0]
        for row in members[1:]:
            parent[find(row)] = find(members[0])
    classes = torch.tensor([find(row) for row in range(count)])
    classes[~(is_query | is_key)] = -1
    between = frozenset(n.name for n, terms in walk.memo.items() if terms)
    return Scores(node, k, tuple(walk.makers), classes, is_query, classes[keys[0]], between)


def _heads(terms: Terms, turned: bool) -> Terms:
    """[.., heads, T, D] -> [heads, D] of each term; the rows must not depend on batch or position."""
    found = []
    for term in terms:
        term = term.transpose(-1, -2) if turned else term
        flat = term.reshape(-1, *term.shape[-3:]) if term.ndim > 3 else term[:, None]
        first = flat[0, :, 0]
        if not bool((flat == first[:, None]).all()):
            raise _Stop("attention", "the channels differ from position to position")
        found.append(first)
    return found


class _Stop(Exception):
    """A node that is not linear in the rows, and why."""


class _Walk:
    def __init__(self, program: Program, sites: dict[fx.Node, Site]) -> None:
        self.program, self.sites = program, sites
        self.makers: list[tuple[Site, int]] = []
        self.rows = 0
        self.memo: dict[fx.Node, Terms | list[Terms] | None] = {}

    def terms(self, node: fx.Node) -> Terms:
        found = self._visit(node)
        if not found or isinstance(found[0], list):
            raise _Stop(node.name, "it does not come from a linear")
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
        upstream = {a: self._visit(a) for a in node.all_input_nodes if a.target not in _SIZES}
        derived = [a for a, terms in upstream.items() if terms]
        if not derived:
            return None
        first = upstream[derived[0]]
        if node.target in CASTS or node.target is aten.neg.default:
            return first
        if node.target in _MOVES or (node.target is aten.index.Tensor and len(derived) == 1):
            return [self._move(node, term) for term in first]
        if node.target in _SPLITS:
            parts = [self._move(node, term) for term in first]
            return [list(part) for part in zip(*parts, strict=True)]
        if node.target is operator.getitem:
            return first[node.args[1]]
        if node.target in (aten.mul.Tensor, aten.div.Tensor) and len(derived) == 1:
            shape = _hints(node)
            return [term.expand(shape) for term in first]
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and len(derived) == len(node.all_input_nodes) == 2:
            return [*upstream[derived[0]], *upstream[derived[1]]]
        if node.target in _JOINS and all(upstream[a] for a in node.args[0]):
            return self._join(node, [upstream[a] for a in node.args[0]])
        raise _Stop(node.name, f"{node.target} is not linear in each channel")

    def _constant(self, node: fx.Node) -> Tensor:
        name = self.program.weight_name(node)
        if name is not None:
            return self.program.weights[name]
        if node.op != "get_attr":
            raise _Stop(node.name, "channels are picked by a computed index")
        found: Tensor = getattr(self.program.graph_module, str(node.target))
        return found

    def _rows_of(self, site: Site) -> Tensor:
        start = next((start for maker, start in self.makers if maker is site), None)
        if start is None:
            start, self.rows = self.rows, self.rows + site.N
            self.makers.append((site, start))
        return torch.arange(start, start + site.N).expand(_hints(site.node))

    def _move(self, node: fx.Node, term: Tensor) -> object:
        if node.target is aten.index.Tensor:
            return node.target(term.contiguous(), [None if i is None else self._constant(i) for i in node.args[1]])
        args = fx.node.map_arg(node.args[1:], lambda n: _hint(n.meta["val"]))
        kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
        return node.target(term.contiguous(), *args, **kwargs)

    def _join(self, node: fx.Node, parts: list[Terms]) -> Terms:
        longest = max(len(p) for p in parts)
        padded = [[*p, *[torch.full_like(p[0], -1)] * (longest - len(p))] for p in parts]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return [node.target(list(column), dim) for column in zip(*padded, strict=True)]

    def check_readers(self, end: fx.Node) -> None:
        """Refuse rows that are read on the way by something else than the scores."""
        used = {
            int(row)
            for terms in (self.memo.get(a) for a in end.all_input_nodes[:2])
            for term in terms or []
            for row in term.unique()
            if row >= 0
        }
        for node, terms in list(self.memo.items()):
            if not terms or isinstance(terms[0], list):
                continue
            for user in node.users:
                if user is end or user in self.memo or user.target in _SIZES or user.target in _SPLITS:
                    continue
                seen = [self._move(user, t) for t in terms] if user.target in _MOVES | {aten.index.Tensor} else terms
                if used & {int(row) for term in seen for row in term.unique()}:
                    raise _Stop(user.name, f"{node.name} is read on another path too")


def _hint(size: object) -> object:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def _hints(node: fx.Node) -> list[int]:
    return [int(_hint(s)) for s in node.meta["val"].shape]
