"""Residual streams: sets of values that share one hidden basis.

If every producer of a residual stream gives x R instead of x and every consumer reads through R^T,
the model is the same function for any orthogonal R (QuaRot, arXiv:2404.00456; SpinQuant,
arXiv:2405.16406). The stream is the closure of one value under the operations that commute with R
on the last dimension: sums, casts, layout changes of the other dimensions, products with scalars or
one factor per token, and norms with unit gain. It is *closed* when every producer is a linear site
or a table, every consumer a linear site; otherwise it is *open* and each obstacle is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from qcompile.analysis.norms import Norm, find_norms
from qcompile.analysis.obstacle import Obstacle, ObstacleKind
from qcompile.analysis.sites import Site, find_sites
from qcompile.ir.aten_ops import JOINS, MOVES, Ops, aten, is_cast, reads_elements
from qcompile.ir.program import Program

# Rows may also be picked, repeated and summed: each commutes with a rotation of the last dimension.
LAYOUT: Ops = MOVES | {aten.index.Tensor, aten.index_select.default, aten.sum.dim_IntList, aten.repeat.default}
"""What may keep the last dimension whole; `keeps_last` says whether a node does."""


@dataclass
class ResidualStream:
    """One hidden basis.

    Attributes:
        size: its channels, n.
        values: all values in this basis, [.., n].
        producers: linear sites whose outputs are such values.
        tables: placeholders of embeddings and of added parameters, [.., n].
        consumers: linear sites that read such values.
        norms: norms of such values.
        obstacles: what prevents a rotation.
    """

    size: int
    values: set[fx.Node] = field(default_factory=set)
    producers: list[Site] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)
    consumers: list[Site] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What a report calls the stream: its size and where its first norm reads it."""
        return f"stream of {self.size} at {self.norms[0].input.name}"

    @property
    def closed(self) -> bool:
        """Whether a rotation of this basis is sound."""
        return self.obstacle is None

    @property
    def obstacle(self) -> Obstacle | None:
        """The first thing that prevents a rotation, or None for a closed stream."""
        return self.obstacles[0] if self.obstacles else self.flow_obstacle

    @property
    def flow_obstacle(self) -> Obstacle | None:
        """The first thing that prevents a rotation and that folding gains does not remove, or None."""
        for obstacle in self.obstacles:
            if obstacle.kind is not ObstacleKind.GAIN:
                return obstacle
        if self.consumers:
            return None
        return Obstacle(self.norms[0].input.name, "no linear reads this stream")


def residual_streams(program: Program) -> list[ResidualStream]:
    """All streams that hold at least one norm, in graph order; they do not overlap."""
    search = _Search(program)
    streams: list[ResidualStream] = []
    for norm in search.norms:
        if not any(norm in stream.norms for stream in streams):
            streams.append(search.stream_of(norm))
    return streams


