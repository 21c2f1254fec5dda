"""A key/value cache of 4 or 8 bits for transformers' models.

Every key and value vector [D] of a head and token is quantized by itself, with a zero point, as it
is appended (QServe, arXiv:2405.04532 sec. 4.2; ZeroQuant-V2 calls it token-wise). What attention
reads are the numbers behind the codes, of new tokens too, so prefill and decoding agree. With
`hadamard`, vectors are turned before they are quantized and turned back when read, which is the
same as turning queries and keys (QuaRot, arXiv:2404.00456 stage 1d). With `centers`, the mean key of
every head is taken out before and put back when read (SageAttention, arXiv:2410.02367 sec. 4.2). The
first `sink_tokens` tokens, and a prefix given from outside, stay float (IntactKV, arXiv:2403.01241).
With `scales`, every channel of a head has one scale for all tokens, known before (passes/kv_cache/quantize_kv.py),
and no zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import rotation
from qcompile.numerics.qtensor import dequantize_codes, load_codes, store_codes
from qcompile.numerics.rounding import dequantize_with_qparams, quantize_tensor, quantize_with_qparams


class _Column:
    """A tensor [B, H, T, n] that grows along T without being copied at every step."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def append(self, new: Tensor) -> None:
        need = self.length + new.shape[-2]
        if self.buffer is None or need > self.buffer.shape[-2]:
            room = new.new_empty(*new.shape[:-2], max(need, self.length * 5 // 4 + 16), new.shape[-1])
            if self.buffer is not None:
                room[..., : self.length, :] = self.read()
            self.buffer = room
        self.buffer[..., self.length : need, :] = new
        self.length = need

    def read(self) -> Tensor:
        assert self.buffer is not None
        return self.buffer[..., : self.length, :]

    def change(self, config: Any) -> None:
        if self.buffer is not None:
            self.buffer = config(self.read()).contiguous()
            self.length = self.buffer.shape[-2]


class _Vectors:
    """Keys or values of one layer: `sink_tokens` float ones first, then codes with scale and zero."""

    def __init__(self, form: Format, sink_tokens: int, hadamard: bool, center: Tensor | None) -> None:
        self.form, self.sink_tokens, self.hadamard = form, sink_tokens, hadamard
        self.center = None if center is None else center.float()[:, None]  # [H, 1, D]
        self.exact, self.codes, self.scale, self.zero = (_Column() for _ in range(4))
        self.width = 0
        self.turn: Tensor | None = None

    def append(self, new: Tensor) -> None:
        free = max(0, self.sink_tokens - self.exact.length)
        self.width = new.shape[-1]
        if free:
            self.exact.append(new[..., :free, :])
        new = new[..., free:, :]
        if not new.shape[-2]:
            return
        if self.hadamard and self.turn is None:
            self.turn = rotation(self.width, 0)[0].float()
        wide = new.float() if self.center is None else new.float() - self.center
        q = quantize_tensor(wide if self.turn is None else wide @ self.turn, self.form)
        assert q.zero is not None
        self.codes.append(store_codes(q.codes, self.form))
        self.scale.append(q.scale.clamp(max=torch.finfo(torch.float16).max).half())
        self.zero.append(q.zero)

    def read(self, dtype: torch.dtype) -> Tensor:
        parts = [self.exact.read().to(dtype)] if self.exact.length else []
        if self.codes.length:
            codes = load_codes(self.codes.read(), self.form, self.width)
            numbers = dequantize_codes(codes, self.scale.read().float(), self.zero.read(), None, self.form)
            numbers = numbers if self.turn is None else numbers @ self.turn.t()
            parts.append((numbers if self.center is None else numbers + self.center).to(dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def drop(self, count: int) -> None:
        coded = min(count, self.codes.length)
        for column in (self.codes, self.scale, self.zero):
            column.length -= coded
        self.exact.length -= count - coded

    @property
    def columns(self) -> tuple[_Column, ...]:
        return self.exact, self.codes, self.scale, self.zero

    @property
    def heads(self) -> int:
        return int(self.any_column.read().shape[1])

    @property
    def any_column(self) -> _Column:
        """One that holds something."""
        return self.codes if self.codes.buffer is not None else self.exact

    @property
    def length(self) -> int:
        return self.exact.length + self.codes.length

    @property
    def nbytes(self) -> int:
        return sum(c.read().nbytes for c in self.columns if c.buffer is not None)


class _Channels:
    """Keys or values of one layer, int8 codes with one scale [H, D] for each channel."""

    form = Format("int8")

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale.float()[:, None]  # [H, 1, D]
        self.codes = self.any_column = _Column()

    def append(self, new: Tensor) -> None:
        self.codes.append(quantize_with_qparams(new.float(), self.scale, None, self.form))

    def read(self, dtype: torch.dtype) -> Tensor:
        return dequantize_with_qparams(self.codes.read(), self.scale, None, self.form).to(dtype)

    def drop(self, count: int) -> None:
        self.codes.length -= count

    @property
    def columns(self) -> tuple[_Column, ...]:
        return (self.codes,)

    @property
    def heads(self) -> int:
        return int(self.codes.read().shape[1])

    @property
    def length(self) -> int:
        return self.codes.length

    @property
    def width(self) -> int:
        return self.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.codes.read().nbytes if self.codes.buffer is not None else 0


class _Layer(CacheLayerMixin):
    """One layer of the cache; transformers calls `update`."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, empty: Callable[[], tuple[_Vectors | _Channels, _Vectors | _Channels]]) -> None:
        """`empty` makes keys and values without tokens."""
        super().__init__()
        self.empty = empty
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, D]; returns all of them as attention shall see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.own_keys.append(key_states)
        self.own_values.append(value_states)
        return self.own_keys.read(self.dtype), self.own_values.read(self.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length with the new tokens, and offset, for the mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.own_keys.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (its name in older versions of transformers)."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.own_keys, self.own_values = self.empty()
        self.is_initialized = False

    def _change(self, config: Any) -> None:
        for vectors in (self.own_keys, self.own_values):
            for column in vectors.columns:
                column.change(config)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens."""
        for vectors in (self.own_keys, self.own_values):
            vectors.drop(abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._change(lambda t: t[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences, for beam search."""
        self._change(lambda t: t.index_select(0, beam_idx))


class KVCache(Cache):
    """A quantized cache: `model.generate(.., past_key_values=KVCache())`, or in a recipe `QuantizeKV`.

    Args:
        bits: 4 or 8. hadamard: turn keys before they are quantized. sink_tokens: tokens at the start to
            keep float: they carry the largest values and most of the attention. centers: the mean
            key [H, D] of each layer, as calibration gathers it. scales: of keys and of values [H, D] in
            each layer, where they are fixed, as calibration gathers them.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        hadamard: bool = False,
        sink_tokens: int = 0,
        centers: Sequence[Tensor] | None = None,
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        if bits not in (4, 8):
            raise ValueError(f"KVCache: bits must be 4 or 8, got {bits}")
        if sink_tokens < 0:
            raise ValueError(f"KVCache: sink_tokens counts tokens, got {sink_tokens}")
        if scales is not None and (bits != 8 or hadamard or sink_tokens or centers is not None):
            raise ValueError("KVCache: fixed scales are of 8 bits, without hadamard, sink_tokens and centers")
        form = Format("int4" if bits == 4 else "int8", "row", zero="int")
        self.bits, self.sink_tokens = bits, sink_tokens

        def layer() -> _Layer:
            index = len(self.layers)
            if scales is not None:
                of_keys, of_values = scales[index]
                return _Layer(lambda: (_Channels(of_keys), _Channels(of_values)))
            center = None if centers is None else centers[index]
            return _Layer(
                lambda: (
                    _Vectors(form, self.sink_tokens, hadamard, center),
                    _Vectors(form, self.sink_tokens, False, None),
                )
            )

        super().__init__(layer_class_to_replicate=layer)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Heads of keys and of values in each layer."""
        return [(layer.own_keys.heads, layer.own_values.heads) for layer in self._held]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        return sum(layer.own_keys.nbytes + layer.own_values.nbytes for layer in self._held)

    def float_nbytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a float cache of the same tokens would take."""
        total = 0
        for layer in self._held:
            for vectors in (layer.own_keys, layer.own_values):
                rows = len(vectors.any_column.read()) * vectors.heads * vectors.length
                total += rows * vectors.width * dtype.itemsize
        return total

    @property
    def _held(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer) and layer.is_initialized]
