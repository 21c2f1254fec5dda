"""Memory of the process: giving freed pages back, and the peak during a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def release_freed_memory() -> None:
    """Return freed pages to the system, where the C library can.

    Many tensors of some MB with different lifetimes leave a heap full of holes that malloc keeps.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """Bytes above what was held at the start; 0 where it cannot be known."""

    bytes = 0


def held(name: str = "VmRSS") -> int:
    """Bytes that this process holds ("VmHWM": held at most). Linux only: 0 elsewhere."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def measure_peak() -> Iterator[Peak]:
    """Measure the block; `peak.bytes` is set when it ends. Linux only: elsewhere it stays 0."""
    peak = Peak()
    gc.collect()
    release_freed_memory()  # what was freed before must not hide what is taken now
    try:
        _CLEAR.write_text("5")  # forget the high-water mark of before
        start = held()
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = max(0, held("VmHWM") - start)
