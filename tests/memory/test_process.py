"""Peak memory of a block, where the system tells it."""

from __future__ import annotations

import sys

import pytest
import torch

from qcompile.memory import process
from qcompile.memory.process import measure_peak, release_freed_memory, resident_bytes


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
