"""Tensors made once and shared: equal weights are one weight, whoever holds them.

A model that Dynamo compiles has several graphs (prefill, decode, ..). What is made from a weight,
its codes or a kernel's own layout, is found again by the content that it was made from, and lives
as long as some graph keeps the `Shared` that holds it.

Found means: equal fingerprints (fingerprint.py), and equal bytes too as long as the tensors that it was made from
are somewhere in memory. They are watched, not kept: a rotated weight is given up when its codes are made, and then
the fingerprint alone decides.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qcompile.memory.fingerprint import as_bytes, fingerprint

Remember = Callable[[str, Sequence[Tensor], Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]]
"""remember(kernel, tensors, make): what a kernel's layout makes of some tensors, made once for equal ones."""


class SharedTensors:
    """Tensors that were made from others."""

    def __init__(self, tensors: tuple[Tensor | None, ...], sources: Sequence[Tensor] = ()) -> None:
        self.tensors = tensors
        self._sources = [_Watched(source) for source in sources]

    def may_serve(self, sources: Sequence[Tensor]) -> bool:
        """Whether no source that is still there differs from these, of equal fingerprints."""
        return all(seen.may_be(now) for seen, now in zip(self._sources, sources, strict=True))


class _Watched:
    """A tensor that is looked at again if it is still there."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        self._dtype, self._device = tensor.dtype, tensor.device

    def may_be(self, other: Tensor) -> bool:
        """Whether it is gone, or has the other's bytes."""
        if self._storage.expired():
            return True
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:  # gone in between
            return True
        mine = torch.empty(0, dtype=self._dtype, device=self._device).set_(storage, *self._place)
        place = (other.storage_offset(), tuple(other.shape), other.stride())
        if mine.data_ptr() == other.data_ptr() and self._place == place:
            return True
        return torch.equal(as_bytes(mine), as_bytes(other))


_alive: weakref.WeakValueDictionary[Hashable, SharedTensors] = weakref.WeakValueDictionary()


def shared(key: Hashable, sources: Sequence[Tensor], make: Callable[[], tuple[Tensor | None, ...]]) -> SharedTensors:
    """What was made of `sources` in the way that `key` says, made now if nobody holds it."""
    full = (key, *map(fingerprint, sources))
    found = _alive.get(full)
    if found is None or not found.may_serve(sources):
        found = SharedTensors(make(), sources)
        _alive[full] = found
    return found


def count() -> int:
    """How many are alive; for tests."""
    return len(_alive)
