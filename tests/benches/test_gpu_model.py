"""The model of a GPU: its laws, and every kernel that it predicts is one that is compiled ahead of time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    import gpu_model

    return gpu_model


def test_every_kernel_and_row_is_predicted(bench):
    found = bench.rows()
    assert len(found) == len(bench.CARDS) * len(bench.SHAPES) * len(bench.ROWS) * len(bench.KERNELS)
    assert all(row["microseconds"] > 2.7 and row["split_k"] >= 1 for row in found)


@pytest.mark.parametrize("kernel", ["w4a16", "w4a8", "int8", "fp8"])
def test_more_bandwidth_is_never_slower_and_more_work_never_faster(bench, kernel):
    for m in bench.ROWS:
        slow, fast = (bench.predicted(kernel, m, 4096, 14336, b).seconds for b in (2e12, 4e12))
        assert fast <= slow
        assert (
            bench.predicted(kernel, m, 4096, 4096, 3e12).seconds
            <= bench.predicted(kernel, m, 14336, 4096, 3e12).seconds
        )


def test_half_the_bytes_are_faster_where_memory_bounds(bench):
    four, eight = (bench.predicted(kernel, 1, 14336, 4096, 3e12) for kernel in ("w4a8", "int8"))
    assert four.bound == eight.bound == "memory" and four.seconds < 0.75 * eight.seconds


def test_bars_are_those_of_the_regime(bench):
    assert [bench.bar("w4a16", m, wide) for m, wide in ((1, False), (16, True), (17, False), (1024, True))] == [
        1.9, 2.6, 1.7, 0.8]  # fmt: skip
    assert bench.bar("int8", 512, False) is None and bench.bar("w4a8", 1, False) is None


def test_what_was_measured_stands_beside_it(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    assert bench.measured() == {}
    times = {"qcompile int8": dict(microseconds=4.0), "cuBLAS bf16": dict(microseconds=8.0)}
    (tmp_path / "gpu_products.json").write_text(json.dumps(dict(rows=[dict(k=4096, n=4096, m=1, times=times)])))
    assert bench.measured() == {(4096, 4096, 1, "int8"): 2.0}
    cells = [cell for column in bench.table_of(bench.rows()).columns for cell in column.cells]
    assert sum("measured 2.00" in cell for cell in cells) == len(bench.CARDS)


def test_the_committed_prediction_is_of_the_committed_kernels(bench):
    """After a change of the kernels: python benches/gpu_model.py --commit."""
    committed = json.loads((bench.RESULTS / "gpu_predicted.json").read_text())
    assert committed["rows"] == bench.rows()


def test_commit_writes(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", "--commit"])
    bench.main()
    assert json.loads((tmp_path / "gpu_predicted.json").read_text())["rows"] == bench.rows()
