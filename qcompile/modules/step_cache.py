"""The cache of a decode step while it is traced: what it holds comes from outside, what is new is kept apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from qcompile.modules.kv_cache import QuantizedLayer
from qcompile.modules.kv_states import PerTokenStates


class StepLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Past keys and values [B, G, T, D], and those of the step.

    Attributes:
        new: keys and values [B, G, N, D] of the step, once they are there.
    """

    new: tuple[Tensor, ...]

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Past and new, for the attention; the past stays as it is."""
        self.new = key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class CodeStepLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Past keys and values as codes behind some floats, and those of the step.

    Attributes:
        new: codes, scales and zero points of the step's keys, then of its values.
    """

    new: tuple[Tensor, ...]

    def __init__(
        self, states: tuple[PerTokenStates, PerTokenStates], floats: Sequence[Tensor], codes: Sequence[Tensor]
    ):
        """Floats are keys and values [B, G, F, D], or none; codes three tensors of the keys and three of the values."""
        super().__init__()
        self.states, self.floats, self.codes = states, floats, (tuple(codes[:3]), tuple(codes[3:]))
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens that are held."""
        first = self.floats[0].shape[-2] if self.floats else 0
        return first + self.codes[0][0].shape[-2]  # symbolic: int() would fix it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Past and new, for the attention; the new ones are quantized and read back, as later steps will read them."""
        found, self.new = [], ()
        for i, (states, past, new) in enumerate(zip(self.states, self.codes, (key_states, value_states), strict=True)):
            added = states.quantized(new)
            self.new += added
            layout = states.rotation, states.center, str(states.format), new.shape[-1], new.dtype
            read = [torch.ops.qcompile.read_cache(*parts, *layout) for parts in (past, added)]
            found.append(torch.cat([*self.floats[i : i + 1], *read], dim=-2))
        return found[0], found[1]


def step_cache(like: Cache, parts: Iterable[Tensor], tokens: int) -> DynamicCache:
    """A cache of the same kinds of layers.

    Args:
        like: which holds some tokens.
        parts: what the layers read, one layer after the other: floats that stay, and buffers, of which a layer holds
            the first tokens.
        tokens: that every layer holds.
    """
    given, cache = iter(parts), DynamicCache()
    cache.layers = []
    for layer in like.layers:
        if not isinstance(layer, QuantizedLayer):
            cache.layers.append(StepLayer(*[next(given)[:, :, :tokens] for _ in range(2)]))
            continue
        keys, values = layer.own_keys, layer.own_values
        assert isinstance(keys, PerTokenStates) and isinstance(values, PerTokenStates)
        floats = [next(given) for _ in layer.floats]
        first = floats[0].shape[2] if floats else 0
        codes = [next(given)[:, :, : tokens - first] for _ in layer.growing]
        cache.layers.append(CodeStepLayer((keys, values), floats, codes))
    return cache
