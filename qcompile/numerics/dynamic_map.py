"""Optimizer moments in 8 bits: blocks of 256 with the largest magnitude as scale, and a nonlinear map of 256 values.

Each power of ten from 1 down to 1e-7 has half as many values as the one above it, 64, 32, .. 1 (and as many negative
ones) or, unsigned, 128, 64, .. 2, evenly spaced; 0 and 1 complete them. So moments that differ by seven orders of
magnitude inside one block survive, at a relative error that grows as they get smaller.

A positive value of the unsigned map never becomes zero: an optimizer divides by the root of such a moment, and a first
moment that is left over would become a step of any size (as in the row of an embedding that is used once).

Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (arXiv:2110.02861, sec. 2.2 and 3):
        dynamic tree quantization. The map is the one that bitsandbytes uses, so its states can be read.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a scale, in row-major order."""


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the map, ascending, float32."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist()
        values += (-middles).tolist() if signed else []
    return torch.tensor(sorted(values), dtype=torch.float32)


def to_codes(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize each block by its largest magnitude.

    Args:
        x: float32 of any shape, not negative unless `signed`.
        signed: which map.

    Returns:
        Codes uint8 of the shape of x, and scales float32 [blocks]; a block of zeros has scale 0.
    """
    blocks = _blocks(x)
    scale = blocks.abs().amax(-1)
    normal = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
    codes = _nearest(normal, signed)
    return codes.flatten()[: x.numel()].view(x.shape), scale


def from_codes(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The inverse of `to_codes`, float32."""
    values = _tables(signed, codes.device)[2].index_select(0, codes.flatten().int())
    blocks = _blocks(values) * scale[:, None]
    return blocks.flatten()[: codes.numel()].view(codes.shape)


def _blocks(x: Tensor) -> Tensor:
    """[blocks, 256] of the values of x, the last block padded with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _nearest(x: Tensor, signed: bool) -> Tensor:
    """The code of the nearest value of the map, uint8, for x float32 in [-1, 1].

    The upper half of a float names an interval of values, in which there is at most one edge between two codes: one
    look-up and one comparison, in place of a binary search (torch.bucketize).
    """
    least, edges, _ = _tables(signed, x.device)
    interval = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF).flatten()
    codes = least.index_select(0, interval)
    codes += x.flatten() > edges.index_select(0, codes)
    return codes.to(torch.uint8).view(x.shape)


@functools.cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The code of the least value of each interval, int32 [65536]; the edge above each code, float32 [256]; the map."""
    values = dynamic_map(signed)
    edges = (values[:-1] + values[1:]) / 2
    if not signed:
        edges[0] = 0.0  # what is above it is no zero
    interval = torch.arange(2**16, dtype=torch.int32)
    bits = (interval << 16) | torch.where(interval < 2**15, 0, 0xFFFF)  # of negative values the largest is the least
    least = torch.bucketize(bits.to(torch.int32).view(torch.float32).nan_to_num(), edges, out_int32=True)
    above = torch.cat([edges, edges.new_tensor([float("inf")])])
    return least.to(device), above.to(device), values.to(device)
