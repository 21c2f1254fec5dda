"""Rotation flow: the set of values that share one hidden basis.

If every writer of a residual stream writes x R instead of x and every reader reads through R^T, the
model is the same function for any orthogonal R (QuaRot, arXiv:2404.00456; SpinQuant,
arXiv:2405.16406). The flow is the closure of one value under the operations that commute with R on
the last dimension: sums, casts, layout changes of the other dimensions, products with scalars or
one factor per token, and norms with unit gain. It is *closed* when every writer is a linear site or
a table, every reader a linear site; otherwise it is *open* and each obstacle is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qcompile.analysis.norms import CASTS, Norm, find_norms
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.sites import Site, find_sites
from qcompile.ir.program import Program

aten = torch.ops.aten

LAYOUT = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.sum.dim_IntList,
    aten.flatten.using_ints,
    aten.repeat.default,
}
_SIZES = {aten.sym_size.int, aten.sym_size.default, aten.size.default, aten.size.int}


@dataclass
class ResidualStream:
    """One hidden basis of `size` channels: who writes it, who reads it, what blocks it."""

    size: int
    values: set[fx.Node] = field(default_factory=set)
    producers: list[Site] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)  # embeddings and added parameters, [.., n]
    consumers: list[Site] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        """Whether a rotation of this basis is sound."""
        return not self.obstacles and bool(self.consumers) and bool(self.producers or self.tables)


def residual_streams(program: Program) -> list[ResidualStream]:
    """All flows that hold at least one norm, in graph order; they do not overlap."""
    walker = _Walker(program)
    flows: list[ResidualStream] = []
    for norm in walker.norms:
        if not any(norm.input in flow.values for flow in flows):
            flows.append(walker.walk(norm.input))
    return flows


class _Walker:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.norms = find_norms(program)
        self.by_output = {norm.output: norm for norm in self.norms}
        self.sites = {site.node: site for site in find_sites(program)}

    def walk(self, seed: fx.Node) -> ResidualStream:
        flow = ResidualStream(int(seed.meta["val"].shape[-1]))
        work = [seed]
        while work:
            value = work.pop()
            if value in flow.values:
                continue
            flow.values.add(value)
            work += self._behind(flow, value)
            work += self._ahead(flow, value)
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        flow.producers.sort(key=lambda s: order[s.node])
        flow.consumers.sort(key=lambda s: order[s.node])
        flow.norms.sort(key=lambda n: order[n.output])
        return flow

    def _open(self, flow: ResidualStream, node: fx.Node, reason: str) -> list[fx.Node]:
        obstacle = Obstacle(node.name, reason)
        if obstacle not in flow.obstacles:
            flow.obstacles.append(obstacle)
        return []

    def _behind(self, flow: ResidualStream, value: fx.Node) -> list[fx.Node]:
        """The values that `value` was made of and that share its basis."""
        if value.op == "placeholder":
            if self.program.weight_name(value) is None:
                return self._open(flow, value, "comes in from outside the graph")
            flow.tables.append(value)
            return []
        if value in self.by_output:
            return self._norm(flow, self.by_output[value])
        if value in self.sites and self.sites[value].kind == "linear":
            flow.producers.append(self.sites[value])
            return []
        if value.target is aten.embedding.default:
            table = value.args[0]
            if self.program.weight_name(table) is None:
                return self._open(flow, value, "looks up a table that is not a weight")
            flow.tables.append(table)
            return []
        sources = self._commutes(flow, value)
        if sources is None:
            return self._open(flow, value, f"{_op(value)} does not commute with a rotation")
        return sources

    def _ahead(self, flow: ResidualStream, value: fx.Node) -> list[fx.Node]:
        """The values made of `value` that share its basis; readers and obstacles are noted."""
        if value.op == "placeholder":
            found: list[fx.Node] = []  # a table may have other readers; they are not of this basis
            for user in value.users:
                if user not in self.sites and self._commutes(flow, user) is None:
                    if user.target is not aten.embedding.default:
                        self._open(flow, user, f"{_op(user)} reads a table of the stream")
            return found
        found = []
        for user in value.users:
            norm = next((n for n in self.norms if n.input is value and user in n.inner), None)
            if user.target in _SIZES:
                continue
            if norm is not None:
                found += self._norm(flow, norm)
            elif user.op == "output":
                self._open(flow, value, "leaves the graph as an output")
            elif user in self.sites and self.sites[user].input is value:
                if self.sites[user].kind == "linear":
                    flow.consumers.append(self.sites[user])
                else:
                    self._open(flow, user, "feeds a stack of expert weights, which are not rotated")
            elif self._commutes(flow, user) is not None:
                found.append(user)
            else:
                self._open(flow, user, f"{_op(user)} does not commute with a rotation")
        return found

    def _norm(self, flow: ResidualStream, norm: Norm) -> list[fx.Node]:
        if norm not in flow.norms:
            flow.norms.append(norm)
            if not norm.has_unit_gain(self.program):
                self._open(flow, norm.output, "a norm gain that is not folded")
        return [norm.input, norm.output]

    def _commutes(self, flow: ResidualStream, node: fx.Node) -> list[fx.Node] | None:
        """The operands that share the basis with the result, or None if there is no such law."""
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or not value.ndim:
            return None
        tensors = [a for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
        if value.shape[-1] != flow.size:
            return None
        if node.target in CASTS:
            return tensors[:1]
        if node.target in LAYOUT:
            return tensors[:1] if keeps_last(node, flow.size) else None
        if node.target is aten.cat.default:
            dim = node.args[1] if len(node.args) > 1 else 0
            return list(node.args[0]) if dim % value.ndim != value.ndim - 1 else None
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            whole = [t for t in tensors if _last(t) == flow.size]
            return whole if len(whole) == 2 else None
        if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor):
            whole = [t for t in tensors if _last(t) == flow.size]
            other = [t for t in tensors if t not in whole]
            per_token = all(_last(t) == 1 for t in other)
            return (
                whole
                if len(whole) == 1
                and per_token
                and whole[0] is node.args[0]
                or (len(whole) == 1 and per_token and node.target is aten.mul.Tensor)
                else None
            )
        return None


def _last(node: fx.Node) -> int:
    shape = node.meta["val"].shape
    return int(shape[-1]) if len(shape) and isinstance(shape[-1], int) else 1 if not len(shape) else -1


def keeps_last(node: fx.Node, size: int) -> bool:
    """Whether a layout op leaves the last dimension whole and in place."""
    source = node.args[0].meta["val"]
    if not source.ndim or source.shape[-1] != size:
        return False
    last = source.ndim - 1

    def touches(dim: object) -> bool:
        return isinstance(dim, int) and dim % source.ndim == last

    if node.target in (aten.slice.Tensor, aten.select.int, aten.index_select.default):
        return not touches(node.args[1] if len(node.args) > 1 else 0)
    if node.target is aten.transpose.int:
        return not (touches(node.args[1]) or touches(node.args[2]))
    if node.target is aten.permute.default:
        return touches(node.args[1][-1])
    if node.target is aten.sum.dim_IntList:
        return not any(touches(d) for d in node.args[1])
    if node.target is aten.index.Tensor:
        return len(node.args[1]) < source.ndim
    if node.target is aten.unsqueeze.default:
        return not (node.args[1] == source.ndim or node.args[1] == -1)
    if node.target is aten.repeat.default:
        return node.args[1][-1] == 1
    return True


def _op(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else node.op
