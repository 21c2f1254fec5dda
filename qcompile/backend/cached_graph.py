"""The graph of a causal LM behind a cache: tokens and what the cache holds -> logits, new keys and values.

The cache comes as buffers with room behind what they hold. A step reads one token; a prompt any number, also where the
cache is empty.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from qcompile.ir.capture import from_exported, quiet_frontends
from qcompile.ir.program import Program
from qcompile.modules.cache_argument import returned_cache, with_cache
from qcompile.modules.kv_cache import QuantizedLayer
from qcompile.modules.step_cache import step_cache

_PAST, _PROMPT, _ROOM = 16, 8, 64  # tokens of the example; all but the step's one token are dynamic


@dataclass(frozen=True)
class CachedGraph:
    """A captured graph.

    Attributes:
        program: its inputs are ids int64 [1, N], positions int64 [1, N], a mask int64 [1, T + N] (0 at padding), and
            keys and values of each layer after the other, [1, G, C, D] with C >= T. Its outputs are logits [1, 1, V] of
            the last token, and the new keys and values [1, G, N, D] of each layer after the other. Layers of a
            quantized cache have instead of keys and values: tokens that stay float, if any, then codes, scales and zero
            points of keys and of values; and give the last six of the new tokens.
        inputs: those of the example.
        cache: of the kinds of layers that the graph reads.
    """

    program: Program
    inputs: list[Tensor]
    cache: Cache

    @property
    def buffers(self) -> list[Tensor]:
        """The cache's part of the inputs."""
        return self.inputs[3:]


def capture_step(model: nn.Module) -> CachedGraph:
    """The graph of one token, N = 1. Raises whatever the model or torch.export raise."""
    return _capture(model, 1)


def capture_prompt(model: nn.Module) -> CachedGraph:
    """The graph of any number of tokens. Raises whatever the model or torch.export raise."""
    return _capture(model, _PROMPT)


def _capture(model: nn.Module, tokens: int) -> CachedGraph:
    parameters = inspect.signature(model.forward).parameters
    cache = _cache(model)
    ids, positions, mask, *buffers = inputs = _example(cache, tokens)
    dynamic = torch.export.Dim.DYNAMIC
    of_tokens = None if tokens == 1 else {1: dynamic}
    of_buffers = [{2: dynamic} if grows else None for layer in cache.layers for _, grows in _parts(layer)]
    reading = _Reading(model, cache, "position_ids" in parameters, "logits_to_keep" in parameters)
    shapes = of_tokens, of_tokens, {1: dynamic}, of_buffers
    with torch.no_grad(), quiet_frontends():
        exported = torch.export.export(reading, (ids, positions, mask, buffers), dynamic_shapes=shapes, strict=False)
    return CachedGraph(from_exported(exported, reading, "model."), inputs, cache)


def _cache(model: nn.Module) -> Cache:
    """One that the model makes, with codes where it is quantized."""
    tokens = 2
    while True:
        with torch.no_grad():
            cache = returned_cache(model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True))
        quantized = [layer for layer in cache.layers if isinstance(layer, QuantizedLayer)]
        if tokens > 2 or all(layer.used for layer in quantized):
            return cache
        tokens += cache.sink_tokens  # which stay float


def _parts(layer: CacheLayerMixin) -> list[tuple[Tensor, bool]]:
    """What a graph reads of a layer, and whether it grows."""
    if not isinstance(layer, QuantizedLayer):
        return [(layer.keys, True), (layer.values, True)]
    return [(part, False) for part in layer.floats] + [(part.read(), True) for part in layer.growing]


def _example(cache: Cache, tokens: int) -> list[Tensor]:
    parts = [part for layer in cache.layers for part in _parts(layer)]
    buffers = [p.new_zeros(*p.shape[:2], _PAST + _ROOM, p.shape[3]) if grows else p.clone() for p, grows in parts]
    past = _PAST + max((part.shape[2] for part, grows in parts if not grows), default=0)
    positions = torch.arange(past, past + tokens)[None]
    mask = torch.ones(1, past + tokens, dtype=torch.long)
    return [torch.zeros(1, tokens, dtype=torch.long), positions, mask, *buffers]


class _Reading(nn.Module):
    """A causal LM whose cache comes as buffers, and which gives its new keys and values."""

    def __init__(self, model: nn.Module, cache: Cache, takes_positions: bool, takes_last: bool) -> None:
        super().__init__()
        self.model, self.cache, self.takes_positions, self.takes_last = model, cache, takes_positions, takes_last

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, buffers: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """As CachedGraph has it."""
        cache = step_cache(self.cache, buffers, mask.shape[1] - ids.shape[1])
        more: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        if self.takes_last:
            more["logits_to_keep"] = 1
        more |= {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        out = self.model(**with_cache(self.model, more, cache))
        return out.logits[:, -1:], [part for layer in cache.layers for part in layer.new]
