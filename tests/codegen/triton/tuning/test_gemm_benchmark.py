"""How kernels are timed and compared, without a GPU: all runs but the clock and the CUDA graph."""

from __future__ import annotations

import itertools
import json

import pytest
from kernel_cases import DEVICE  # also gives the interpreter a correct bfloat16
from stand_in import StandIn

from qcompile.codegen.triton.tuning import baselines, gemm_benchmark
from qcompile.codegen.triton.tuning.gemm_benchmark import (
    GemmComparison,
    GemmTiming,
    Timed,
    compare_gemms,
    copies_of,
    interleaved,
    ratio,
)

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in for a GPU that is there"),
    pytest.mark.usefixtures("own_cache"),
]


def test_timers_are_interleaved_and_the_first_round_does_not_count():
    order = []

    def timer(name, values):
        rest = iter(values)
        return lambda: (order.append(name), next(rest))[1]

    timers = {"a": (timer("a", [99.0, 1, 2, 3]), 1000), "b": (timer("b", [99.0, 4, 4, 4]), 500)}
    found = interleaved(timers, rounds=3)
    assert order == ["a", "b"] * 4
    assert found["a"].microseconds == 2 and found["b"] == Timed(4, 0.0, 500)
    assert found["b"].bandwidth == 125e6
    assert ratio(found["b"], found["a"]) is None  # a varied too much
    assert ratio(Timed(2, 0.01, 1), Timed(5, 0.01, 1)) == 2.5
    assert copies_of(8_700_000, 60_000_000) == 28 and copies_of(10**9, 60_000_000) == 2


def test_a_comparison_times_all_that_is_here_and_names_what_is_not(tmp_path):
    kept, path = [], tmp_path / "deep" / "out.json"

    def keep(found):
        found.write(path)
        kept.append(len(json.loads(path.read_text())["rows"]))

    microseconds = itertools.chain([2.0], itertools.cycle([10.0, 5.0, 4.0, 4.0, 20.0, 20.0]))
    found = compare_gemms([(128, 48)], [2, 20], rounds=2, timed_gpu=StandIn(microseconds), keep=keep)
    decode, prefill = found.rows
    assert kept == [1, 2] and (decode.m, decode.k, decode.n) == (2, 128, 48)
    ours = ["cuBLAS bf16", "qcompile w4a16", "qcompile int8", "qcompile fp8"]
    assert list(prefill.times) == [*ours, "torch._int_mm", "torch._scaled_mm"]
    assert set(decode.absent) == {"torch._weight_int4pack_mm", "torch._int_mm", "GemLite w4a16"}
    assert "more than 16 rows" in decode.absent["torch._int_mm"] and "not installed" in decode.absent["GemLite w4a16"]
    assert prefill.ratio("qcompile w4a16") == 2.0 and prefill.ratio("GemLite w4a16") is None
    # what w4a16 moves: half a byte a weight, one word of scale and zero point for 128, x and the result
    assert decode.times["qcompile w4a16"].nbytes == 48 * 64 + 48 * 4 + 2 * 2 * (128 + 48)
    text = json.loads(path.read_text())
    assert text["before"] == {"gpu": "stand-in"} == text["after"] and text["copy"]["microseconds"] == 2.0
    cells = [list(column.cells) for column in found.table().columns]
    assert cells[0] == ["128x48"] * 2 and cells[1] == ["2", "20"]
    share = decode.times["qcompile w4a16"].bandwidth / found.copy.bandwidth
    assert cells[3][0] == f"5.0 (2.00x {share:.0%})" and cells[2][0] == "10.0 (1.00x)"
    assert any(note.startswith("GemLite w4a16: NotAvailable") for note in found.notes())


def test_what_fails_leaves_a_note_and_stops_no_other(monkeypatch):
    def broken(*_):
        raise RuntimeError("illegal\nmemory")

    monkeypatch.setattr(baselines, "linear_w", broken)
    found = compare_gemms([(128, 32)], [1], rounds=2, timed_gpu=StandIn())
    assert found.rows[0].absent["qcompile w4a16"] == "RuntimeError: illegal" and "qcompile fp8" in found.rows[0].times


def test_time_that_is_up_is_said(monkeypatch):
    clock = itertools.count(step=50)
    monkeypatch.setattr(gemm_benchmark.time, "monotonic", lambda: next(clock))
    found = compare_gemms([(128, 32)], [1, 2, 3], rounds=2, timed_gpu=StandIn(), seconds=75)
    assert [row.m for row in found.rows] == [1] and found.late == ["128x32, 2 rows", "128x32, 3 rows"]
    assert "not measured, out of time: 128x32, 3 rows" in found.notes()


def test_no_ratio_where_the_gpu_was_not_quiet():
    row = GemmTiming(1, 128, 32, {"cuBLAS bf16": Timed(10, 0.2, 1), "qcompile int8": Timed(5, 0.0, 1)})
    found = GemmComparison({}, [row], Timed(1, 0, 1))
    assert row.ratio("qcompile int8") is None and "5.0 (? " in list(found.table().columns[3].cells)[0]
