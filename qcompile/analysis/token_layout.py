"""Token layouts: where the tokens of a batch lie in a value of the graph.

An attention mask [B, T] says which tokens of a batch are padding. In a value the same tokens lie along other axes,
which the symbolic sizes of the fake values show: [B, T, K], the keys [B, H, T, D], heads folded into the batch
[B H, T, D]. Sizes say nothing of the order of rows once batch and tokens are one axis, since rows that were sorted by
expert are as many as before: such rows are followed through the graph to the flattening, or to the index that chose
them. What neither sizes nor the graph relate to a mask has no layout.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from qcompile.analysis.sites import is_grouped_matmul
from qcompile.ir.aten_ops import (
    ACTIVATIONS,
    CASTS,
    DROPOUTS,
    JOINS,
    LINEAR,
    MATMULS,
    SLICES,
    SOFTMAX,
    SPLITS,
    VIEWS,
    Ops,
    aten,
)
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint

_FLATTENINGS: Ops = VIEWS | {aten.flatten.using_ints, aten.clone.default, aten.contiguous.default}
_ROW_BY_ROW: Ops = (
    ACTIVATIONS | CASTS | DROPOUTS | SPLITS | JOINS | SLICES | MATMULS | SOFTMAX
    | {
        LINEAR, operator.getitem, aten.layer_norm.default, aten.rms_norm.default, aten.unsqueeze.default,
        aten.mean.dim, aten.sum.dim_IntList, aten.glu.default, aten.topk.default,
    }
)  # fmt: skip
"""Gives row i from row i of an operand of equally many; products of elements do too."""


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of one mask [B, T] lie in a value.

    Attributes:
        mask: the placeholder of the mask.
        batch: the axis of the sequences, or None: one axis holds all tokens of all sequences.
        tokens: the axes of the tokens of a sequence, two of them where tokens meet tokens; or that one axis.
        folded: how many entries (heads) of the axis `batch`, or of that one axis, belong to one.
        tokens_first: (all tokens on one axis) flattened from [T, B].
        indices: (all tokens on one axis) the nodes of the indices that chose rows, first to last.
    """

    mask: fx.Node
    batch: int | None = None
    tokens: tuple[int, ...] = (0,)
    folded: int = 1
    tokens_first: bool = False
    indices: tuple[fx.Node, ...] = ()

    def spread(self, mask: Tensor, indices: dict[fx.Node, Tensor], ndim: int) -> Tensor:
        """A mask in the layout of a value.

        Args:
            mask: [B, T] bool.
            indices: the values of `indices`.
            ndim: of the value.

        Returns:
            A bool tensor of as many dimensions, 1 along those that hold neither sequences nor tokens.
        """
        if self.batch is None:
            flat = (mask.t() if self.tokens_first else mask).reshape(-1).repeat_interleave(self.folded)
            for index in self.indices:
                flat = flat[indices[index].to(flat.device)]
            before = self.tokens[0]
            return flat.reshape((1,) * before + flat.shape + (1,) * (ndim - before - flat.ndim))
        found = torch.ones((1,) * ndim, dtype=torch.bool, device=mask.device)
        rows = mask.repeat_interleave(self.folded, 0)
        for axis in self.tokens:
            shape = [1] * ndim
            shape[self.batch], shape[axis] = rows.shape
            found = found & (rows if self.batch < axis else rows.t()).reshape(shape)
        return found


