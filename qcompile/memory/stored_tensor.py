"""A tensor whose values lie in a file and are read when an operation needs them.

A model whose parameters are such tensors is an ordinary module: it is captured, rewritten, called and saved by the
same code as any other, and holds one weight at a time.

    moving and casting (detach, to, transpose, slices, cat, ..)   are noted, nothing is read
    anything else (matmul, abs, numpy, clone, ..)                 reads the values and computes with plain tensors

Values are read into memory of their own (no mapping), so what a process holds is what its tensors are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Read = Callable[[], Tensor]
"""Gives the values of a tensor, each time it is called."""

aten = torch.ops.aten
_DATA: Any = Tensor.data
_CPU = torch.device("cpu")

_NOTED = {
    aten.alias.default, aten.detach.default, aten._to_copy.default, aten.t.default, aten.transpose.int,
    aten.permute.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default,
    aten.clone.default, aten.narrow.default, aten.index_select.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.expand.default,
}  # fmt: skip
"""Operations that compute nothing: values in another place, order or dtype."""

_LOOKS = {
    "__get__", "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point",
    "is_complex", "is_contiguous", "is_neg", "is_conj", "is_same_size", "storage_offset", "untyped_storage",
    "requires_grad_", "__len__", "__hash__", "__set__", "has_names", "type", "is_signed", "get_device",
    "_has_compatible_shallow_copy_type",
}  # fmt: skip
"""Methods that look at a tensor without its values."""

_MOVES = {
    "to", "detach", "t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "__getitem__", "cat",
    "concat", "stack", "contiguous", "split", "chunk", "unbind", "expand", "float", "double", "bfloat16",
    "half", "flatten", "unflatten", "cpu", "cuda", "alias", "swapaxes", "movedim", "select", "narrow", "index_select",
    "resolve_conj", "resolve_neg",
}  # fmt: skip
"""Methods that are made of `_NOTED` operations."""


class StoredTensor(Tensor):
    """A tensor without values of its own, which are read and moved to its device; see the module's text."""

    _read: Read
    _last: ClassVar[tuple[Read, torch.device, Tensor] | None] = None  # what was read last: an algorithm looks again
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @staticmethod
    def __new__(cls, like: Tensor, read: Read, device: torch.device = _CPU) -> StoredTensor:
        """A tensor of the shape, strides and dtype of `like` on a device, whose values `read` gives on any device."""
        made: StoredTensor = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device, requires_grad=False
        )
        made._read = read
        return made

    def __init__(self, like: Tensor, read: Read, device: torch.device = _CPU) -> None:
        super().__init__()

    def read(self) -> Tensor:
        """The values, as a plain tensor. Raises OSError if the file is gone or shorter than it was."""
        device = self.device
        with self._lock:
            last = StoredTensor._last
        if last is not None and last[0] is self._read and last[1] == device:
            return last[2]
        values = self._read().to(device)
        with self._lock:
            StoredTensor._last = (self._read, device, values)
        return values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype; values are not read to be shown."""
        return f"StoredTensor({list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as what it stands for."""
        return self.read().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Another tensor of the same values; nothing is read."""
        if id(self) not in memo:
            memo[id(self)] = _noted(self)
            memo[id(self)].__dict__.update(self.__dict__)  # a parameter is told by an attribute
        copied: Tensor = memo[id(self)]
        return copied

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look, note, or read and compute with plain tensors."""
        name = getattr(func, "__name__", "")
        if func == _DATA.__get__ or (name == "detach" and not args[0].requires_grad):
            return args[0]  # itself: ties are told by identity
        if func == _DATA.__set__ and isinstance(args[1], StoredTensor):
            args[0]._read = args[1]._read
        method = name.partition(".")[0]  # of an overload
        writes = method == "__setitem__" or (method.endswith("_") and not method.endswith("__") and name not in _LOOKS)
        for target in tree_leaves((args[0] if writes else None, (kwargs or {}).get("out"))):
            if isinstance(target, StoredTensor):
                raise RuntimeError(
                    f"{name} would write to {target!r}, whose values lie in a file. Fix: write to a copy"
                )
        if name in _LOOKS or name in _MOVES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = loaded((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares what stands for none
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """As `__torch_function__`, for calls from C++."""
        kwargs = kwargs or {}
        if func not in _NOTED:
            args, kwargs = loaded((args, kwargs))
            return func(*args, **kwargs)
        if func is aten.detach.default:
            return _noted(args[0])
        moved = kwargs.get("device")
        device = next(t.device for t in tree_leaves(args) if isinstance(t, StoredTensor)) if moved is None else moved
        shapes = func(*tree_map_only(Tensor, _empty, args), **{**kwargs, **({"device": "meta"} if moved else {})})
        args = tree_map_only(StoredTensor, _noted, args)  # `.data = ` may give them other values
        if isinstance(shapes, Tensor):
            return StoredTensor(shapes, lambda: func(*loaded(args), **kwargs), device)

        def part(index: int) -> Tensor:
            found: Tensor = func(*loaded(args), **kwargs)[index]
            return found

        return [StoredTensor(shape, functools.partial(part, index), device) for index, shape in enumerate(shapes)]


def _noted(tensor: StoredTensor) -> StoredTensor:
    """Another tensor of the same values."""
    return StoredTensor(_empty(tensor), tensor._read, tensor.device)


def _empty(tensor: Tensor) -> Tensor:
    """The same shape, strides and dtype on the meta device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def loaded(tree: Any) -> Any:
    """Arguments with the values of every stored tensor in them."""
    return tree_map_only(StoredTensor, StoredTensor.read, tree)
