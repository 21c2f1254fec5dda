"""What the kernels of a quantized KV cache compute.

    kv_write    new keys and values [B, H, N, D]  ->  codes and scales of their tokens, in place
    kv_read     the cache  ->  keys and values [B, H, T, D]
    kv_decode   queries of a few positions, the cache  ->  partial attentions of ranges of tokens
    kv_merge    partial attentions, in order  ->  attention

Words, pages and scales are those of kv_words.py. The codes and scales are those of modules/kv_states.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.codegen.triton.kernels.spec import Dtype, KernelSpec
from qcompile.numerics.kv_words import PAGE, WIDTHS


@dataclass(frozen=True)
class _Cached(KernelSpec):
    """Keys and values of a cache.

    Attributes:
        bits: of a code, 4 or 8.
        width: D, channels of a head.
    """

    bits: int = 4
    width: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (4, 8):
            raise ValueError(f"{self}: bits {self.bits}; a cache has codes of 4 or 8")
        if self.width not in WIDTHS:
            raise ValueError(f"{self}: heads of {self.width} channels; there are kernels for {WIDTHS}")

    @property
    def chunks(self) -> int:
        """Codes in a word of 16 bits."""
        return 16 // self.bits

    @property
    def page(self) -> int:
        """Tokens of a page of values."""
        return PAGE


@dataclass(frozen=True)
class KVDecode(_Cached):
    """softmax(cap(q K^T scale)) V of a range of tokens, not divided by the sum of its weights.

    The cache is the left side of both products, so that its codes become bfloat16 in registers. Zero points of keys are
    subtracted from the codes, which is exact; those of values are subtracted with the sums of the rounded weights.

    Attributes:
        heads: query heads that share a head of keys.
        queries: positions: the last ones in the cache, each of which sees those before it.
        window: a position sees so many tokens only, an argument.
        cap: scores are cap tanh(score / cap), an argument.
        masked: what a query sees is said by a mask that is added to the scores, not by its position.
    """

    template: ClassVar[str] = "kv_decode"
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16",)
    heads: int = 1
    queries: int = 1
    window: bool = False
    cap: bool = False
    masked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.queries < 1:
            raise ValueError(f"{self}: {self.heads} heads and {self.queries} queries; at least one of each")
        if self.masked and self.window:
            raise ValueError(f"{self}: a mask says which tokens are in the window")

    @property
    def rows(self) -> int:
        """Rows of q for a head of keys; a program has eight, which are the narrow side of the tensor cores' tile."""
        return self.heads * self.queries


@dataclass(frozen=True)
class KVMerge(KernelSpec):
    """Partial attentions of ranges of tokens, added in order with their weights, and divided by the sum of these."""

    template: ClassVar[str] = "kv_merge"
    width: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width not in WIDTHS:
            raise ValueError(f"{self}: heads of {self.width} channels; there are kernels for {WIDTHS}")


@dataclass(frozen=True)
class KVWrite(_Cached):
    """Codes of new tokens: scale = (max - min) / (2^bits - 1) of a token's [D], with an integer zero point.

    Attributes:
        many: any count of tokens, a page of values at a time; else one token.
    """

    template: ClassVar[str] = "kv_write"
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16", "fp16", "fp32")
    exact: ClassVar[bool] = True
    many: bool = False


@dataclass(frozen=True)
class KVRead(_Cached):
    """All keys and values of a cache, dequantized: (code - zero point) scale, rounded once."""

    template: ClassVar[str] = "kv_read"
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16", "fp16", "fp32")
