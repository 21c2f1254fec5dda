"""Run the kernels of a quantized KV cache: write new tokens, and attend to all of them from a few positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.attention_spec import KVDecode, KVMerge, KVRead, KVWrite
from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.jit import kernel
from qcompile.codegen.triton.kernels.spec import Dtype, KernelSpec
from qcompile.codegen.triton.launch.gemm import gpu
from qcompile.codegen.triton.launch.kernel_call import INTERPRETED
from qcompile.codegen.triton.launch.tiles import Launch, compiler_options
from qcompile.numerics.kv_words import PAGE, TRIP

ROWS = 8  # rows of q in a program
DECODE, MERGE, READ = Launch(ROWS, 1, 4, 2), Launch(1, 1, 4, 1), Launch(1, 1, 4, 1)
_INPUTS: dict[torch.dtype, Dtype] = {**NAMES, torch.float32: "fp32"}
_TOGETHER = 4  # programs of kv_decode that share a multiprocessor (aot/budget.json)
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class KVBuffers:
    """A cache [B, H, T] of heads of a width D, as kv_words.py draws it.

    Attributes:
        keys: int16 words.
        key_scales: int32 words [B, H, T].
        values: int16 words.
        value_scales: int32 words [B, H, T].
        length: int64 [], tokens that are there; read by the kernels, so that nothing waits for the GPU.
        bits: of a code, 4 or 8.
    """

    keys: Tensor
    key_scales: Tensor
    values: Tensor
    value_scales: Tensor
    length: Tensor
    bits: int

    @property
    def width(self) -> int:
        """D."""
        return self.keys.shape[-1] * 16 // self.bits

    @property
    def heads(self) -> int:
        """B H."""
        return self.keys.shape[0] * self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """T."""
        return self.keys.shape[2]

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Of the kernels, by name."""
        names = "keys", "key_scales", "values", "value_scales", "length"
        return {name: getattr(self, name) for name in names}


def write_tokens(cache: KVBuffers, keys: Tensor, values: Tensor) -> None:
    """Quantize new tokens into the buffers behind `length`, which stays; tokens beyond the capacity are not written.

    Args:
        cache: written in place.
        keys: [B, H, N, D] bf16, fp16 or float32.
        values: of the same shape and dtype.
    """
    tokens = keys.shape[2]
    if not tokens or not cache.heads:
        return
    spec = KVWrite(_INPUTS[keys.dtype], cache.bits, cache.width, many=tokens > 1)
    grid = (cache.heads, -(-(tokens - 1) // PAGE) + 1) if tokens > 1 else (cache.heads,)
    new = dict(new_keys=keys.contiguous(), new_values=values.contiguous())
    _run(spec, grid, write_launch(spec), **new, **cache.arguments, capacity=cache.capacity, N=tokens)


def read_tokens(cache: KVBuffers, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All keys and values [B, H, T, D], dequantized.

    Args:
        cache: read to its end, whatever the length.
        dtype: of the result: bf16, fp16 or float32.
    """
    shape = (*cache.keys.shape[:3], cache.width)
    keys, values = (torch.empty(shape, dtype=dtype, device=cache.keys.device) for _ in range(2))
    if keys.numel():
        spec, grid = KVRead(_INPUTS[dtype], cache.bits, cache.width), (cache.heads, cache.capacity // PAGE)
        _run(spec, grid, READ, read_keys=keys, read_values=values, capacity=cache.capacity, **cache.arguments)
    return keys, values


def attend(
    query: Tensor,
    cache: KVBuffers,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    splits: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of the last positions of a cache to all of its tokens up to their own.

    Args:
        query: [B, H heads, N, D] bf16 of the last N tokens of the cache.
        cache: of H heads.
        scale: of the scores.
        window: tokens that a position sees, 0 for all.
        cap: scores are cap tanh(score / cap); 0 for none.
        splits: ranges of tokens that are attended to apart; 0 takes as many as fill the GPU.
        mask: float32 [B, N, T], added to scaled scores; None: a position sees those before it. Not with a window.

    Returns:
        [B, H heads, N, D] bf16.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    parts, weights = attend_in_parts(query, cache, scale, window, cap, splits, mask)
    splits, rows, width = parts.shape
    spec = KVMerge(NAMES[query.dtype], width)
    _run(spec, (rows,), MERGE, parts=parts, weights=weights, out=out, N=rows, splits=splits)
    return out


def attend_in_parts(
    query: Tensor, cache: KVBuffers, scale: float, window: int, cap: float, splits: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of ranges of tokens, float32 [splits, rows, D], and largest score and sum of weights, [splits, rows, 2].

    Scores are in units of log 2, weights are 2 to the power of a score less the largest of its range. Arguments are
    those of `attend`, rows those of the query one below the other.
    """
    heads, queries, width = query.shape[0] * query.shape[1] // cache.heads, query.shape[2], query.shape[3]
    spec = KVDecode(NAMES[query.dtype], cache.bits, width, heads, queries, window > 0, cap > 0, mask is not None)
    blocks, rows = -(-spec.rows // ROWS), cache.heads * spec.rows
    splits = splits or splits_of(
        cache.heads * blocks, window + queries if window else cache.capacity, gpu(query.device)
    )
    parts = torch.empty(splits, rows, width, dtype=torch.float32, device=query.device)
    weights = torch.empty(splits, rows, 2, dtype=torch.float32, device=query.device)
    factor = scale if cap else scale * _LOG2_E
    _run(
        spec, (cache.heads, splits, blocks), DECODE, q=query.contiguous(), out=parts, weights=weights,
        capacity=cache.capacity, factor=factor, window=window, cap=cap, **cache.arguments,
        **({} if mask is None else dict(mask=mask.contiguous(), H=cache.keys.shape[1])),
    )  # fmt: skip
    return parts, weights


def write_launch(spec: KVWrite) -> Launch:
    """A warp for a token; for a page as many as keep the values of its tokens in registers."""
    return Launch(1, 1, max(8, spec.width // 16) if spec.many else 1, 1)


def splits_of(programs: int, tokens: int, gpu: Gpu) -> int:
    """Ranges of tokens: as many as fill the GPU, none of less than four trips of the loop at full length.

    The length is known on the GPU only, so the capacity decides; ranges of a short cache are short, or empty.
    """
    return max(1, min(gpu.multiprocessors * _TOGETHER // programs, math.ceil(tokens / (4 * TRIP))))


def _run(spec: KernelSpec, grid: tuple[int, ...], launch: Launch, **arguments: Any) -> None:
    function = kernel(spec)
    names = function.arg_names
    own = {name: arguments[name] for name in names if name in arguments}
    own |= {"ASM": not INTERPRETED} if "ASM" in names else {}
    some = next(value for value in own.values() if isinstance(value, Tensor))
    with torch.cuda.device(some.get_device()):  # the current one may be another
        function[grid](**own, **compiler_options(spec, launch))
