"""Calls of a graph as text that is the same for calls that compute the same from their inputs.

A reference is a place: of an input in the order of first reading, or of a call in the text. So neither names nor the
rest of the graph matter. Sizes that calls read are computed in the text itself; only tensors come from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx


class CannotCut(Exception):
    """Why a graph is compiled as a whole."""


@dataclass
class Part:
    """Calls of a graph that are compiled together.

    Attributes:
        nodes: its calls, those that compute sizes among them.
        inputs: what it reads: placeholders, constants, and values of other parts.
        text: the same for parts that compute the same from their inputs.
        values: its calls that give tensors, in order.
        repeats: the place, among the parts, of the first of equal blocks; None for a part of its own.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    text: str = ""
    values: list[fx.Node] = field(default_factory=list)
    repeats: int | None = None


def is_leaf(node: fx.Node) -> bool:
    """Whether a node is an input, a weight or a constant."""
    return node.op in ("placeholder", "get_attr")


def is_size(node: fx.Node) -> bool:
    """Whether a call gives a number, as sizes are; such calls are repeated in every part that needs them."""
    return not is_leaf(node) and not isinstance(node.meta["val"], (Tensor, tuple, list))


class PartReader:
    """Writes down calls so that equal blocks have equal texts."""

    def __init__(self, leaves: Sequence[fx.Node], own_sizes: bool) -> None:
        self.leaves, self.own_sizes = leaves, own_sizes
        self.part, self.names, self.lines = Part(), dict[fx.Node, str](), list[str]()
        self.symbols: dict[Any, str] = {}
        self.sources: dict[Any, Any] = {}  # symbol -> the environment of shapes that knows it

    def read(self, nodes: Sequence[fx.Node]) -> Part:
        """The part that these calls are.

        Args:
            nodes: calls that give tensors, in order.

        Raises:
            CannotCut: a size depends on data, or comes from no input.
        """
        self.inside = set(nodes)
        for node in nodes:
            self._add(node)
            self.part.values.append(node)
        bound = {symbol for node in self.part.inputs for symbol in _bound_by(node)}
        for symbol in [s for s in self.symbols if s not in bound]:
            source = next((leaf for leaf in self.leaves if symbol in _bound_by(leaf)), None)
            if source is None:
                raise CannotCut("a size comes from no input")
            if source not in self.names:
                self._add(source)
        self.part.text = "\n".join(self.lines)
        return self.part

    def _add(self, node: fx.Node) -> None:
        if node in self.names:
            return
        if is_leaf(node) or not (node in self.inside or is_size(node)):
            self.names[node] = f"input{len(self.part.inputs)}"
            self.part.inputs.append(node)
            self.lines.append(f"{self.names[node]} {self._value(value_of(node))}")
            return
        for source in node.all_input_nodes:
            self._add(source)
        call = call_text(node, lambda source: self.names[source])
        self.names[node] = f"%{len(self.part.nodes)}"
        self.part.nodes.append(node)
        self.lines.append(f"{self.names[node]} = {call} {self._value(node.meta['val'])}")

    def _value(self, value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return " ".join(self._value(one) for one in value)
        if not isinstance(value, Tensor):
            return self._size(value)
        sizes = [self._size(size) for size in (*value.shape, *value.stride(), value.storage_offset())]
        return f"{value.dtype} {value.device} {value.requires_grad} {sizes}"

    def _size(self, size: Any) -> str:
        if not isinstance(size, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return repr(size)
        expression, shapes = size.node.expr, size.node.shape_env
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self.symbols:
                self.symbols[symbol] = self._name(symbol, shapes)
        names = {symbol: self.symbols[symbol].partition(" ")[0] for symbol in expression.free_symbols}
        known = {symbol: type(symbol)(name) for symbol, name in names.items()}
        return f"{expression.xreplace(known)} {[self.symbols[s] for s in sorted(expression.free_symbols, key=str)]}"

    def _name(self, symbol: Any, shapes: Any) -> str:
        """What is known of a symbol: its place among those of the part, its range, its value in the example."""
        if shapes.is_unbacked_symint(symbol):
            raise CannotCut("a size depends on data")
        own = f"size{len(self.symbols)}" if self.own_sizes else str(symbol)
        return f"{own} {shapes.var_to_range.get(symbol)} {shapes.backed_var_to_val.get(symbol)}"


def value_of(node: fx.Node) -> Any:
    """The fake value of a node, or the tensor of a constant."""
    return node.meta["val"] if "val" in node.meta else getattr(node.graph.owning_module, str(node.target))


def _bound_by(node: fx.Node) -> set[Any]:
    """Symbols whose value can be read off an input."""
    value = value_of(node)
    sizes = value.shape if isinstance(value, Tensor) else [value]
    expressions = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
    return {expression for expression in expressions if expression.is_Symbol}


def call_text(node: fx.Node, name: Callable[[fx.Node], str]) -> str:
    """A call: its operator, references as `name` has them, and constants."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _Name(name(source)))
    return f"{node.target}{args}{sorted(kwargs.items())}"


class _Name(str):
    """A reference in a text: without quotes, so that no constant reads like one."""

    def __repr__(self) -> str:
        return f"<{self}>"
