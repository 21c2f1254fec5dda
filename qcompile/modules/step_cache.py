"""The cache of a decode step while it is traced: past keys and values as they are given, new ones kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class StepLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Past keys and values [B, G, T, D], and those of the step.

    Attributes:
        new: keys and values [B, G, N, D] of the step, once they are there.
    """

    new: tuple[Tensor, Tensor]

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Past and new, for the attention; the past stays as it is."""
        self.new = key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def step_cache(parts: Sequence[Tensor]) -> DynamicCache:
    """A cache of keys and values of each layer after the other."""
    cache = DynamicCache()
    cache.layers = [StepLayer(keys, values) for keys, values in zip(parts[::2], parts[1::2], strict=True)]
    return cache
