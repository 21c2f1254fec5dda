"""A KV cache in buffers with room: a new token is written behind the others, nothing is copied.

transformers' DynamicCache (5.24) makes a new tensor of the whole past for each token. A GrowingLayer is a DynamicLayer,
so beams, cropping, copies and reordering work as they do there; it holds a view of a buffer that grows by half.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from qcompile.modules.kv_cache import QuantizedLayer
from qcompile.modules.kv_states import PerTokenStates

ROOM = 256  # tokens that a buffer is longer than what it holds


class _Buffer:
    """Keys or values [B, G, T, D], the first `used` of a buffer's tokens."""

    def __init__(self, tensor: Tensor) -> None:
        self.buffer, self.used = tensor, 0
        self.set(tensor)

    def set(self, tensor: Tensor) -> None:
        """Hold these values; the first tokens of those that it holds (a crop) stay where they are."""
        length = tensor.shape[-2]
        if self._is_own(tensor):
            self.used = length
            return
        self.buffer = _with_room(tensor, length + ROOM)
        self.used = length

    def append(self, rows: Tensor) -> None:
        """Write tokens behind the others."""
        self.reserve(rows.shape[-2])
        self.buffer[:, :, self.used : self.used + rows.shape[-2]] = rows
        self.used += rows.shape[-2]

    def reserve(self, tokens: int) -> None:
        """Make room for more tokens."""
        if self.used + tokens > self.buffer.shape[2]:
            self.buffer = _with_room(self.view(), self.used + tokens + max(ROOM, self.used // 2))

    def view(self) -> Tensor:
        """What it holds."""
        return self.buffer[:, :, : self.used]

    def _is_own(self, tensor: Tensor) -> bool:
        same = tensor.data_ptr() == self.buffer.data_ptr() and tensor.stride() == self.buffer.stride()
        return same and tensor.shape[:2] == self.buffer.shape[:2] and tensor.shape[-2] <= self.used


def _with_room(tensor: Tensor, tokens: int) -> Tensor:
    batch, heads, length, width = tensor.shape
    buffer = tensor.new_empty(batch, heads, tokens, width)
    buffer[:, :, :length] = tensor
    return buffer


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Keys and values of one layer."""

    def __init__(self) -> None:
        self._parts: dict[str, _Buffer] = {}
        super().__init__()

    @staticmethod
    def of(layer: DynamicLayer) -> GrowingLayer:
        """A layer with the same keys and values."""
        grown = GrowingLayer()
        if layer.is_initialized and layer.keys.numel():
            grown.dtype, grown.device, grown.is_initialized = layer.keys.dtype, layer.keys.device, True
            grown.keys, grown.values = layer.keys, layer.values
        return grown

    @property
    def keys(self) -> Tensor | None:
        """[B, G, T, D], a view."""
        return self._view("keys")

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._set("keys", tensor)

    @property
    def values(self) -> Tensor | None:
        """[B, G, T, D], a view."""
        return self._view("values")

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._set("values", tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, G, N, D] behind the others; returns all."""
        if not self._parts:
            self.lazy_initialization(key_states, value_states)
            self._parts = {"keys": _Buffer(key_states), "values": _Buffer(value_states)}
        else:
            self._parts["keys"].append(key_states)
            self._parts["values"].append(value_states)
        return self._parts["keys"].view(), self._parts["values"].view()

    @property
    def floats(self) -> list[Tensor]:
        """Nothing lies beside the buffers."""
        return []

    @property
    def used(self) -> int:
        """Tokens in the buffers."""
        return self._parts["keys"].used if self._parts else 0

    def reserve(self, tokens: int) -> list[Tensor]:
        """The buffers, with room for more tokens behind the `used` ones."""
        for part in self._parts.values():
            part.reserve(tokens)
        return [part.buffer for part in self._parts.values()]

    def advance(self, tokens: int) -> None:
        """Count tokens that were written into the buffers."""
        for part in self._parts.values():
            part.used += tokens

    def _view(self, name: str) -> Tensor | None:
        return self._parts[name].view() if name in self._parts else None

    def _set(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None or tensor.ndim != 4:  # before the first token it is an empty vector
            self._parts.pop(name, None)
        elif name in self._parts:
            self._parts[name].set(tensor)
        else:
            self._parts[name] = _Buffer(tensor)


def obstacle_to_growing(cache: Cache) -> str | None:
    """Why the layers of a cache cannot grow in place; None if they can."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, QuantizedLayer):
            if not isinstance(layer.own_keys, PerTokenStates):
                return f"layer {index} of the cache has static scales"
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer):
            return f"layer {index} of the cache is a {type(layer).__name__}"
    return None


def as_dynamic(cache: Cache) -> None:
    """Let a cache hold plain layers, for what traces `update`, in place; masks hide what is beyond a window."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer or isinstance(layer, QuantizedLayer):
            continue
        plain = DynamicLayer()
        if layer.get_seq_length():
            plain.dtype, plain.device, plain.is_initialized = layer.keys.dtype, layer.keys.device, True
            plain.keys, plain.values = layer.keys, layer.values
        cache.layers[index] = plain


def as_growing(cache: Cache) -> None:
    """Let a cache hold growing layers, in place; quantized ones grow already."""
    grow = (GrowingLayer, QuantizedLayer)
    cache.layers[:] = [layer if isinstance(layer, grow) else GrowingLayer.of(layer) for layer in cache.layers]
