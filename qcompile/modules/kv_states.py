"""Quantized keys or values of one layer of a KV cache.

`PerTokenStates` has a scale and a zero point for the vector [D] of every head and token (QServe, arXiv:2405.04532
sec. 4.2; ZeroQuant-V2 calls it token-wise), `PerChannelStates` a static scale for every channel of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import qcompile.ir.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.ir.cache_op import cached_values
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_rotation
from qcompile.numerics.qparams import dequantize_with_qparams, quantize_with_qparams
from qcompile.numerics.qtensor import pack_codes


class GrowingTensor:
    """A tensor [B, H, S, n] that grows along S without a copy at every append."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def append(self, new: Tensor) -> None:
        """Append [B, H, S', n]."""
        length = self.length + new.shape[-2]
        if self.buffer is None or length > self.buffer.shape[-2]:
            self.buffer = self._larger(new, length)
        self.buffer[..., self.length : length, :] = new
        self.length = length

    def reserve(self, tokens: int) -> Tensor:
        """The buffer, with room for more tokens behind the `length` that it holds."""
        assert self.buffer is not None
        if self.length + tokens > self.buffer.shape[-2]:
            self.buffer = self._larger(self.buffer, self.length + tokens)
        return self.buffer

    def _larger(self, like: Tensor, tokens: int) -> Tensor:
        larger = like.new_empty(*like.shape[:-2], max(tokens, self.length * 5 // 4 + 16), like.shape[-1])
        if self.buffer is not None:
            larger[..., : self.length, :] = self.read()
        return larger

    def read(self) -> Tensor:
        """What was appended, [B, H, S, n], as a view."""
        assert self.buffer is not None
        return self.buffer[..., : self.length, :]

    def replace(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the content by a function of it."""
        if self.buffer is not None:
            self.buffer = function(self.read()).contiguous()
            self.length = self.buffer.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return 0 if self.buffer is None else self.read().nbytes


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _rotation(width: int) -> Tensor:
    rotation: Tensor = random_rotation(width, 0)[0].float()
    return rotation


class PerTokenStates:
    """Codes with a scale (float16) and a zero point for each head and token; the first tokens are float.

    Attributes:
        format: of the codes, per row with integer zero points.
        sink_tokens: tokens at the start that stay float.
        hadamard: whether vectors are rotated before they are quantized.
        center: [H, 1, D], subtracted before and added when read; or None.
        sinks: the float tokens.
        rotation: [D, D], once there are codes; None: not rotated.
    """

    def __init__(self, format: Format, sink_tokens: int, hadamard: bool, center: Tensor | None) -> None:
        self.format, self.sink_tokens, self.hadamard = format, sink_tokens, hadamard
        self.center = None if center is None else center.float()[:, None]
        self.sinks, self.codes, self.scale, self.zero = (GrowingTensor() for _ in range(4))
        self.width = 0
        self.rotation: Tensor | None = None

    def append(self, new: Tensor) -> None:
        """Quantize and append [B, H, S, D]."""
        sinks = max(0, self.sink_tokens - self.sinks.length)
        self.width = new.shape[-1]
        if sinks:
            self.sinks.append(new[..., :sinks, :])
        new = new[..., sinks:, :]
        if not new.shape[-2]:
            return
        if self.hadamard and self.rotation is None:
            self.rotation = _rotation(self.width).to(new.device)
        if self.center is not None and self.center.device != new.device:
            self.center = self.center.to(new.device)
        for tensor, part in zip((self.codes, self.scale, self.zero), self.quantized(new), strict=True):
            tensor.append(part)

    def quantized(self, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stored codes, scale and zero point of [B, H, S, D], as `cached_values` reads them."""
        values = new.float() if self.center is None else new.float() - self.center
        values = values if self.rotation is None else values @ self.rotation
        codes, scale, zero = torch.ops.qcompile.quantize(values, str(self.format))
        most = torch.finfo(torch.float16).max
        return pack_codes(codes, self.format), scale.clamp(max=most).half(), zero.to(torch.uint8)

    def reads_as(self, other: States) -> bool:
        """Whether codes of this mean what they mean in another: format, rotation, center, and float first tokens."""
        if not isinstance(other, PerTokenStates) or (self.center is None) != (other.center is None):
            return False
        same = (self.format, self.hadamard, self.width) == (other.format, other.hadamard, other.width)
        centered = self.center is None or other.center is None or torch.equal(self.center, other.center)
        return same and centered and self.sinks.length == other.sinks.length

    def read(self, dtype: torch.dtype) -> Tensor:
        """All tokens, dequantized, [B, H, S, D]."""
        tokens = [self.sinks.read().to(dtype)] if self.sinks.length else []
        if self.codes.length:
            parts = self.codes.read(), self.scale.read(), self.zero.read()
            tokens.append(cached_values(*parts, self.rotation, self.center, str(self.format), self.width, dtype))
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens, -2)

    def drop(self, count: int) -> None:
        """Drop the last tokens."""
        quantized = min(count, self.codes.length)
        for tensor in (self.codes, self.scale, self.zero):
            tensor.length -= quantized
        self.sinks.length -= count - quantized

    @property
    def tensors(self) -> tuple[GrowingTensor, ...]:
        """Everything that is stored."""
        return self.sinks, self.codes, self.scale, self.zero

    @property
    def batch(self) -> int:
        """B."""
        return len(self._filled.read())

    @property
    def heads(self) -> int:
        """H."""
        return int(self._filled.read().shape[1])

    @property
    def length(self) -> int:
        """Tokens."""
        return self.sinks.length + self.codes.length

    @property
    def _filled(self) -> GrowingTensor:
        return self.codes if self.codes.buffer is not None else self.sinks


class PerChannelStates:
    """Codes with a static scale [H, D] for each channel, without zero points.

    Attributes:
        format: of the codes: int8, or fp8, whose scales are the same within a head.
        scale: [H, 1, D].
        codes: int8, or the bits of fp8 as uint8.
    """

    def __init__(self, scale: Tensor, format: Format = Format("int8")) -> None:  # noqa: B008  frozen
        self.format = format
        self.scale = scale.float()[:, None]
        self.codes = GrowingTensor()

    def append(self, new: Tensor) -> None:
        """Quantize and append [B, H, S, D]."""
        codes = quantize_with_qparams(new.float(), self.scale, None, self.format)
        self.codes.append(codes.view(torch.uint8) if self.format.is_float else codes)

    def read(self, dtype: torch.dtype) -> Tensor:
        """All tokens, dequantized, [B, H, S, D]."""
        codes = self.codes.read().view(self.format.code_dtype)
        return dequantize_with_qparams(codes, self.scale, None, self.format).to(dtype)

    def drop(self, count: int) -> None:
        """Drop the last tokens."""
        self.codes.length -= count

    @property
    def tensors(self) -> tuple[GrowingTensor, ...]:
        """Everything that is stored per token."""
        return (self.codes,)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.codes.read())

    @property
    def heads(self) -> int:
        """H."""
        return int(self.codes.read().shape[1])

    @property
    def length(self) -> int:
        """Tokens."""
        return self.codes.length

    @property
    def width(self) -> int:
        """D."""
        return self.scale.shape[-1]


States = PerTokenStates | PerChannelStates
