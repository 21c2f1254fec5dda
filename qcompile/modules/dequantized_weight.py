"""The weight that a quantized linear shows: computed at each access, so a write to it would be lost, and is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from qcompile.ir.in_place import storage_identity

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_NO_WRITES = ("requires_grad_", "detach_")


def read_only(weight: Tensor) -> Tensor:
    """A weight that was just computed, as one that refuses to be written; in a graph, as it is."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(DequantizedWeight)


class DequantizedWeight(Tensor):
    """A tensor whose elements cannot be written, neither through it nor through a view of it.

    Reading is as with any tensor, and what is computed from it is a plain tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, unless it writes to such a tensor."""
        kwargs = kwargs or {}
        if any(isinstance(tensor, DequantizedWeight) for tensor in _written(func, args, kwargs)):
            raise ValueError(
                f"{func.__name__} on the weight of a quantized linear would have no effect: it is computed from codes. "
                "Fix: take weight.clone(), or change the float model and quantize it again"
            )
        disabled: Any = torch._C.DisableTorchFunctionSubclass
        with disabled():
            result: Any = func(*args, **kwargs)
            own = {storage_identity(leaf) for leaf in tree_leaves(args) if isinstance(leaf, DequantizedWeight)}

            def guarded(leaf: Any) -> Any:
                is_view = isinstance(leaf, Tensor) and storage_identity(leaf) in own
                return leaf.as_subclass(DequantizedWeight) if is_view else leaf

            return tree_map(guarded, result)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """What a function of torch writes to, by the rules of its names."""
    name = func.__name__
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES
    if in_place or name == "__setitem__" or func == _SET_DATA:
        yield from tree_leaves([*args, *kwargs.values()][:1])
    yield from tree_leaves(kwargs.get("out"))
