"""Launch sizes that were measured on this machine, before those of the table.

A JSON file in the user's cache: (GPU, version of triton, kernel, shape of the weight, regime of rows) -> the launch and
its microseconds; and of whole products the microseconds of every way (measured_times.py). `qcompile kernels tune` writes it.
Candidates are compiled and looked at first (compile_kernels.py), so that a GPU's time goes only to those that do not spill and
use its tensor cores.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.jit import cache_folder
from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW
from qcompile.codegen.triton.launch.tiles import Launch, launch_of, regime

Product = GemmW | Gemm8


def file() -> Path:
    """Where the measurements are."""
    return cache_folder() / "tuned.json"


@functools.lru_cache(maxsize=4096)
def key(gpu: Gpu, spec: Product, n: int, k: int, rows: int) -> str:
    """What a measurement holds for: a product with or without parts and an epilogue."""
    import triton

    bare = dataclasses.replace(spec, bias=False, residual=False, low_rank=0, parts=False)
    return f"{gpu.name} | triton {triton.__version__} | {bare} | {n}x{k} | {regime(rows)} rows"


def launch_for(gpu: Gpu, spec: Product, n: int, k: int, rows: int) -> Launch:
    """The measured launch of a product with a weight [n, k]; else the table's."""
    found = entry(lambda: key(gpu, spec, n, k, rows))
    return launch_of(spec, rows, gpu.capability) if found is None else Launch(**found["launch"])


def entry(key: Callable[[], str]) -> dict[str, Any] | None:
    """What was measured under a key, which is not asked for where there is no measurement at all.

    Every product asks, so the file is read once: what another process measures holds from the next start.
    """
    known = _known(os.environ.get("QCOMPILE_CACHE"), os.environ.get("XDG_CACHE_HOME"))
    return known.get(key()) if known else None


@functools.lru_cache(maxsize=4)
def _known(*folders: str | None) -> dict[str, Any]:
    return _read()


def _read() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file().read_text())
    except FileNotFoundError:
        return {}
    return found


def remember(key: str, launch: Launch, microseconds: float) -> None:
    """Keep the fastest launch of a product."""
    write(key, dict(launch=asdict(launch), microseconds=microseconds))


def write(key: str, found: dict[str, Any]) -> None:
    """Write one measurement; the file is replaced whole."""
    path, known = file(), _read() | {key: found}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as out:
        json.dump(known, out, indent=1, sort_keys=True)
    os.replace(out.name, path)
    _known.cache_clear()


def candidates(spec: Product, rows: int, capability: tuple[int, int]) -> Iterator[Launch]:
    """The table's launch first, then tiles of at most the regime's rows."""
    first = launch_of(spec, rows, capability)
    yield first
    for tile, channels, warps, stages in itertools.product((16, 32, 64, 128), (64, 128), (4, 8), (2, 3, 4, 5)):
        launch = Launch(tile, channels, warps, stages)
        if tile <= regime(rows) and channels * tile >= warps * 256 and launch != first:
            yield launch


def sound(
    spec: Product, launches: Iterable[Launch], capability: tuple[int, int], problems: Callable[..., list[str]]
) -> list[Launch]:
    """Those that compile without complaint; `problems(spec, launch, architecture)` says what is wrong with one."""
    architecture = capability[0] * 10 + capability[1]
    return [launch for launch in launches if not problems(spec, launch, architecture)]


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
