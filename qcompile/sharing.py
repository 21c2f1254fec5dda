"""Tensors made once and shared: equal weights are one weight, whoever holds them.

A model that Dynamo compiles has several graphs (prefill, decode, ..). What is made from a weight,
its codes or a kernel's own layout, is found again by the content that it was made from, and lives
as long as some graph keeps the `Shared` that holds it.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Remember = Callable[[str, Sequence[Tensor], Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]]
"""remember(kernel, tensors, make): what a kernel's layout makes of some tensors, made once for equal ones."""


class Shared:
    """Tensors that were made from one content."""

    def __init__(self, tensors: tuple[Tensor | None, ...]) -> None:
        self.tensors = tensors


_alive: weakref.WeakValueDictionary[Hashable, Shared] = weakref.WeakValueDictionary()


def shared(key: Hashable, make: Callable[[], tuple[Tensor | None, ...]]) -> Shared:
    """The tensors under `key`, made now if nobody holds them."""
    found = _alive.get(key)
    if found is None:
        found = Shared(make())
        _alive[key] = found
    return found


def fingerprint(tensor: Tensor) -> str:
    """A hash of dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest() + str((tensor.dtype, tuple(tensor.shape)))


def count() -> int:
    """How many are alive; for tests."""
    return len(_alive)
