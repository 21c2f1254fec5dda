"""Attention scores: which rows of which linears meet in the scores of an attention.

Between the linears that give queries and keys and the product q k^T lie only operations that are
linear in each channel (a rotary embedding, layouts, repeated heads). Sending row indices through
them shows, for each head and channel of the product, the rows that contribute. Rows that meet,
directly or through others, form a class: a rotary embedding mixes a channel with its partner, and
grouped heads share a key. Keys of a class may be divided by a factor if its queries are multiplied
by it, and the scores stay. What is not linear (a norm of queries) stops the flow and is named.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.channel_origin import ChannelOrigins, FlowStops, Terms
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.sites import Site, find_sites
from qcompile.ir.aten_ops import ALIASES, CASTS, DROPOUTS, EXPANDS, MATMULS, RESHAPES, SDPA, SOFTMAX, Ops, aten
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

# No transposes: scores of keys and queries instead of queries and keys would pass for others.
_BETWEEN: Ops = SOFTMAX | CASTS | ALIASES | DROPOUTS | RESHAPES | EXPANDS | {
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.tanh.default, aten.masked_fill.Scalar, aten.where.self,
    aten.where.ScalarOther,
}  # fmt: skip
"""What stands between scores and the product with the values: scales, soft caps, masks, the softmax."""


@dataclass(frozen=True)
class AttentionScores:
    """The product q k^T of one attention.

    Attributes:
        node: the attention, or the product.
        keys: the node of the keys, [.., T, D], or [.., D, T] where the product reads them transposed.
        producers: the sites of queries and keys, each with the index of its first row.
        classes: [rows of all producers] the class of each row, -1 for rows that do not take part.
        query: [rows] whether a row gives a query (else a key).
        of_key: [H, D] the class of each channel of the keys.
        between: names of the nodes from the producers to the product.
    """

    node: fx.Node
    keys: fx.Node
    producers: tuple[tuple[Site, int], ...]
    classes: Tensor
    query: Tensor
    of_key: Tensor
    between: frozenset[str]


@dataclass(frozen=True)
class AttentionMatmul:
    """The two products of an attention.

    Attributes:
        node: the product of queries and keys, or a fused attention.
        queries: [.., S, D].
        keys: [.., T, D], or [.., D, T] with `keys_transposed`.
        keys_transposed: whether the keys come transposed.
        value_product: the node that reads the values.
        values_at: as which of its arguments.
    """

    node: fx.Node
    queries: fx.Node
    keys: fx.Node
    keys_transposed: bool
    value_product: fx.Node
    values_at: int

    @property
    def values(self) -> fx.Node:
        """The values, [.., T, D]."""
        found: fx.Node = self.value_product.args[self.values_at]
        return found


def attention_matmuls(program: Program) -> list[AttentionMatmul]:
    """Every attention of a program, fused or decomposed into two products around a softmax."""
    found = []
    for node in program.graph.nodes:
        if node.target is SDPA:
            found.append(AttentionMatmul(node, node.args[0], node.args[1], False, node, 2))
        elif node.target in MATMULS:
            consumer = _beyond_softmax(node)
            if consumer is not None:
                found.append(AttentionMatmul(node, node.args[0], node.args[1], True, consumer, 1))
    return found


def _beyond_softmax(node: fx.Node) -> fx.Node | None:
    """The product with the values, if `node` gives scores."""
    passed = False
    while len(node.users) == 1:
        source, node = node, next(iter(node.users))
        passed |= node.target in SOFTMAX
        if passed and node.target in MATMULS:
            return node if node.args[0] is source else None
        if node.target not in _BETWEEN:
            return None
    return None


def scores(program: Program, sites: list[Site]) -> list[AttentionScores | Obstacle]:
    """The classes of every attention, or what stops the flow."""
    return [_classes(program, sites, p.node, p.queries, p.keys, p.keys_transposed) for p in attention_matmuls(program)]


def _classes(
    program: Program, sites: list[Site], node: fx.Node, q: fx.Node, k: fx.Node, keys_transposed: bool
) -> AttentionScores | Obstacle:
    walk = ChannelOrigins(program, sites)
    try:
        queries = _heads(walk.terms(q), False)
        keys = _heads(walk.terms(k), keys_transposed)
        walk.check_consumers([*queries, *keys], {node})
    except FlowStops as stop:
        return Obstacle(*stop.args)
    heads, of_keys = queries[0].shape[0], keys[0].shape[0]
    shared_heads = of_keys == 1 or bool(node.kwargs.get("enable_gqa"))
    repeats = heads // of_keys if shared_heads else 1
    count = walk.rows
    shared = [m.name for m, _ in walk.producers if m.shared_with]
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
        return Obstacle(node.name, "one row gives both queries and keys")
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
    return AttentionScores(node, k, tuple(walk.producers), classes, is_query, classes[keys[0]], between)


def _heads(terms: Terms, keys_transposed: bool) -> Terms:
    """[.., H, T, D] -> [H, D] of each term; the rows must not depend on batch or position."""
    found = []
    for term in terms:
        term = term.transpose(-1, -2) if keys_transposed else term
        flat = term.reshape(-1, *term.shape[-3:]) if term.ndim > 3 else term[:, None]
        first = flat[0, :, 0]
        if not bool((flat == first[:, None]).all()):
            raise FlowStops("attention", "the channels differ from position to position")
        found.append(first)
    return found


def mixed_channels(program: Program, product: AttentionMatmul) -> Tensor | Obstacle:
    """Which channels of the keys a rotary embedding mixes.

    What mixes channels is taken to be a rotation, so the norm of a class is the same at every position.

    Args:
        program: the program.
        product: one of its attentions.

    Returns:
        [H, D] a class for each channel, one for all that are mixed; or what cannot be followed.
    """
    try:
        terms = _heads(_Mixing(program, find_sites(program)).terms(product.keys), product.keys_transposed)
    except FlowStops as stop:
        return Obstacle(*stop.args)
    parent = {int(row): int(row) for term in terms for row in term.unique()}

    def first(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    for column in torch.stack(terms).flatten(1).t().tolist():
        members = [row for row in column if row >= 0]
        for row in members[1:]:
            parent[first(row)] = first(members[0])
    return torch.tensor([[first(row) for row in head] for head in terms[0].tolist()])


class _Lost(FlowStops):
    """A node behind a rotation that the flow cannot pass."""


class _Mixing(ChannelOrigins):
    """Channels instead of rows: what the flow cannot pass, as a norm of keys, is where other channels begin."""

    def _compute(self, node: fx.Node) -> Terms | list[Terms] | None:
        try:
            return super()._compute(node)
        except _Lost:
            raise
        except FlowStops as stop:
            upstream = [a for a in node.all_input_nodes if a.op == "call_function"]
            mixed = any(len(self.memo.get(a) or ()) > 1 and not isinstance(self.memo[a][0], list) for a in upstream)
            if mixed or any(a.meta["val"].is_complex() for a in upstream if isinstance(a.meta.get("val"), Tensor)):
                raise _Lost(*stop.args) from None  # behind a rotation nothing would tell what it mixed
            shape = [hint(size) for size in node.meta["val"].shape]
            start, self.rows = self.rows, self.rows + shape[-1]
            return [torch.arange(start, self.rows).expand(shape)]
