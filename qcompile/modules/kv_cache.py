"""A key/value cache of 4 or 8 bits for transformers' models.

Keys and values are quantized as they are appended, and attention reads the dequantized values, of new tokens too, so
that prefill and decode agree (kv_states.py). With `hadamard`, keys are rotated before they are quantized and rotated
back when read, which is the same as rotating queries and keys (QuaRot, arXiv:2404.00456 stage 1d). With `centers`,
the mean key of every head is subtracted before and added when read (SageAttention, arXiv:2410.02367 sec. 4.2). The
first `sink_tokens` tokens, and a prefix given from outside, stay float (IntactKV, arXiv:2403.01241). With `scales`,
every channel of a head has a static scale, calibrated beforehand (passes/kv_cache/quantize_kv.py), and no zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from qcompile.modules.kv_states import GrowingTensor, PerChannelStates, PerTokenStates, States
from qcompile.numerics.format import Format


class QuantizedLayer(CacheLayerMixin):
    """One layer of the cache; transformers calls `update`."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, empty: Callable[[], tuple[States, States]]) -> None:
        """`empty` makes keys and values without tokens."""
        super().__init__()
        self.empty = empty
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, S, D].

        Returns:
            All keys and values, dequantized, as attention reads them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.own_keys.append(key_states)
        self.own_values.append(value_states)
        return self.own_keys.read(self.dtype), self.own_values.read(self.dtype)

    @property
    def floats(self) -> list[Tensor]:
        """The first keys and values [B, H, F, D], where they stay float."""
        first = [states.sinks for states in (self.own_keys, self.own_values) if isinstance(states, PerTokenStates)]
        return [tensor.read() for tensor in first if tensor.length]

    @property
    def growing(self) -> list[GrowingTensor]:
        """What grows by every further token: codes and what belongs to them, of keys, then of values."""
        both = self.own_keys, self.own_values
        return [t for states in both for t in states.tensors[isinstance(states, PerTokenStates) :]]

    def reserve(self, tokens: int) -> list[Tensor]:
        """The buffers of `growing`, with room for more tokens behind the `used` ones."""
        return [tensor.reserve(tokens) for tensor in self.growing]

    @property
    def used(self) -> int:
        """Tokens in the buffers."""
        return self.growing[0].length

    def advance(self, tokens: int) -> None:
        """Count tokens that were written into the buffers."""
        for tensor in self.growing:
            tensor.length += tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length with the new tokens, and offset, for the mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Cached tokens."""
        return self.own_keys.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (its name in older versions of transformers)."""
        return -1

    def reset(self) -> None:
        """Drop all tokens."""
        self.own_keys, self.own_values = self.empty()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens."""
        for states in (self.own_keys, self.own_values):
            states.drop(abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._replace(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of the given indices."""
        self._replace(lambda t: t[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences, for beam search."""
        self._replace(lambda t: t.index_select(0, beam_idx))

    def _replace(self, function: Callable[[Tensor], Tensor]) -> None:
        for states in (self.own_keys, self.own_values):
            for tensor in states.tensors:
                tensor.replace(function)


class KVCache(Cache):
    """A quantized cache: `model.generate(.., past_key_values=KVCache())`, or in a recipe `QuantizeKV`.

    Args:
        bits: 4 or 8.
        hadamard: rotate keys before they are quantized.
        sink_tokens: tokens at the start that stay float: they have the largest values and most of the attention.
        centers: the mean key [H, D] of each layer, from calibration.
        scales: static scales of keys and of values [H, D] of each layer, from calibration.
        fp8: e4m3 codes, with static scales.

    Raises:
        ValueError: another number of bits, or options that exclude one another.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        hadamard: bool = False,
        sink_tokens: int = 0,
        centers: Sequence[Tensor] | None = None,
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
        fp8: bool = False,
    ) -> None:
        if bits not in (4, 8):
            raise ValueError(f"KVCache: {bits} bits are not supported. Fix: bits=4 or bits=8")
        if sink_tokens < 0:
            raise ValueError(f"KVCache: sink_tokens={sink_tokens} is negative. Fix: 0 or a count of tokens")
        if scales is not None and (bits != 8 or hadamard or sink_tokens or centers is not None):
            raise ValueError(
                f"KVCache: static scales go with 8 bits (got {bits}), and not with hadamard, sink_tokens or centers. "
                "Fix: use KVCache(8, scales=..), or drop scales"
            )
        if fp8 and scales is None:
            raise ValueError("KVCache: fp8 codes need static scales. Fix: give scales=.., or use KVCache(8)")
        form = Format("int4" if bits == 4 else "int8", "row", zero="int")
        static = Format("fp8") if fp8 else Format("int8")
        self.bits, self.sink_tokens = bits, sink_tokens

        def layer() -> QuantizedLayer:
            index = len(self.layers)
            if scales is not None:
                of_keys, of_values = scales[index]
                return QuantizedLayer(lambda: (PerChannelStates(of_keys, static), PerChannelStates(of_values, static)))
            center = None if centers is None else centers[index]
            return QuantizedLayer(
                lambda: (
                    PerTokenStates(form, self.sink_tokens, hadamard, center),
                    PerTokenStates(form, self.sink_tokens, False, None),
                )
            )

        super().__init__(layer_class_to_replicate=layer)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Heads of keys and of values in each layer."""
        return [(layer.own_keys.heads, layer.own_values.heads) for layer in self._filled_layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all cached tokens."""
        return sum(tensor.nbytes for states in self._states for tensor in states.tensors)

    def float_nbytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a float cache of the same tokens would take."""
        elements = [states.batch * states.heads * states.length * states.width for states in self._states]
        return sum(elements) * dtype.itemsize

    @property
    def _filled_layers(self) -> list[QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer) and layer.is_initialized]

    @property
    def _states(self) -> list[States]:
        return [states for layer in self._filled_layers for states in (layer.own_keys, layer.own_values)]
