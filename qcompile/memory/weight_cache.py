"""Tensors that are prepared from weights once, and found again by the content of those weights.

A model that Dynamo compiles has several graphs (prefill, decode, ..). What is prepared from a weight, its codes or
the layout of a kernel, is looked up by the weight's content, and lives as long as some graph keeps the
`CachedTensors` that holds it.

A lookup succeeds for equal fingerprints (fingerprint.py), and equal bytes too as long as the source tensors of the
entry are somewhere in memory. The cache refers to them weakly: a rotated weight is freed when its codes are made,
and from then on the fingerprint alone decides.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qcompile.memory.fingerprint import as_bytes, fingerprint

Remember = Callable[[str, Sequence[Tensor], Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]]
"""remember(layout, sources, make): what make() prepares from the sources, made once for equal ones."""

Tensors = TypeVar("Tensors", bound=tuple[Tensor | None, ...])


class CachedTensors(Generic[Tensors]):
    """An entry of the cache: tensors, and weak references to what they were made from."""

    def __init__(self, tensors: Tensors, sources: Sequence[Tensor] = ()) -> None:
        self.tensors = tensors
        self._sources = [_WeakTensor(source) for source in sources]

    def matches(self, sources: Sequence[Tensor]) -> bool:
        """Whether no source that still exists differs from these, which have equal fingerprints."""
        return all(kept.is_gone_or_equals(new) for kept, new in zip(self._sources, sources, strict=True))


def cached(key: Hashable, sources: Sequence[Tensor], make: Callable[[], Tensors]) -> CachedTensors[Tensors]:
    """The entry for `sources` under `key`, made now if there is none.

    Args:
        key: what is made of the sources: the name of a layout, a format.
        sources: the weights that the tensors depend on.
        make: makes the tensors.

    Returns:
        The entry. It stays in the cache while the caller keeps it.
    """
    full_key = (key, *map(fingerprint, sources))
    entry = cast(CachedTensors[Tensors] | None, _entries.get(full_key))  # a key has one `make`, so one type
    if entry is None or not entry.matches(sources):
        entry = CachedTensors(make(), sources)
        _entries[full_key] = entry
    return entry


def entry_count() -> int:
    """The number of entries that somebody keeps; for tests."""
    return len(_entries)


_entries: weakref.WeakValueDictionary[Hashable, CachedTensors[Any]] = weakref.WeakValueDictionary()


class _WeakStorage(Protocol):
    """What torch's StorageWeakRef is, which has no types."""

    cdata: int

    def expired(self) -> bool: ...


_weak_storage: Callable[[torch.UntypedStorage], _WeakStorage] = StorageWeakRef


class _WeakTensor:
    """A tensor whose memory is looked at again if it still exists."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = _weak_storage(tensor.untyped_storage())
        self._view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        self._dtype, self._device = tensor.dtype, tensor.device

    def is_gone_or_equals(self, other: Tensor) -> bool:
        """Whether the memory was freed, or holds the bytes of the other tensor."""
        if self._storage.expired():
            return True
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:  # freed in between
            return True
        mine = torch.empty(0, dtype=self._dtype, device=self._device).set_(storage, *self._view)
        view = (other.storage_offset(), tuple(other.shape), other.stride())
        if mine.data_ptr() == other.data_ptr() and self._view == view:
            return True
        return torch.equal(as_bytes(mine), as_bytes(other))
