"""An argument of an operator, damaged: of another size, rank or dtype, or missing."""

from __future__ import annotations

import torch


def damaged(value, kind, at, size):
    if not isinstance(value, torch.Tensor):
        return value
    if kind == "size" and value.ndim:
        shape = list(value.shape)
        shape[at % value.ndim] = [0, 1, shape[at % value.ndim] + 1, 63, 128][size]
        return torch.zeros(shape).to(value.dtype)
    if kind == "rank":
        return [value[None], value.reshape(-1), value[..., None], value.new_zeros(()), value][size]
    if kind == "dtype":
        return value.to([torch.int8, torch.int32, torch.float64, torch.complex64, torch.uint8][size])
    return None if kind == "None" else value