class TokenLayouts:
    """The layouts of a program's values."""

    def __init__(self, program: Program, masks: list[fx.Node]) -> None:
        """Of the graph as it is now: a pass may insert nodes that rows cannot be followed through.

        Args:
            program: the program.
            masks: placeholders of masks [B, T].
        """
        self._sizes = {mask: _MaskSizes(program, mask, masks) for mask in masks}
        self._side: dict[fx.Node, int] = {}
        self._found: dict[fx.Node, TokenLayout | None] = {}
        for node in program.graph.nodes:
            self.of(node)

    def of(self, node: fx.Node) -> TokenLayout | None:
        """The layout of a value, or of a list of values; None where it has none."""
        if node not in self._found:
            computed = node.op == "call_function"
            layout = (
                self._by_sizes(node) if computed or (node.op == "placeholder" and WEIGHT not in node.meta) else None
            )
            layout = layout or (self._followed(node) if computed else None)
            fits = layout is not None and _side(layout.mask) == self._side_of(node)
            self._found[node] = layout if fits else None
        return self._found[node]

    def may_hold_padding(self, node: fx.Node) -> bool:
        """Whether the rows of a value without a layout are as many as the length of a mask, or data, decides."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return False
        batches = set[Any]().union(*(sizes.batches for sizes in self._sizes.values()))
        lengths = set[Any]().union(*(sizes.lengths for sizes in self._sizes.values()))
        known = set[Any]().union(*(getattr(size, "free_symbols", set()) for size in batches))
        rows = [_size(size) for size in value.shape[:-1]]
        return any(getattr(size, "free_symbols", set()) - known or size in lengths - batches for size in rows)

    def _side_of(self, node: fx.Node) -> int:
        """The last side of an encoder-decoder that a value is computed from."""
        if node not in self._side:
            sides = [_side(node)] if node.op == "placeholder" else [self._side_of(a) for a in node.all_input_nodes]
            self._side[node] = max(sides, default=0)
        return self._side[node]

    def _by_sizes(self, node: fx.Node) -> TokenLayout | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim < 2:
            return None
        shape = [_size(size) for size in value.shape]
        masks = [mask for mask in self._sizes if _side(mask) == self._side_of(node)]
        return next((found for mask in masks if (found := self._sizes[mask].layout(shape)) is not None), None)

    def _followed(self, node: fx.Node) -> TokenLayout | None:
        """The layout of rows on one axis, by the value that they come from."""
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if first is not None and node.target in _FLATTENINGS:
            return self._flattened(node, first)
        if first is not None and node.target is aten.index.Tensor:
            indices: Any = node.args[1]
            return self._chosen(first, indices[0]) if len(indices) == 1 else None
        if first is not None and node.target is aten.index_select.default and node.args[1] == 0:
            return self._chosen(first, node.args[2])
        if first is not None and is_grouped_matmul(node):
            return self._rows(first)
        if node.target not in _ROW_BY_ROW and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return None
        same = [operand for operand in node.all_input_nodes if _row_count(operand) == _row_count(node)]
        return next((layout for operand in same if (layout := self._rows(operand)) is not None), None)

    def _rows(self, node: fx.Node) -> TokenLayout | None:
        """The layout of a value whose first axis holds all tokens."""
        layout = self.of(node)
        return layout if layout is not None and layout.batch is None and layout.tokens == (0,) else None

    def _chosen(self, rows: fx.Node, index: Any) -> TokenLayout | None:
        layout = self._rows(rows)
        if layout is None or not isinstance(index, fx.Node):
            return None
        return replace(layout, indices=(*layout.indices, index))

    def _flattened(self, node: fx.Node, source: fx.Node) -> TokenLayout | None:
        layout, count = self.of(source), _row_count(node)
        if layout is None:
            return None
        if layout.batch is None:  # [R, n] as [R n]: n entries of each row, one after another
            entries = _quotient(count, _row_count(source)) if layout.tokens == (0,) and not layout.indices else None
            same = layout.tokens == (0,) and count == _row_count(source)
            return layout if same else None if entries is None else replace(layout, folded=layout.folded * entries)
        if {layout.batch, *layout.tokens} != {0, 1} or layout.folded != 1:
            return None
        entries = next(filter(None, (_quotient(count, size) for size in self._sizes[layout.mask].products)), None)
        return None if entries is None else TokenLayout(layout.mask, folded=entries, tokens_first=layout.batch == 1)


class _MaskSizes:
    """The sizes that batch and length of one mask have in the values of a graph.

    Attributes:
        mask: its placeholder.
        batches: what B is called; inputs that nothing compares have symbols of their own for it.
        lengths: what T is called.
        products: what B T is called.
    """

    def __init__(self, program: Program, mask: fx.Node, masks: list[fx.Node]) -> None:
        self.mask = mask
        inputs = [n for n in program.inputs if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim >= 2]
        rows, columns = mask.meta["val"].shape
        alike = [n for n in inputs if hint(n.meta["val"].shape[0]) == hint(rows)]
        self.batches = {_size(n.meta["val"].shape[0]) for n in alike} | {_size(rows)}
        self.lengths = {_size(columns)}
        if not any(_size(n.meta["val"].shape[1]) in self.lengths for n in inputs if n is not mask):
            partners = [n for n in alike if n not in masks and _side(n) == _side(mask)]
            same = [n for n in partners if hint(n.meta["val"].shape[1]) == hint(columns)]
            self.lengths |= {_size(n.meta["val"].shape[1]) for n in same}
        self.products = {sympy.expand(b * t) for b in self.batches for t in self.lengths}

    def layout(self, shape: list[Any]) -> TokenLayout | None:
        """The layout that sizes show: that of a value with an axis of sequences, or of all tokens for each expert."""
        fixed = isinstance(shape[0], int)
        if len(shape) == 3 and fixed and shape[1] in self.products and not isinstance(shape[1], int):
            return TokenLayout(self.mask, tokens=(1,))
        axes = [
            axis for axis, size in enumerate(shape) if size in self.batches and not (axis and isinstance(size, int))
        ]
        folded = 1 if axes else next(filter(None, (_quotient(shape[0], size) for size in self.batches)), None)
        if folded is None:
            return None
        batch = axes[0] if axes else 0
        tokens = [axis for axis, size in enumerate(shape) if size in self.lengths and axis != batch]
        if len(tokens) > 1 and any(isinstance(shape[axis], int) for axis in tokens):
            tokens = [1] if tokens[0] == 1 and len(shape) == 3 else []  # by chance as many channels or heads as tokens
        return TokenLayout(self.mask, batch, tuple(tokens), folded) if tokens else None


def _side(node: fx.Node) -> int:
    """Of an input of an encoder-decoder, by the caller's own keyword: 0 for the encoder, 2 for the decoder, else 1."""
    if "decoder_" in node.name or node.name == "labels":
        return 2
    return 0 if "encoder_" in node.name else 1


def _size(size: Any) -> Any:
    """A size as an int, or as an expression of symbols."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = sympy.expand(size.node.expr)
    return int(expression) if expression.is_Integer else expression


@functools.cache
def _quotient(size: Any, divisor: Any) -> int | None:
    """How many times a divisor fits into a size, whatever the symbols; None where that is no whole count."""
    if size is None or divisor is None:
        return None
    quotient = sympy.cancel(sympy.sympify(size) / divisor)
    return int(quotient) if quotient.is_Integer and quotient > 0 else None


def _row_count(node: fx.Node) -> Any:
    """The first size of a value, or of the first of a list."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return _size(value.shape[0]) if isinstance(value, Tensor) and value.ndim else None
