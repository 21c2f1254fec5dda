"""Memory of the process: giving freed pages back, and the peak during a block of code."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """The peak of a block.

    Attributes:
        bytes: resident bytes above those at the start, set when the block ends; 0 where it cannot be measured.
    """

    bytes: int = 0


def release_freed_memory() -> None:
    """Return freed pages to the system, where the C library can.

    Many tensors of some MB with different lifetimes leave a heap full of holes that malloc keeps.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows opens no library without a name
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process in bytes ("VmHWM": its high-water mark).

    Raises:
        OSError: the system has no /proc (it is not Linux).
    """
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def peak_resident_bytes() -> int:
    """The most resident memory that this process ever had, in bytes; 0 where it cannot be measured (Windows)."""
    try:
        import resource  # Unix only
    except ModuleNotFoundError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def measure_peak() -> Iterator[PeakMemory]:
    """Measure the peak memory of the block; `bytes` is set when it ends. Linux only: elsewhere it stays 0."""
    peak = PeakMemory()
    gc.collect()
    release_freed_memory()  # what was freed before must not hide what is allocated now
    try:
        _CLEAR.write_text("5")  # reset the high-water mark
        start = resident_bytes()
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = max(0, resident_bytes("VmHWM") - start)
