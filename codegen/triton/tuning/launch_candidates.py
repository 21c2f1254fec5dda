"""Launches that are worth timing, and the fastest of them.

Candidates are compiled and looked at first (aot/compile_kernels.py), so that a GPU's time goes only to those that do
not spill and use its tensor cores.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

from qcompile.codegen.triton.aot.compile_kernels import compile_kernel, complaints
from qcompile.codegen.triton.launch.tiles import Launch, launch_of, m_regime
from qcompile.codegen.triton.launch.tuning_cache import Gemm

FindProblems = Callable[[Gemm, Launch, int], list[str]]
"""find_problems(spec, launch, architecture): what is wrong with a launch."""


def candidates(spec: Gemm, m: int, capability: tuple[int, int]) -> Iterator[Launch]:
    """The table's launch first, then those with a block_m of at most M's regime."""
    first = launch_of(spec, m, capability)
    yield first
    for sizes in itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4, 5)):
        launch = Launch(*sizes)
        fills_warps = launch.block_m * launch.block_n >= launch.num_warps * 256
        if launch.block_m <= m_regime(m) and fills_warps and launch != first:
            yield launch


def without_problems(
    spec: Gemm, launches: Iterable[Launch], capability: tuple[int, int], find_problems: FindProblems
) -> list[Launch]:
    """Those launches that compile to what they should."""
    architecture = capability[0] * 10 + capability[1]
    return [launch for launch in launches if not find_problems(spec, launch, architecture)]


def problems_by_compiling(spec: Gemm, launch: Launch, architecture: int) -> list[str]:
    """What is wrong with a launch, found by compiling it once, whatever shapes and rows it is a candidate for."""
    try:
        return list(_complaints(spec, launch, architecture))
    except Exception as error:  # the compiler raises whatever it likes
        return [str(error)]


@functools.cache
def _complaints(spec: Gemm, launch: Launch, architecture: int) -> tuple[str, ...]:
    return tuple(complaints(spec, architecture, compile_kernel(spec, launch, architecture)))


def fastest(launches: list[Launch], time: Callable[[Launch], float]) -> tuple[Launch, float]:
    """The launch with the least time; the first of equals.

    Raises:
        ValueError: there is none to choose from.
    """
    if not launches:
        raise ValueError("no launch compiles without spilling or losing its body: nothing to time")
    times = {launch: time(launch) for launch in launches}
    best = min(times, key=times.__getitem__)
    return best, times[best]
