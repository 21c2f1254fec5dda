"""Unpacking nibbles as operators of their own, each compiled by Inductor once for one shape.

A model has hundreds of sites of a few shapes. Inlined, every unpacking is a node that Inductor
tries to fuse with every other (minutes of compilation); as an operator it is one small kernel for
each shape, called by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _int8(nibbles: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    n = nibbles.shape[0]
    s, z = scale.float()[..., None], zero.float()[..., None]
    low = (((nibbles & 15).float() - z) * s).to(torch.int8).view(n, -1)
    high = (((nibbles >> 4).float() - z) * s).to(torch.int8).view(n, -1)
    return low, high


def _float(nibbles: Tensor, a: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n = nibbles.shape[0]
    low = ((nibbles & 15).float() * a[..., None] - c[..., None]).to(dtype).view(n, -1)
    high = ((nibbles >> 4).float() * a[..., None] - c[..., None]).to(dtype).view(n, -1)
    return low, high


class _ForEachShape:
    """A function compiled for each shape of its first argument, without the compiler's limit of eight."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.compiled = torch.compile(function, dynamic=False)
        self.seen: set[tuple[Any, ...]] = set()

    def __call__(self, nibbles: Tensor, *rest: Any) -> Any:
        key = (tuple(nibbles.shape), rest[-1] if isinstance(rest[-1], torch.dtype) else None)
        if key in self.seen:
            return self.compiled(nibbles, *rest)
        with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
            result = self.compiled(nibbles, *rest)
        self.seen.add(key)
        return result


_compiled_int8, _compiled_float = _ForEachShape(_int8), _ForEachShape(_float)


@torch.library.custom_op("qcompile_cpu::unpack_int8", mutates_args=())
def unpack_int8(nibbles: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """[N, groups, G/2] bytes, integer scale and zero [N, groups] -> s (q - z) int8, twice [N, K/2]."""
    low, high = _compiled_int8(nibbles, scale, zero)
    return low, high


@unpack_int8.register_fake
def _(nibbles: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    shape = (nibbles.shape[0], nibbles.shape[1] * nibbles.shape[2])
    return nibbles.new_empty(shape, dtype=torch.int8), nibbles.new_empty(shape, dtype=torch.int8)


@torch.library.custom_op("qcompile_cpu::unpack_float", mutates_args=())
def unpack_float(nibbles: Tensor, a: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, groups, G/2] bytes, a and c [N, groups] -> a q - c in dtype, twice [N, K/2]."""
    low, high = _compiled_float(nibbles, a, c, dtype)
    return low, high


@unpack_float.register_fake
def _(nibbles: Tensor, a: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (nibbles.shape[0], nibbles.shape[1] * nibbles.shape[2])
    return nibbles.new_empty(shape, dtype=dtype), nibbles.new_empty(shape, dtype=dtype)
