"""How many ranges of K a GEMM is split into: the number with the least time by a model of the GPU.

A GEMM of small M has fewer tiles than a GPU has multiprocessors, so that most of them would wait; more ranges give
work to all. What a range costs: its partial sums are written and read once more through the second cache, and a second
kernel adds them. The model counts, for each number of ranges,

    time = programs of the busiest multiprocessor x steps of a range x time of a step + time of the second kernel

where a step takes as long as its slower half, the bytes of both tiles or their multiplications, and no less than a
program that is alone on its multiprocessor, which also waits for the memory. Bytes and rates are those of a GPU of
Hopper's kind; what is measured (`qcompile kernels tune`) replaces the sizes of the tiles, not the number of ranges.
"""

from __future__ import annotations

import functools

from qcompile.codegen.triton.launch.tiles import Launch, tiles_of

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
CLOCK = 1.755e9  # Hz, of a multiprocessor
CACHE_BYTES = 24  # that the second cache gives a multiprocessor in a cycle: 5.5 TB/s for 132
MULTIPLY_ADDS = {1: 4096, 2: 2048}  # of a multiprocessor in a cycle, by bytes of a value of x
WAIT = 250  # cycles of a step that a program alone on its multiprocessor waits for memory
SECOND_KERNEL = 2e-6  # seconds: its launch in a CUDA graph, its start and its end


@functools.lru_cache(maxsize=4096)
def split_k_of(
    m: int, n: int, steps: int, step_bits: int, x_bytes: int, launch: Launch, multiprocessors: int, tiles: int = 0
) -> int:
    """The number of ranges of K that are summed apart.

    Args:
        m: rows of x.
        n: output channels.
        steps: of a program's loop over the whole K, of 128 columns each.
        step_bits: bits of a weight's code.
        x_bytes: bytes of a value of x.
        launch: tile sizes.
        multiprocessors: of the GPU.
        tiles: of the output, where its rows are of several experts; 0 counts those of [M, N].
    """
    tiles = tiles or tiles_of(m, n, launch)
    return min(
        (split for split in SPLITS if split == 1 or steps // split >= 2),
        key=lambda split: (seconds(m, n, steps, step_bits, x_bytes, launch, multiprocessors, split, tiles), split),
    )


def seconds(
    m: int, n: int, steps: int, step_bits: int, x_bytes: int, launch: Launch, multiprocessors: int, split: int,
    tiles: int = 0,
) -> float:  # fmt: skip
    """The predicted time of a GEMM of so many ranges; arguments as of split_k_of."""
    tiles = tiles or tiles_of(m, n, launch)
    together = -(-tiles * split // multiprocessors)  # programs of the busiest multiprocessor
    tile_bytes = 128 * (launch.block_n * step_bits / 8 + launch.block_m * x_bytes)
    products = launch.block_m * launch.block_n * 128
    step = max(tile_bytes / CACHE_BYTES, products / MULTIPLY_ADDS[x_bytes])
    time = -(-steps // split) * max(together * step, step + WAIT) / CLOCK
    if split > 1:  # float32 or int32, written and read
        time += SECOND_KERNEL + 8 * split * m * n / (CACHE_BYTES * multiprocessors * CLOCK)
    return time
