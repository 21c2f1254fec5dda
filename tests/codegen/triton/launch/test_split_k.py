"""Split-K by the model: work for every multiprocessor, and never more ranges than pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.codegen.triton.launch.split_k import SPLITS, seconds, split_k_of
from qcompile.codegen.triton.launch.tiles import Launch, tiles_of

NARROW, TALL = Launch(16, 128, 4, 4), Launch(128, 128, 8, 3)


@pytest.mark.parametrize(
    "m,n,steps,launch,least,most",
    [
        (1, 4096, 32, NARROW, 4, 16),  # 32 tiles for 132 multiprocessors
        (1, 4096, 112, NARROW, 4, 16),
        (128, 4096, 112, TALL, 2, 16),  # a tall GEMM of 32 tiles needs it as well
        (4096, 4096, 32, TALL, 1, 1),  # 1024 tiles
        (16, 65536, 32, NARROW, 1, 1),  # 512 tiles
        (16, 64, 1, NARROW, 1, 1),  # one step cannot be split
    ],
)
def test_few_tiles_are_split_and_many_are_not(m, n, steps, launch, least, most):
    assert least <= split_k_of(m, n, steps, 4, 2, launch, 132) <= most


@given(st.integers(1, 512), st.integers(64, 16384), st.integers(1, 128), st.sampled_from([NARROW, TALL]))
def test_the_chosen_number_has_the_least_predicted_time(m, n, steps, launch):
    chosen = split_k_of(m, n, steps, 4, 2, launch, 132)
    possible = [s for s in SPLITS if s == 1 or steps // s >= 2]
    assert chosen in possible
    times = {s: seconds(m, n, steps, 4, 2, launch, 132, s) for s in possible}
    assert times[chosen] == min(times.values())


def test_a_smaller_gpu_is_filled_sooner():
    assert split_k_of(128, 4096, 112, 4, 2, TALL, 20) < split_k_of(128, 4096, 112, 4, 2, TALL, 132)


def test_the_time_is_that_of_the_busiest_multiprocessor():
    """133 tiles on 132 multiprocessors take as long as 264; 132 take less, by what no wait covers."""
    one, two, full = (seconds(128, 128 * t, 64, 8, 1, TALL, 132, 1) for t in (132, 133, 264))
    assert tiles_of(128, 128 * 133, TALL) == 133 and two == full and two / 2 < one < two


def test_partial_sums_cost_their_bytes_and_a_second_kernel():
    alone = Launch(128, 128, 8, 3)
    whole, split = (seconds(256, 128 * 66, 64, 8, 1, alone, 132, s) for s in (1, 2))
    assert split > whole / 2 + 2e-6
