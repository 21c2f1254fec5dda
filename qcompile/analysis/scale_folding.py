"""Scale folding: where a positive factor for each channel of a value can be folded.

Walking back from the input of a site, a factor per channel travels through casts, layout changes,
ReLU (positive homogeneous), one operand of a product (a gate), and the values of an attention,
until it meets rows of a linear site or the gain of a norm. Anything else stops it, and the stop is
named. Where attention shares a value head between query heads, or a fused projection is sliced, the
*channel map* says which producer row each channel came from: it is computed by sending channel
indices through the very layout operations of the graph, so no head arithmetic is assumed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.norms import Norm
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.residual_stream import LAYOUT, keeps_last
from qcompile.analysis.sites import Site
from qcompile.ir.aten_ops import MATMULS, MOVES, SDPA, SPLITS, Ops, aten, is_cast, reads_elements
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

_FUNCTIONS: Ops = frozenset({aten.mul.Tensor, aten.relu.default})
"""What a positive factor passes though it computes something: a gate, and ReLU, which is positive homogeneous."""


@dataclass(frozen=True)
class Source:
    """Where a scale of `value` folds.

    Attributes:
        norm: the norm whose gain takes it, or None.
        site: the linear site whose rows take it, or None.
        channels: [K] row of the producer behind each channel of the value.
        path: the nodes between, from the producer to the value.
        attention: whether the path runs through an attention's values.
        pure: whether the path only moves channels (no product, no ReLU): a rotation may pass too.
        head: channels of one head where the value holds whole heads of the attentions passed, each of them one run of
            rows; else 0.
    """

    norm: Norm | None
    site: Site | None
    channels: Tensor
    path: tuple[fx.Node, ...]
    attention: bool
    pure: bool
    head: int


def channel_root(value: fx.Node) -> fx.Node:
    """The earliest value with the same channels: back through casts and layouts of other dims."""
    while value.op == "call_function" and (
        is_cast(value) or (value.target in LAYOUT and keeps_last(value, int(value.meta["val"].shape[-1])))
    ):
        source = value.args[0]
        if not isinstance(source, fx.Node) or source.op == "placeholder":
            break
        value = source
    return value


@dataclass(frozen=True)
class Consumers:
    """Everything that reads the channels of one value.

    Attributes:
        root: the value, [.., K].
        values: the root, and what casts and layouts of its other dimensions make of it.
        sites: linear sites, in graph order, which absorb a factor for each channel.
        other_consumers: nodes that are no linear sites and absorb none.
    """

    root: fx.Node
    values: tuple[fx.Node, ...]
    sites: tuple[Site, ...]
    other_consumers: tuple[fx.Node, ...]


def find_consumers(root: fx.Node, sites: list[Site]) -> Consumers:
    """Whatever reads a value, straight or through casts and layouts of its other dimensions."""
    width = root.meta["val"].shape[-1]
    by_node = {site.node: site for site in sites}
    found: set[fx.Node] = set()
    other_consumers: list[fx.Node] = []
    work = [root]
    for value in work:
        for user in value.users:
            site = by_node.get(user)
            if not reads_elements(user, value):
                continue
            if site is not None and site.input is value and site.kind == "linear":
                found.add(user)
            elif is_cast(user) or (user.target in LAYOUT and keeps_last(user, width)):
                work.append(user)
            else:
                other_consumers.append(user)
    readers = tuple(site for node, site in by_node.items() if node in found)
    return Consumers(root, tuple(work), readers, tuple(other_consumers))


def groups_of_consumers(sites: list[Site]) -> list[Consumers]:
    """Sites grouped by the value whose channels they read, in graph order."""
    roots = dict.fromkeys(channel_root(site.input) for site in sites if site.kind == "linear")
    return [find_consumers(root, sites) for root in roots]


def scale_source(program: Program, consumers: Consumers, norms: list[Norm], sites: list[Site]) -> Source | Obstacle:
    """Find where a scale for the channels of a value folds, or say what stops it.

    Args:
        program: the program.
        consumers: of the value; all of them must be sites, which absorb the inverse.
        norms: all norms (see find_norms).
        sites: all sites (see find_sites).

    Returns:
        The source, or the first obstacle on the way back.
    """
    value = consumers.root
    if consumers.other_consumers:
        return Obstacle(consumers.other_consumers[0].name, "the input is read by something that is not a site too")
    walk = _Walk(program, {n.output: n for n in norms}, {s.node: s for s in sites})
    return walk.back(value, (), value)


class _Walk:
    def __init__(self, program: Program, norms: dict[fx.Node, Norm], sites: dict[fx.Node, Site]) -> None:
        self.program, self.norms, self.sites = program, norms, sites

    def back(self, node: fx.Node, path: tuple[fx.Node, ...], value: fx.Node) -> Source | Obstacle:
        if node in self.norms:
            return self._at_norm(node, path, value)
        site = self.sites.get(node)
        if site is not None and site.kind == "linear":
            return self._at_rows(site, path, value)
        inside = (node, *path)
        first = node.args[0] if node.args else None
        if is_cast(node) or node.target in MOVES | SPLITS or node.target in (aten.relu.default, operator.getitem):
            return self.back(first, inside, value)
        if node.target is SDPA:
            return self.back(node.args[2], inside, value)
        if node.target in MATMULS:
            return self.back(node.args[1], inside, value)
        if node.target is aten.mul.Tensor:
            return self._through_product(node, inside, value)
        return Obstacle(node.name, f"{node.target} does not carry a scale")

    def _through_product(self, node: fx.Node, path: tuple[fx.Node, ...], value: fx.Node) -> Source | Obstacle:
        answers: list[Source | Obstacle] = []
        width = node.meta["val"].shape[-1]
        for operand in node.args[:2]:
            if isinstance(operand, fx.Node) and operand.meta["val"].ndim:
                if operand.meta["val"].shape[-1] == width:
                    answers.append(self.back(operand, path, value))
        for answer in answers:
            if isinstance(answer, Source):
                return answer
        return answers[0]  # one operand at least is as wide as the product

    def _at_norm(self, node: fx.Node, path: tuple[fx.Node, ...], value: fx.Node) -> Source | Obstacle:
        norm = self.norms[node]
        if path:
            return Obstacle(node.name, "a norm whose output is reshaped before the site")
        if norm.gain is None:
            return Obstacle(node.name, "a norm without a gain")
        if any(weight is not None and len(weight.users) > 1 for weight in (norm.gain, norm.bias)):
            return Obstacle(node.name, "a norm gain that another norm uses too")
        width = int(value.meta["val"].shape[-1])
        return Source(norm, None, torch.arange(width), (), False, False, 0)

    def _at_rows(self, site: Site, path: tuple[fx.Node, ...], value: fx.Node) -> Source | Obstacle:
        if site.shared_with:
            return Obstacle(site.node.name, f"the weight {site.name} is shared with {site.shared_with}")
        nodes = (site.node, *path)
        for node, following in zip(nodes, path, strict=False):
            others = [u for u in node.users if u is not following and reads_elements(u, node)]
            if _times_read(following, node) > 1:
                others.append(following)  # the square of a factor is another factor
            if not all(u.target in MOVES | SPLITS or u.target is operator.getitem for u in others):
                return Obstacle(others[0].name, f"{node.name} is read on another path too")
        try:
            channels, heads = self._send(site, path, value)
        except _Overlap as overlap:
            return Obstacle(str(overlap), f"channels of {site.name} are read on another path too")
        except (RuntimeError, TypeError, ValueError) as error:
            return Obstacle(value.name, f"the channels of {site.name} cannot be followed ({error})")
        if channels is None:
            return Obstacle(value.name, f"the channels of {site.name} differ from row to row")
        attention = any(n.target in MATMULS | {SDPA} for n in path)
        pure = not any(n.target in _FUNCTIONS for n in path)
        return Source(None, site, channels, path, attention, pure, _head_size(heads, channels))

    def _send(self, site: Site, path: tuple[fx.Node, ...], value: fx.Node) -> tuple[Tensor | None, list[Tensor]]:
        """Send the indices of the site's rows along the path to the value.

        Returns:
            The row behind each channel, None if positions disagree; and the rows [heads, D] of each attention passed.
        """
        shape = [hint(s) for s in site.node.meta["val"].shape]
        ids: Any = torch.arange(site.N).expand(*shape).contiguous()
        previous = site.node
        claims: list[tuple[fx.Node, Any]] = []
        heads: list[Tensor] = []
        for node in path:
            for user in previous.users:
                if user is not node and reads_elements(user, previous):
                    claims.append((user, self._step(user, previous, ids)))
            ids = self._step(node, previous, ids)
            previous = node
            if node.target in MATMULS | {SDPA}:
                heads.append(ids[..., 0, :].reshape(-1, ids.shape[-1]))
        own = ids.reshape(-1, ids.shape[-1])
        if not bool((own == own[0]).all()):
            return None, heads
        used = set(own[0].tolist())
        for user, claimed in claims:
            pieces = claimed if user.target in SPLITS else None
            parts = [claimed] if pieces is None else [pieces[piece.args[1]] for piece in user.users]
            if any(used & set(part.unique().tolist()) for part in parts):
                raise _Overlap(user.name)
        return own[0], heads

    def _step(self, node: fx.Node, previous: fx.Node, ids: Any) -> Any:
        if is_cast(node):
            return ids
        if node.target in _FUNCTIONS:
            return ids.expand([hint(size) for size in node.meta["val"].shape])
        if node.target in MATMULS or node.target is SDPA:
            repeats = 1
            if node.kwargs.get("enable_gqa"):
                repeats = node.args[0].meta["val"].shape[-3] // node.args[2].meta["val"].shape[-3]
            return self._attend(node, ids, repeats)
        if node.target is operator.getitem:
            return ids[node.args[1]]

        def real(arg: fx.Node) -> Any:
            return ids if arg is previous else hint(arg.meta["val"])

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), real)
        return node.target(*args, **kwargs)

    @staticmethod
    def _attend(node: fx.Node, ids: Tensor, repeats: int) -> Tensor:
        """Attention mixes tokens, not channels: take any token's indices for all queries."""
        if repeats > 1:
            ids = ids.repeat_interleave(repeats, dim=-3)
        if not bool((ids == ids[..., :1, :]).all()):
            raise ValueError("the values of the attention differ from token to token")
        return ids[..., :1, :].expand([hint(size) for size in node.meta["val"].shape]).contiguous()


def _times_read(node: fx.Node, operand: fx.Node) -> int:
    """How many of a node's arguments are an operand."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) if n is operand else None)
    return len(found)


def _head_size(attentions: list[Tensor], channels: Tensor) -> int:
    """D if the rows of all attentions [heads, D] and of the value [K] are the same runs of D rows; else 0."""
    sizes = {rows.shape[-1] for rows in attentions}
    size = sizes.pop() if len(sizes) == 1 else 0
    if not size or len(channels) % size:
        return 0
    rows = torch.cat([*attentions, channels.view(-1, size)])
    runs = rows == rows[:, :1] + torch.arange(size)
    on_grid = (rows[:, 0] - rows.min()) % size == 0
    return size if bool(runs.all()) and bool(on_grid.all()) else 0


class _Overlap(Exception):
    """Another consumer reads the same channels; the text is its name."""