class _Search:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.norms = find_norms(program)
        self.by_output = {norm.output: norm for norm in self.norms}
        self.sites = {site.node: site for site in find_sites(program)}

    def stream_of(self, seed: Norm) -> ResidualStream:
        stream = ResidualStream(int(seed.input.meta["val"].shape[-1]))
        work = self._norm(stream, seed)
        while work:
            value = work.pop()
            if value in stream.values:
                continue
            stream.values.add(value)
            work += self._behind(stream, value)
            work += self._ahead(stream, value)
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        stream.producers.sort(key=lambda s: order[s.node])
        stream.consumers.sort(key=lambda s: order[s.node])
        stream.norms.sort(key=lambda n: order[n.output])
        return stream

    def _open(
        self, stream: ResidualStream, node: fx.Node, reason: str, kind: ObstacleKind = ObstacleKind.FLOW
    ) -> list[fx.Node]:
        obstacle = Obstacle(node.name, reason, kind)
        if obstacle not in stream.obstacles:
            stream.obstacles.append(obstacle)
        return []

    def _behind(self, stream: ResidualStream, value: fx.Node) -> list[fx.Node]:
        """The values that `value` was made of and that share its basis."""
        if value.op == "placeholder":
            if self.program.weight_name(value) is None:
                return self._open(stream, value, "comes in from outside the graph")
            stream.tables.append(value)
            return []
        if value in self.by_output:
            return self._norm(stream, self.by_output[value])
        if value in self.sites and self.sites[value].kind == "linear":
            stream.producers.append(self.sites[value])
            return []
        if value.target is aten.embedding.default:
            return value.all_input_nodes[:1]
        sources = self._commutes(stream, value)
        if sources is None:
            return self._open(stream, value, f"{_op(value)} does not commute with a rotation")
        return sources

    def _ahead(self, stream: ResidualStream, value: fx.Node) -> list[fx.Node]:
        """The values made of `value` that share its basis; consumers and obstacles are recorded."""
        found: list[fx.Node] = []
        for user in value.users:
            norm = next((n for n in self.norms if n.input is value and user in n.inner), None)
            if not reads_elements(user, value):
                continue
            if norm is not None:
                found += self._norm(stream, norm)
            elif user.op == "output":
                self._open(stream, value, "leaves the graph as an output")
            elif user in self.sites and self.sites[user].input is value:
                if self.sites[user].kind == "linear":
                    stream.consumers.append(self.sites[user])
                else:
                    self._open(stream, user, "feeds a stack of expert weights, which are not rotated")
            elif value.op == "placeholder" and self._looks_up(user, value):
                found.append(user)  # another stream that reads the same table is this stream
            elif value.op == "placeholder" and user in self.sites and self.sites[user].weight is value:
                pass  # a tied table: the passes that would rewrite it refuse (tied_weights.py)
            elif self._commutes(stream, user) is not None:
                found.append(user)
            else:
                self._open(stream, user, f"{_op(user)} does not commute with a rotation")
        return found

    @staticmethod
    def _looks_up(node: fx.Node, table: fx.Node) -> bool:
        return node.target is aten.embedding.default and node.args[0] is table

    def _norm(self, stream: ResidualStream, norm: Norm) -> list[fx.Node]:
        if norm not in stream.norms:
            stream.norms.append(norm)
            if not norm.has_unit_gain(self.program):
                self._open(stream, norm.output, "a norm gain that is not folded", ObstacleKind.GAIN)
        return [norm.input, norm.output]

    def _commutes(self, stream: ResidualStream, node: fx.Node) -> list[fx.Node] | None:
        """The operands that share the basis with the result, or None if there is no such law."""
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or not value.ndim:
            return None
        tensors = [a for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
        if is_cast(node):
            return tensors[:1]
        if node.target in LAYOUT:
            return tensors[:1] if keeps_last(node, stream.size) else None
        if node.target in JOINS:
            dim = node.args[1] if len(node.args) > 1 else 0
            return list(node.args[0]) if dim % value.ndim != value.ndim - 1 else None
        whole = [t for t in tensors if _last(t) == stream.size]
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            return whole if len(whole) == 2 else None
        if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor):
            is_dividend = node.target is not aten.div.Tensor or whole[:1] == [node.args[0]]
            return whole if len(whole) == 1 and is_dividend else None
        return None


def _last(node: fx.Node) -> int:
    shape = node.meta["val"].shape
    return int(shape[-1]) if len(shape) and isinstance(shape[-1], int) else 1 if not len(shape) else -1


def keeps_last(node: fx.Node, size: int) -> bool:
    """Whether an operator of LAYOUT keeps the last dimension, of `size` channels, whole and in place."""
    source, value = node.args[0].meta["val"], node.meta["val"]
    if not source.ndim or not value.ndim or source.shape[-1] != size or value.shape[-1] != size:
        return False
    last = source.ndim - 1

    def touches(dim: object) -> bool:
        return isinstance(dim, int) and dim % source.ndim == last

    if node.target in (aten.select.int, aten.index_select.default):
        return not touches(node.args[1])
    if node.target is aten.transpose.int:
        return not (touches(node.args[1]) or touches(node.args[2]))
    if node.target in (aten.t.default, aten.mT.default, aten.numpy_T.default):
        return False
    if node.target is aten.permute.default:
        return touches(node.args[1][-1])
    if node.target is aten.sum.dim_IntList:
        return not any(touches(d) for d in node.args[1])
    if node.target is aten.index.Tensor:
        return len(node.args[1]) < source.ndim
    # The others keep the order of elements, drop or repeat some: a last dimension of equal size is the same one.
    return True


def _op(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else node.op
