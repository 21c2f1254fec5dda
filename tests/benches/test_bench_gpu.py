"""benches/gpu.py without a GPU: every line of it but the clock and the CUDA graphs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from stand_in import StandIn
from zoo import build

from qcompile.codegen.triton.tuning.gemm_benchmark import GemmComparison, GemmTiming, Timed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a GPU that is there")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    import gpu

    small = dict(RESULTS=tmp_path, SHAPES=[(128, 48)], ROWS=[1, 20], RECIPES=["int8"], CACHE=16, CALLS=1, ROUNDS=2,
                 WORK=[("decode", 2), ("prompt", 16)])  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "TimedGpu", StandIn)
    return gpu


@pytest.mark.exhaustive  # compiles models by Inductor
def test_both_parts_are_written_and_printed(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu.py", "all", "1"])
    real = bench.run_model
    monkeypatch.setattr(bench, "run_model", lambda *args: real(*args, 256))
    bench.main()
    text = capsys.readouterr().out
    products, model = (json.loads((tmp_path / f"gpu_{part}.json").read_text()) for part in ("products", "model"))
    assert [row["m"] for row in products["rows"]] == [1, 20] and products["after"] == {"gpu": "stand-in"}
    assert model["before"] == {"gpu": "stand-in"} and model["layers"] == 1
    assert [row["work"] for row in model["rows"]] == ["decode, batch 2", "prompt of 16"]
    for row in model["rows"]:
        assert set(row["times"]) == {"Inductor bf16", "qcompile int8"} and not row["absent"]
        assert all(one["microseconds"] > 0 for one in row["times"].values())
    assert any("int8" in str(graph["kernels"]) for graph in model["kernels"])
    for word in ("a copy moves", "GemLite is not installed", "tokens a second", "prompt of 16", "not measured (target"):
        assert word in text, word
    assert not list(tmp_path.glob("*.part"))


def test_an_interruption_loses_nothing(bench, monkeypatch, tmp_path):
    """The second row is never finished; the first is in the file."""
    real, readings = bench.compare_gemms, itertools.chain([1.0] * 7, [KeyboardInterrupt()])

    class Interrupted(StandIn):
        def timer(self, call, copies):
            value = next(readings)
            if isinstance(value, BaseException):
                raise value
            return super().timer(call, copies)

    monkeypatch.setattr(bench, "compare_gemms", lambda *args, **kwargs: real(*args, rounds=2, **kwargs))
    with pytest.raises(KeyboardInterrupt):
        bench.run_products(bench.Console(), Interrupted(), tmp_path)
    assert [row["m"] for row in json.loads((tmp_path / "gpu_products.json").read_text())["rows"]] == [1]


def test_a_candidate_that_fails_and_time_that_is_up(bench, monkeypatch):
    model, device = build("llama").bfloat16(), torch.device("cpu")
    monkeypatch.setattr(bench, "candidates", lambda *_: {
        bench.INDUCTOR: model, "qcompile bad": lambda **_: (_ for _ in ()).throw(RuntimeError("no kernel\nimage")),
    })  # fmt: skip
    kept = []
    monkeypatch.setattr(bench.time, "monotonic", itertools.count(step=60).__next__)
    monkeypatch.setattr(bench, "WORK", [("prompt", 16), ("prompt", 8)])
    rows = bench.time_model(model, [], device, rounds=2, keep=lambda rows: kept.append(len(rows)), seconds=130)
    assert kept == [1] and rows[0]["absent"] == {"qcompile bad": "RuntimeError: no kernel"}
    assert list(rows[0]["times"]) == [bench.INDUCTOR] and set(rows[1]["absent"].values()) == {"out of time"}
    columns = [list(column.cells) for column in bench.table_of(rows).columns]
    assert columns[2] == ["-", "-"] and columns[1][1] == "-"
    with pytest.raises(AssertionError, match="overflow"):
        bench.time_model(None, [], device, rounds=20)


def test_time_that_is_up_within_a_row_leaves_what_was_measured(bench, monkeypatch):
    """The baseline and the first recipe fit; the second would begin too late."""
    model, device = build("llama").bfloat16(), torch.device("cpu")
    monkeypatch.setattr(bench, "candidates", lambda *_: dict.fromkeys([bench.INDUCTOR, "a", "b"], model))
    monkeypatch.setattr(bench, "WORK", [("prompt", 16)])
    monkeypatch.setattr(bench.time, "monotonic", itertools.count(step=40).__next__)
    (row,) = bench.time_model(model, [], device, rounds=2, seconds=90)
    assert list(row["times"]) == [bench.INDUCTOR, "a"] and row["absent"] == {"b": "out of time"}


def test_auto_is_what_it_chooses_and_not_timed_twice(bench):
    model, device = build("llama").bfloat16(), torch.device("cpu")
    chosen = bench.candidates(model, ["auto"], device)
    assert len(chosen) == 2 and list(chosen)[0] == bench.INDUCTOR and list(chosen)[1].endswith("(auto)")
    name = list(chosen)[1].removeprefix("qcompile ").removesuffix(" (auto)")
    assert list(bench.candidates(model, [name, "auto"], device)) == [bench.INDUCTOR, f"qcompile {name}"]


def test_targets_are_compared_with_the_lowest(bench):
    import gpu_targets

    def row(m, k, n, w4a16, a8, spread=0.0):
        times = {"cuBLAS bf16": Timed(10.0, 0.0, 1), "qcompile w4a16": Timed(10 / w4a16, spread, 70)}
        return GemmTiming(m, k, n, times | {f"qcompile {kind}": Timed(10 / a8, 0.0, 1) for kind in ("int8", "fp8")})

    found = GemmComparison({}, [
        row(1, 4096, 4096, 2.5, 1.6), row(16, 4096, 4096, 1.9, 2.0), row(1, 4096, 14336, 3.0, 1.4),
        row(64, 14336, 4096, 2.5, 1.5, spread=0.2), row(2048, 4096, 4096, 0.95, 1.7),
    ], Timed(10.0, 0.0, 300))  # fmt: skip
    columns = [list(column.cells) for column in gpu_targets.gemm_table(found).columns]
    assert columns[0] == ["1-16", "17-32", "33-64", "65-128", "129-1024", ">= 1025"]
    assert columns[1][0] == "[red]1.90[/] (target 2.0)" and columns[1][5] == "[green]0.95[/] (target 0.9)"
    assert columns[1][1] == "not measured (target 1.9)" and columns[2][2] == "? (target 2.0)"
    assert columns[2][0] == "[green]3.00[/] (target 2.7)" and columns[3][0] == "[red]1.40[/] (target 1.5)"
    assert columns[4][0] == "not measured (target 1.0)"
    assert columns[-1][0] == "[red]0.70[/] (target 0.7)" or columns[-1][0] == "[green]0.70[/] (target 0.7)"
    faster = dict(work="decode, batch 1", tokens=1,
                  times={bench.INDUCTOR: Timed(24.0, 0, 0), "qcompile w4a16": Timed(10.0, 0, 0)})  # fmt: skip
    cells = list(gpu_targets.model_table([faster], bench.times_inductor).columns[2].cells)
    assert cells == ["[green]2.40[/] (target 2.3)", "not measured (target 1.3)"]


def test_a_gpu_is_needed(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.TimedGpu, "available", False)
    for arguments, words in (([], "no GPU here"), (["prodcts"], "python benches/gpu.py")):
        monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit, match=words):
            bench.main()
    assert not list(tmp_path.iterdir())
