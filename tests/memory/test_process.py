"""Peak memory of a block, where the system tells it."""

from __future__ import annotations

import sys

import pytest
import torch

from qcompile.memory import process
from qcompile.memory.process import (
    large_blocks_returned,
    measure_peak,
    peak_resident_bytes,
    release_freed_memory,
    resident_bytes,
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_what_a_block_had_at_most():
    before = resident_bytes()
    assert before > 0 and resident_bytes("VmHWM") >= before
    with measure_peak() as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8)  # freed at once
        release_freed_memory()
        torch.ones(2**20, dtype=torch.uint8)
    assert 60 * 2**20 < peak.bytes < 300 * 2**20


def test_without_proc_the_peak_is_zero(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "_CLEAR", tmp_path / "no" / "clear_refs")
    with measure_peak() as peak:
        pass
    assert peak.bytes == 0


def test_the_peak_of_the_process_is_zero_where_nothing_measures_it(monkeypatch):
    if sys.platform != "win32":
        torch.ones(2**20, dtype=torch.uint8)
        assert 50 * 2**20 < peak_resident_bytes() < 2**40
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_resident_bytes() == 0


def test_a_system_that_opens_no_library_without_a_name_is_no_error(monkeypatch):
    def refuse(name):
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr(process.ctypes, "CDLL", refuse)
    release_freed_memory()


def test_large_blocks_are_returned_while_a_block_runs(monkeypatch):
    """And the C library's own limit is back afterwards, whatever happens."""
    limits = []
    monkeypatch.setattr(process, "_set_map_threshold", limits.append)
    with pytest.raises(KeyError), large_blocks_returned(1 << 21):
        assert limits == [1 << 21]
        raise KeyError
    assert limits == [1 << 21, 1 << 25]


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_block_above_the_limit_is_mapped_by_itself():
    """What is freed goes to the system at once, also from below what the C library would keep."""
    with large_blocks_returned():
        blocks = [torch.ones(8 * 2**20, dtype=torch.uint8) for _ in range(20)]
        full = resident_bytes()
        del blocks[::2]
        assert full - resident_bytes() > 60 * 2**20
