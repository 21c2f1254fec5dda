"""Find the repeated block of a graph by dataflow: layers that are the same code with other weights.

Calls are ordered by demand, from the results back, so that the order depends on dataflow alone. A call's signature is
its operator, its constants, and the dtype and sizes of its value. The period p with the longest stretch of equal
signatures s_i == s_{i+p} gives candidates; blocks are equal if they are the same calls of the same references, with
inputs and values of the same dtypes, sizes and strides. What a block reads from outside (weights, the value of the
block before it, masks) are its inputs. Sizes are computed again in each part that needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backend.block_text import CannotCut, Part, PartReader, call_text, is_leaf, is_size
from qcompile.codegen.sdpa_call import SDPACall
from qcompile.ir.aten_ops import CONVOLUTIONS, PRODUCTS, SDPA

_LEAST = 3  # repeats
LEAST_SAVED = 200
"""Calls that need not be compiled again, at least: each further library costs as much time as about as many."""


def find_parts(graph: fx.Graph, *, own_sizes: bool = False, least_saved: int | None = None) -> list[Part] | None:
    """Cut a graph into parts, of which some are equal blocks.

    Args:
        graph: ATen, functional; every node has its fake value.
        own_sizes: whether blocks may have free sizes of their own. True only where nobody checks guards, which
            Inductor asks for the sizes of the first block alone.
        least_saved: calls that equal blocks must spare the compiler, at least; None: LEAST_SAVED.

    Returns:
        Parts in the order in which they run; None where nothing is repeated, or the graph cannot be cut.
    """
    try:
        order = _by_demand(graph)
        found = _Cutter(graph, order, own_sizes, LEAST_SAVED if least_saved is None else least_saved).parts()
    except CannotCut:
        return None
    return found if any(part.repeats is not None for part in found) else None


def _by_demand(graph: fx.Graph) -> list[fx.Node]:
    """Calls that give tensors, each as late as its first reader allows; parts of a list stand behind the list.

    Raises:
        CannotCut: an operator writes in place, is random, has graphs inside, or is there for an effect.
    """
    for node in graph.nodes:
        _check(node)
    order, known = list[fx.Node](), set[fx.Node]()
    work = [(node, False) for node in reversed(_results(graph))]
    while work:
        node, ready = work.pop()
        if node in known:
            continue
        if not ready:
            work.append((node, True))
            work += [(source, False) for source in reversed(node.all_input_nodes) if source not in known]
            continue
        known.add(node)
        if is_leaf(node) or is_size(node):
            continue
        order.append(node)
        if not isinstance(node.meta["val"], Tensor):
            readers = sorted(node.users, key=lambda reader: str(reader.args[1:]))
            known |= set(readers)
            order += readers
    left = [node for node in graph.nodes if node not in known and not is_leaf(node) and node.op != "output"]
    if any(node.is_impure() for node in left):
        raise CannotCut("a call is there for its effect")
    return order


def _check(node: fx.Node) -> None:
    if node.op == "output":
        return
    if node.op == "get_attr":
        owner: Any = node.graph.owning_module
        if not isinstance(getattr(owner, str(node.target), None), Tensor):
            raise CannotCut("a constant is no tensor")
        return
    if "val" not in node.meta or node.op not in ("placeholder", "call_function"):
        raise CannotCut("a node has no value")
    if node.op == "placeholder":
        return
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise CannotCut("an operator has graphs inside")
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable or (torch.Tag.nondeterministic_seeded in node.target.tags and _drops(node)):
            raise CannotCut(f"{node.target} writes in place or is random")
    if isinstance(node.meta["val"], (tuple, list)):
        if not all(isinstance(part, Tensor) for part in node.meta["val"]):
            raise CannotCut("an operator gives a list that holds more than tensors")
        if any(reader.op != "call_function" or "getitem" not in str(reader.target) for reader in node.users):
            raise CannotCut("a list is read as a whole")


def _drops(node: fx.Node) -> bool:
    """Whether a random operator draws: an attention does if it drops some of its weights."""
    return node.target is not SDPA or SDPACall.of(node).dropout_p != 0


def _results(graph: fx.Graph) -> list[fx.Node]:
    output = next(iter(graph.find_nodes(op="output")))
    return list(output.all_input_nodes)


class _Cutter:
    """The search for equal blocks in one graph."""

    def __init__(self, graph: fx.Graph, order: list[fx.Node], own_sizes: bool, least_saved: int) -> None:
        self.order, self.own_sizes, self.least_saved = order, own_sizes, least_saved
        self.leaves = [node for node in graph.nodes if is_leaf(node)]
        known: dict[str, int] = {}
        self.signatures = torch.tensor([known.setdefault(_signature(node), len(known)) for node in order])
        place = {node: index for index, node in enumerate(order)}
        self.last_use = [max((place[r] for r in _readers(node) if r in place), default=-1) for node in order]

    def parts(self) -> list[Part]:
        """All parts, in order."""
        found = list[Part]()
        for part in self._cut(0, len(self.order)):
            equal = next((i for i, other in enumerate(found) if other.repeats == i and other.text == part.text), None)
            if part.repeats is not None:
                part.repeats = len(found) if equal is None else equal
            found.append(part)
        return found

    def _cut(self, start: int, end: int) -> Iterable[Part]:
        blocks, first = self._blocks(start, end)
        if not blocks:
            return [self._part(start, end)] if end > start else []
        size = (blocks[-1][1] - first) // len(blocks)
        parts = [self._part(a, a + size) for a, _ in blocks]
        for part in parts:
            part.repeats = 0  # that is, equal to others: `parts` says to which
        return [*self._cut(start, first), *parts, *self._cut(blocks[-1][1], end)]

    def _blocks(self, start: int, end: int) -> tuple[list[tuple[int, int]], int]:
        """Ranges of equal blocks that spare the most calls, and where the first begins; empty if too few."""
        begin, period, run = _longest_stretch(self.signatures[start:end])
        if run < max((_LEAST - 1) * period, self.least_saved) or not period:
            return [], start
        begin, stop = start + begin, start + begin + run + period
        offset = min(range(period), key=lambda o: self._cost(begin + o + (stop - begin) // (2 * period) * period, o))
        ranges = [(a, a + period) for a in range(begin + offset, stop - period + 1, period)]
        texts = [self._part(*one).text for one in ranges]
        equal = _longest_run(texts)
        ranges = ranges[equal.start : equal.stop]
        if len(ranges) < _LEAST or (len(ranges) - 1) * period < self.least_saved:
            return [], start
        return ranges, ranges[0][0]

    def _cost(self, place: int, offset: int) -> tuple[int, int, int]:
        """Of a cut before this place: few values cross it, and Inductor would not fuse what is on both sides.

        So the same kernels are made as for the whole graph, and the results are the same to the last bit.
        """
        place = min(place, len(self.order) - 1)
        across = [node for node, last in zip(self.order[:place], self.last_use, strict=False) if last >= place]
        if any(not isinstance(node.meta["val"], Tensor) for node in across):
            return 2, 0, 0
        return 0 if place and _is_barrier(self.order[place - 1]) else 1, len(across), offset

    def _part(self, start: int, end: int) -> Part:
        return PartReader(self.leaves, self.own_sizes).read(self.order[start:end])


def _readers(node: fx.Node) -> set[fx.Node]:
    """Who reads a value, also through sizes, which are computed where they are read."""
    found, work = set[fx.Node](), list(node.users)
    while work:
        reader = work.pop()
        if reader.op == "output":
            continue
        if not is_size(reader):
            found.add(reader)
        else:
            work += reader.users
    return found


def _is_barrier(node: fx.Node) -> bool:
    """Whether Inductor fuses nothing with a call: products, attention, operators that are not ATen's."""
    if "getitem" in str(node.target):
        return _is_barrier(node.all_input_nodes[0])
    custom = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")
    return custom or node.target in PRODUCTS or node.target in CONVOLUTIONS


