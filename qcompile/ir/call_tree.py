"""The arguments of a call as flat tensors, and the tensors of whatever a call gives back.

Arguments may lie in dicts, lists, tuples, dataclasses and objects with attributes, as caches. Every tensor gets a path
such as `features['input_ids']`; a graph takes the tensors in the order of the first call, and what is no tensor is a
constant of the graph.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Change = Callable[[str, Any], Any]
"""change(path, leaf) -> the leaf that takes its place."""

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
_NO_STATE = (*_PLAIN, type, nn.Module, torch.Generator)


def map_leaves(value: Any, change: Change, path: str = "") -> Any:
    """A copy of a structure with other leaves.

    Args:
        value: tensors in dicts, lists, tuples, dataclasses, objects; never changed itself.
        change: gives the new leaf for a path and a leaf, which is a tensor or any value without tensors inside.
        path: of `value`.
    """
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        items = {key: map_leaves(item, change, f"{path}[{key!r}]" if path else str(key)) for key, item in value.items()}
        if type(value) is dict or not hasattr(value, "__setitem__"):
            return items
        changed: Any = copy.copy(value)
        for key, item in items.items():
            changed[key] = item
        return changed
    if isinstance(value, torch.Size):
        return change(path, value)
    if isinstance(value, (list, tuple)):
        parts = [map_leaves(item, change, f"{path}[{index}]") for index, item in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if type(value) in pytree.SUPPORTED_NODES:
        leaves, spec = pytree.tree_flatten(value)
        return pytree.tree_unflatten([map_leaves(x, change, f"{path}[{i}]") for i, x in enumerate(leaves)], spec)
    if not _has_tensors(value):
        return change(path, value)
    changed = copy.copy(value)
    for name, item in _attributes(value).items():
        object.__setattr__(changed, name, map_leaves(item, change, f"{path}.{name}" if path else name))
    return changed


@dataclasses.dataclass(frozen=True)
class CallTree:
    """The arguments of one call.

    Attributes:
        args: by position.
        kwargs: by name.
        names: of the parameters that take `args`, for messages.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...] = ()

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any], module: nn.Module | None = None) -> CallTree:
        """The arguments of a call, with the parameters' names of the module that takes them."""
        return CallTree(tuple(args), dict(kwargs), () if module is None else _positional_names(module))

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """Path -> tensor or constant, in the order of the call."""
        found: dict[str, Any] = {}
        self.mapped(lambda path, leaf: found.setdefault(path, leaf))
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Path -> tensor, in the order of the call."""
        return {path: leaf for path, leaf in self.leaves.items() if isinstance(leaf, Tensor)}

    @property
    def constants(self) -> dict[str, Any]:
        """Path -> what is no tensor."""
        return {path: leaf for path, leaf in self.leaves.items() if not isinstance(leaf, Tensor)}

    def mapped(self, change: Change) -> CallTree:
        """The call with other leaves."""
        paths = [self.names[i] if i < len(self.names) else f"argument {i + 1}" for i in range(len(self.args))]
        args = tuple(map_leaves(value, change, path) for path, value in zip(paths, self.args, strict=True))
        kwargs = {name: map_leaves(value, change, name) for name, value in self.kwargs.items()}
        return CallTree(args, kwargs, self.names)

    def with_tensors(self, tensors: Sequence[Tensor]) -> CallTree:
        """The call with other tensors, in the order of `tensors`."""
        replacement = dict(zip(self.tensors, tensors, strict=True))
        return self.mapped(lambda path, leaf: replacement.get(path, leaf))

    def difference(self, other: CallTree, name: str) -> str | None:
        """What a call gives differently from `other`, apart from the values of tensors; None if nothing.

        Args:
            other: a call of the same module.
            name: of `other`, for the words.
        """
        mine, theirs = self.leaves, other.leaves
        for path in (p for p in theirs if p not in mine):
            return f"lacks {path!r}, which {name} has"
        for path in (p for p in mine if p not in theirs):
            return f"has {path!r}, which {name} lacks"
        for path, leaf in mine.items():
            old = theirs[path]
            if isinstance(leaf, Tensor) != isinstance(old, Tensor):
                return f"gives {path!r} as {type(leaf).__name__}, {name} as {type(old).__name__}"
            if not isinstance(leaf, Tensor) and not _same(leaf, old):
                return f"gives {path!r} as {repr(leaf):.40}, {name} as {repr(old):.40}: a constant of the graph"
        return None

    def __str__(self) -> str:
        return ", ".join(f"{path} {shape_of(leaf)}" for path, leaf in self.leaves.items()) or "nothing"


def shape_of(leaf: Any) -> str:
    """`float32 [2, 8]` of a tensor; anything else as it prints."""
    if not isinstance(leaf, Tensor):
        return f"{repr(leaf):.40}"
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor of what a module gives back, but for those of key/value caches, which are state and no result."""
    found: list[Tensor] = []

    def keep(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value)
        return value

    map_leaves(_without_caches(output), lambda _path, leaf: keep(leaf))
    return found


def _without_caches(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_caches(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_caches(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_without_caches(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None if hasattr(value, "get_seq_length") else value


def _positional_names(module: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def _attributes(value: Any) -> dict[str, Any]:
    slots = (name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()))
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _has_tensors(value: Any, visited: frozenset[int] = frozenset()) -> bool:
    """Whether tensors lie somewhere in an object; objects that lead back to themselves are walked once."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, _NO_STATE) or callable(value) or id(value) in visited:
        return False
    visited = visited | {id(value)}
    if isinstance(value, Mapping):
        return any(_has_tensors(item, visited) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_tensors(item, visited) for item in value)
    return any(_has_tensors(item, visited) for item in _attributes(value).values())


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and (not isinstance(a, _PLAIN) or bool(a == b)))
