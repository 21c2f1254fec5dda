"""A stack of expert weights that is held as codes and read as numbers.

Modules that hold all experts in one 3-D parameter multiply it themselves, so no module can take its
place. Instead the parameter becomes a property that dequantizes: every module that reads it works
as before, at the memory of the codes at rest. Eagerly, each read dequantizes the whole stack; in a
graph, reading and multiplying become one operation that touches only the experts that have rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import qcompile.ir.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.analysis.sites import find_sites
from qcompile.ir.node_meta import SITE
from qcompile.ir.program import Program
from qcompile.modules.quant_linear import Coded
from qcompile.numerics.format import Format

STACK = "_codes"  # what the name of a parameter gets when codes hold it
_PARTS = ("codes", "scale", "zero", "group_scale")


class QuantStack(Coded):
    """Codes of [E, N, K] with their scales; called, the weight as its owner stores it, in the owner's dtype."""

    KEPT = _PARTS

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_scale: Tensor | None

    def __init__(
        self, tensors: dict[str, Tensor | None], format: Format, columns: int, rows_first: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.format, self.columns, self.rows_first, self.dtype = format, columns, rows_first, dtype
        for name in _PARTS:
            self.register_buffer(name, tensors[name])

    def forward(self) -> Tensor:
        """[E, N, K], or [E, K, N] where the owner stores it so."""
        numbers = torch.ops.qcompile.dequantize(
            self.codes, self.scale, self.zero, self.group_scale, str(self.format), self.columns, self.dtype
        )
        return numbers if self.rows_first else numbers.transpose(1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # what a cast would have made of the parameter
        return result

    @staticmethod
    def of(after: Program, node: fx.Node, before: Program) -> QuantStack:
        """The stack behind a qexperts node of a rewritten program."""
        site = next(s for s in find_sites(before) if s.name == node.meta[SITE])
        names = [after.weight_name(a) for a in node.args[2:6]]
        tensors = dict(zip(_PARTS, [None if n is None else after.weights[n] for n in names], strict=True))
        return QuantStack(tensors, Format.parse(node.args[6]), site.K, site.rows_first, before.weights[site.name].dtype)

    def describe(self) -> dict[str, Any]:
        """What `empty` needs, as plain data."""
        held = [(name, getattr(self, name)) for name in _PARTS if getattr(self, name) is not None]
        return {
            "format": str(self.format),
            "columns": self.columns,
            "rows_first": self.rows_first,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensors": {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in held},
        }

    @staticmethod
    def empty(entry: dict[str, Any]) -> QuantStack:
        """A stack of the right shapes, for loading."""
        shapes = entry["tensors"]
        tensors = {
            n: torch.empty(shapes[n][0], dtype=getattr(torch, shapes[n][1])) if n in shapes else None for n in _PARTS
        }
        dtype = getattr(torch, entry["dtype"])
        return QuantStack(tensors, Format.parse(entry["format"]), entry["columns"], entry["rows_first"], dtype)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{self.codes.shape[0]} experts of [{self.codes.shape[1]}, {self.columns}], {self.format}"


def hold_stack(model: nn.Module, name: str, stack: QuantStack) -> None:
    """Put codes in the place of the parameter `name`, which stays readable under its name."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    kind = type(owner)
    delattr(owner, leaf)
    owner.add_module(f"{leaf}{STACK}", stack)
    read = property(lambda self: getattr(self, f"{leaf}{STACK}")())
    owner.__class__ = type(kind.__name__, (kind,), {leaf: read, "__module__": kind.__module__})
