"""Launches that were measured on this GPU, before those of the table.

A JSON file in the user's cache: (GPU, version of triton, kernel, shape of the weight, regime of M) -> the launch and
its microseconds; and of whole linear layers the microseconds of every variant (measured_times.py). `qcompile kernels
tune` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.jit import cache_folder
from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW
from qcompile.codegen.triton.launch.tiles import Launch, launch_of, m_regime

Gemm = GemmW | Gemm8

_FORGET: list[Callable[[], None]] = []  # what was decided by measurements that are no longer the latest
_SIZES = {field.name for field in dataclasses.fields(Launch)}


def file() -> Path:
    """Where the measurements are."""
    return cache_folder() / "tuned.json"


@functools.lru_cache(maxsize=4096)
def key(gpu: Gpu, spec: Gemm, n: int, k: int, m: int) -> str:
    """What a measured launch holds for: a GEMM with or without split-K and an epilogue."""
    import triton

    bare = dataclasses.replace(spec, bias=False, residual=False, low_rank=0, parts=False)
    return f"{gpu.name} | triton {triton.__version__} | {bare} | {n}x{k} | {m_regime(m)} rows"


def launch_for(gpu: Gpu, spec: Gemm, n: int, k: int, m: int) -> Launch:
    """The measured launch of a GEMM with a weight [N, K]; else the table's.

    An entry that names other sizes than a Launch has counts as not measured.
    """
    found = entry(lambda: key(gpu, spec, n, k, m))
    if found is None or found["launch"].keys() != _SIZES:
        return launch_of(spec, m, gpu.capability)
    return Launch(**found["launch"])


def entry(key: Callable[[], str]) -> dict[str, Any] | None:
    """What was measured under a key, which is not computed where there is no measurement at all.

    Every GEMM looks here, so the file is read once: what another process measures holds from the next start.
    """
    known = _known(os.environ.get("QCOMPILE_CACHE"), os.environ.get("XDG_CACHE_HOME"))
    return known.get(key()) if known else None


@functools.lru_cache(maxsize=4)
def _known(*folders: str | None) -> dict[str, Any]:
    return _read()


def _read() -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(file().read_text())
    except FileNotFoundError:
        return {}
    return known


def remember_launch(key: str, launch: Launch, microseconds: float) -> None:
    """Keep the fastest launch of a GEMM."""
    write(key, dict(launch=asdict(launch), microseconds=microseconds))


def write(key: str, found: dict[str, Any]) -> None:
    """Write one measurement; the file is replaced atomically."""
    path, known = file(), _read() | {key: found}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as out:
        json.dump(known, out, indent=1, sort_keys=True)
    os.replace(out.name, path)
    _known.cache_clear()
    for forget in _FORGET:
        forget()


def after_a_measurement(forget: Callable[[], None]) -> Callable[[], None]:
    """Register what forgets decisions that measurements led to; returns it."""
    _FORGET.append(forget)
    return forget
