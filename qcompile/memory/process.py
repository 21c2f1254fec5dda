"""Memory of the process: giving freed pages back, and the peak during a block of code."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_M_MMAP_THRESHOLD = -3
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


@contextmanager
def large_blocks_returned(size: int = 1 << 22) -> Iterator[None]:
    """Have every block of memory of `size` bytes or more returned to the system when it is freed, while the block runs.

    The C library maps large blocks by themselves, but raises its limit to 32 MB as they are freed; what is smaller goes
    to a heap that only grows. Elsewhere than with glibc nothing changes.
    """
    _set_map_threshold(size)
    try:
        yield
    finally:
        _set_map_threshold(1 << 25)  # what the limit rises to by itself


def _set_map_threshold(size: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


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


def available_bytes() -> int:
    """Memory that this process can still take: what the system has free, at most what its control group allows."""
    free = _system_free()
    for limit, usage in _CGROUPS:
        try:
            allowed = int(Path(limit).read_text()) - int(Path(usage).read_text())
        except (OSError, ValueError):  # no such control group, or no limit ("max")
            continue
        free = min(free, max(allowed, 0))
    return free


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _system_free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**62
