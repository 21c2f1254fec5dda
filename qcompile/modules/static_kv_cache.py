"""A key/value cache of 4 or 8 bits in static buffers, for compiled decode steps and CUDA graphs.

Codes and scales are those of `KVCache` without options (kv_cache.py), but the buffers have room for all tokens from the
start and the count of tokens is a tensor: one graph serves every length, and nothing waits for the GPU. Operators of
ir/static_cache_ops.py write and read; compiled for an NVIDIA GPU, a few new positions attend to the codes themselves
(codegen/triton/lower_kv_attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

import qcompile.ir.static_cache_ops  # noqa: F401  registers the operators
from qcompile.numerics.kv_words import TRIP, WIDTHS, cache_shapes


class StaticQuantizedLayer(CacheLayerMixin):
    """One layer of the cache; transformers calls `update`.

    Attributes:
        capacity: tokens, a multiple of 128.
        bits: of a code.
        cumulative_length: int64 [], tokens that are there.
        keys: int16 words, see numerics/kv_words.py.
        values: int16 words.
        key_scales: int32 words.
        value_scales: int32 words.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = True

    key_scales: Tensor
    value_scales: Tensor

    def __init__(self, capacity: int, bits: int) -> None:
        super().__init__()
        self.capacity, self.bits = -(-capacity // TRIP) * TRIP, bits
        self.cumulative_length = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, for keys and values like these.

        Raises:
            ValueError: heads of a width that no word layout has, or on a GPU no kernel.
        """
        (batch, heads, _, width), other = key_states.shape, value_states.shape[-1]
        demand = f"one of {WIDTHS} on a GPU" if key_states.is_cuda else "a multiple of 16"
        if width != other or width % 16 or (key_states.is_cuda and width not in WIDTHS):
            raise ValueError(
                f"StaticKVCache: heads of {width} channels for keys and {other} for values; both must be {demand}. "
                "Fix: use KVCache"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        keys, values, scales = cache_shapes(batch, heads, width, self.capacity, self.bits)
        self.keys, self.values = (torch.zeros(s, dtype=torch.int16, device=self.device) for s in (keys, values))
        self.key_scales, self.value_scales = (
            torch.zeros(scales, dtype=torch.int32, device=self.device) for _ in range(2)
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for buffer in (*self.buffers, self.cumulative_length):
                torch._dynamo.mark_static_address(buffer)  # or Inductor would copy them, and make no CUDA graph
        self.is_initialized = True

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Words of keys, their scales, words of values, their scales."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.key_scales, self.values, self.value_scales

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize and write keys and values [B, H, N, D] behind those that are there.

        Returns:
            Keys and values [B, H, capacity, D], dequantized; those of positions without a token are masked.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        torch.ops.qcompile.kv_write(key_states, value_states, *self.buffers, self.cumulative_length, self.bits)
        self.cumulative_length.add_(key_states.shape[-2])
        found: tuple[Tensor, Tensor] = torch.ops.qcompile.kv_read(*self.buffers, self.bits, key_states.dtype)
        return found

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset, for the mask."""
        return self.capacity, 0

    def get_seq_length(self) -> Any:
        """Tokens that are there: a tensor, as transformers' static cache gives it; 0 before the first."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    def get_max_cache_shape(self) -> int:
        """The capacity (its name in older versions of transformers)."""
        return self.capacity

    def reset(self) -> None:
        """Drop all tokens; the buffers stay where they are."""
        for buffer in self.buffers if self.is_initialized else ():
            buffer.zero_()
        self.cumulative_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: -2 drops two.

        Raises:
            ValueError: a positive number, which older versions of transformers took for the tokens to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"StaticKVCache.crop({tokens_to_remove}): Fix: -n drops the last n tokens")
        self.cumulative_length.sub_(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences, for beam search."""
        for buffer in self.buffers if self.is_initialized else ():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def offload(self) -> None:
        """Refused: graphs read the buffers where they are."""
        raise ValueError("StaticKVCache: offloading would move buffers that graphs read. Fix: use KVCache")


class StaticKVCache(Cache):
    """A quantized cache in static buffers: `model.generate(.., past_key_values=StaticKVCache(layers, tokens))`.

    Args:
        layers: of the model, `config.num_hidden_layers`.
        max_cache_len: tokens that there is room for, rounded up to a multiple of 128. Attention gives NaN where there
            are more.
        bits: 4 or 8.

    Raises:
        ValueError: another number of bits, or no layer or token.
    """

    def __init__(self, layers: int, max_cache_len: int, bits: int = 4) -> None:
        if bits not in (4, 8):
            raise ValueError(f"StaticKVCache: {bits} bits are not supported. Fix: bits=4 or bits=8")
        if layers < 1 or max_cache_len < 1:
            raise ValueError(
                f"StaticKVCache: {layers} layers and {max_cache_len} tokens. Fix: give at least one of each, as "
                "StaticKVCache(model.config.num_hidden_layers, 4096)"
            )
        super().__init__(layers=[StaticQuantizedLayer(max_cache_len, bits) for _ in range(layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        made = (layer.buffers for layer in self.layers if layer.is_initialized)
        return sum(buffer.nbytes for buffers in made for buffer in buffers)
