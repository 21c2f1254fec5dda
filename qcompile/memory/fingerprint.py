"""Fingerprints: a 128-bit hash of the content of a tensor, computed on the tensor's device.

A weight on a GPU is not copied to be hashed. Its bytes are read as 64-bit words; each word is mixed with its
position, and the mixed words are summed modulo 2^64, once and once mixed again:

    m_i = mix(w_i + (i + 1) c)        sum m_i  and  sum mix(m_i)        mix: the finalizer of SplitMix64

Sums of integers modulo 2^64 have one value in whatever order a GPU adds them, so the result is exact and the same on
every device. `mix` is a bijection of 64-bit words, so tensors that differ in one word always differ, and a word in
another position is mixed to another one. For anything else the two sums make 128 bits: a collision by chance needs
some 10^19 weights. It is no defense against an adversary, who would have to choose the user's weights;
weight_cache.py compares bytes besides.

Source of mix: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators" (constants: Stafford's Mix13).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = {"cpu": 2**15, "cuda": 2**23}  # mixed at a time: what fits into the cache of a core; what fills a GPU
_INCREMENT, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order, uint8 [nbytes]."""
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()  # views whose sign is only noted
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # a size of 1 may have any stride


def fingerprint(tensor: Tensor) -> str:
    """Content, dtype, shape and device as one string; equal for equal tensors on one device."""
    data = as_bytes(tensor)
    sums, chunk = torch.zeros(2, dtype=torch.int64, device=data.device), 8 * WORDS.get(data.device.type, 2**20)
    for start in range(0, len(data), chunk):
        words = _words(data[start : start + chunk])
        position = torch.arange(start // 8 + 1, start // 8 + 1 + len(words), device=data.device)
        mixed = _mix(position.mul_(_INCREMENT).add_(words))
        sums[0] += mixed.sum()
        sums[1] += _mix(mixed).sum()
    first, second = (value % 2**64 for value in sums.tolist())
    return f"{first:016x}{second:016x} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}"


def _words(data: Tensor) -> Tensor:
    """Bytes as int64 words, the last one padded with zeros: the shape is part of the fingerprint."""
    if len(data) % 8:
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift to the right: torch's is arithmetic, and a word would mix as its complement does."""
    return (words >> by).bitwise_and_(2 ** (64 - by) - 1)