def _signature(node: fx.Node) -> str:
    """Equal for calls that may be equal: free sizes are not told apart."""

    def size(value: Any) -> str:
        return str(value) if isinstance(value, int) else "?"

    def text(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return " ".join(text(one) for one in value)
        return f"{value.dtype} {[size(s) for s in value.shape]}"

    return f"{call_text(node, lambda source: 's' if is_size(source) else 'n')} {text(node.meta['val'])}"


def _longest_stretch(signatures: Tensor) -> tuple[int, int, int]:
    """Start, period p and length of the longest run of s_i == s_{i+p}; the smallest p among equals."""
    best = 0, 0, 0
    for period in range(1, len(signatures) // _LEAST + 1):
        different = (signatures[period:] != signatures[:-period]).nonzero().flatten()
        ends = torch.cat([different, torch.tensor([len(signatures) - period])])
        starts = torch.cat([torch.tensor([-1]), different])
        lengths = ends - starts - 1
        at = int(lengths.argmax())
        if int(lengths[at]) > best[2]:
            best = int(starts[at]) + 1, period, int(lengths[at])
    return best


def _longest_run(texts: Sequence[str]) -> range:
    """The longest range of equal neighbors."""
    best, start = range(0), 0
    for index in range(len(texts) + 1):
        if index == len(texts) or texts[index] != texts[start]:
            best = max(best, range(start, index), key=len)
            start = index
    return best
