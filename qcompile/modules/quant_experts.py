"""Stacks of expert weights that are stored as codes and dequantized when they are read.

Modules that hold all experts in one 3-D parameter multiply it themselves, so no module can take its
place. Instead the parameter becomes a property that dequantizes: every module that reads it works
unchanged, with the memory of the codes at rest. Eagerly, each read dequantizes the whole stack; in a
graph, reading and multiplying become one operation that touches only the experts that have rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, fx, nn

import qcompile.ir.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.analysis.sites import find_sites
from qcompile.ir.node_meta import SITE
from qcompile.ir.op_calls import QExpertsCall
from qcompile.ir.program import Program
from qcompile.ir.quantized_stacks import STACK_SUFFIX
from qcompile.modules.fixed_dtype import FixedDtypeModule
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS

_DERIVED = (
    "_qcompile_derived"  # attribute of a class made at run time: the class it is derived from, and the properties
)


class QuantStack(FixedDtypeModule):
    """A quantized stack of expert weights; called, it gives the parameter that it replaces.

    Attributes:
        format: the format.
        columns: K.
        rows_first: whether the parameter is [E, N, K]; else [E, K, N].
        dtype: the parameter's dtype, which follows casts of the model.
        codes: stored codes of [E, N, K].
        scale: as in QTensor, with a leading E; or one scale for all.
        zero: as in QTensor, with a leading E.
        group_scale: as in QTensor, with a leading E.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_scale: Tensor | None

    def __init__(
        self, tensors: dict[str, Tensor | None], format: Format, columns: int, rows_first: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.format, self.columns, self.rows_first, self.dtype = format, columns, rows_first, dtype
        for name in PARTS:
            self.register_buffer(name, tensors[name])

    def forward(self) -> Tensor:
        """The dequantized stack, [E, N, K] or [E, K, N] as `rows_first` says."""
        stack: Tensor = torch.ops.qcompile.dequantize(
            self.codes, self.scale, self.zero, self.group_scale, str(self.format), self.columns, self.dtype
        )
        return stack if self.rows_first else stack.transpose(1, 2)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # what a cast would have made of the parameter
        return result

    @staticmethod
    def of(after: Program, node: fx.Node, before: Program) -> QuantStack:
        """The stack behind a call of qexperts.

        Args:
            after: the rewritten program.
            node: the call in it.
            before: the program as captured, whose site has the layout of the parameter.
        """
        site = next(s for s in find_sites(before) if s.name == node.meta[SITE])
        call = QExpertsCall.of(node)
        parts = [None if part is None else after.weight_of(part) for part in call.stored]
        tensors = dict(zip(PARTS, parts, strict=True))
        dtype = before.weights[site.name].dtype
        return QuantStack(tensors, Format.parse(call.format), site.K, site.rows_first, dtype)

    def describe(self) -> dict[str, Any]:
        """What `empty` needs, as plain data."""
        tensors = {name: tensor for name in PARTS if (tensor := self._buffers[name]) is not None}
        return {
            "format": str(self.format),
            "columns": self.columns,
            "rows_first": self.rows_first,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensors": {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()},
        }

    @staticmethod
    def empty(entry: Mapping[str, Any]) -> QuantStack:
        """A stack with unset buffers of the right shapes, for loading; `entry` is what `describe` gave."""
        shapes = entry["tensors"]
        tensors = {
            n: torch.empty(shapes[n][0], dtype=getattr(torch, shapes[n][1])) if n in shapes else None for n in PARTS
        }
        dtype = getattr(torch, entry["dtype"])
        return QuantStack(tensors, Format.parse(entry["format"]), entry["columns"], entry["rows_first"], dtype)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{self.codes.shape[0]} experts of [{self.codes.shape[1]}, {self.columns}], {self.format}"


def replace_parameter(model: nn.Module, name: str, stack: QuantStack) -> None:
    """Replace the parameter `name` by a stack of codes; reading the attribute then dequantizes.

    A parameter that was replaced under another path of its module is not replaced again.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf not in owner._parameters:
        return
    delattr(owner, leaf)
    owner.add_module(f"{leaf}{STACK_SUFFIX}", stack)
    owner.__class__ = _reading_class(type(owner), leaf)


_reading_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _reading_class(cls: type[nn.Module], leaf: str) -> type[nn.Module]:
    """The class of an owner whose attribute `leaf` dequantizes; one for each class, so that equal owners have one.

    Pickling and copying name the class that it is derived from, as no module has a class that is made at run time.
    """
    if (cls, leaf) not in _reading_classes:
        base, leaves = getattr(cls, _DERIVED, (cls, ()))
        own = base, (*leaves, leaf)
        dequantized = property(lambda self: getattr(self, f"{leaf}{STACK_SUFFIX}")())
        content = {leaf: dequantized, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        kind = type(cls.__name__, (cls,), {**content, _DERIVED: own, "__reduce_ex__": _reduce_owner})
        _reading_classes[cls, leaf] = kind
    return _reading_classes[cls, leaf]


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before parameters of it were replaced by stacks of codes."""
    base: type[nn.Module] = getattr(type(module), _DERIVED, (type(module),))[0]
    return base


def _reduce_owner(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    return _blank_owner, getattr(self, _DERIVED), self.__getstate__()


def _blank_owner(base: type[nn.Module], leaves: Sequence[str]) -> nn.Module:
    """An owner without state, as pickle and copy make them before they fill them."""
    cls = functools.reduce(_reading_class, leaves, base)
    return cls.__new__(cls)


def restore_parameter(owner: nn.Module, leaf: str, weight: Tensor) -> None:
    """Put a float parameter back in the place of a stack: the inverse of `replace_parameter`.

    Args:
        owner: the module that had the parameter; changed in place.
        leaf: the parameter's name.
        weight: its value.
    """
    if f"{leaf}{STACK_SUFFIX}" not in owner._modules:
        return  # under another path
    base, leaves = getattr(type(owner), _DERIVED)
    del owner._modules[f"{leaf}{STACK_SUFFIX}"]
    owner.__class__ = functools.reduce(_reading_class, [name for name in leaves if name != leaf], base)
    owner.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
