"""The first contact with a GPU, without one: steps are processes of their own, and no end of one loses a finding."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    import first_contact

    monkeypatch.setattr(first_contact, "RESULTS", tmp_path / "found.jsonl")
    return first_contact


def python(bench, name, code, seconds=30.0):
    return bench.Step(name, seconds, [sys.executable, "-c", code])


def test_a_crash_and_a_hang_cost_one_step_and_no_finding(bench):
    found = []
    for step in (
        python(bench, "good", "print('{\"a\": 1}'); print('not a finding'); print('[1]')"),
        python(bench, "crash", "print('{\"b\": 2}', flush=True); import os; os.abort()"),
        python(bench, "hang", "print('{\"c\": 3}', flush=True); import time; time.sleep(60)", seconds=3.0),
    ):
        bench.run(step, found.append)
    by_step = {name: [f for f in found if f["step"] == name] for name in ("good", "crash", "hang")}
    assert [f.get("a") for f in by_step["good"]] == [1, None] and by_step["good"][1]["status"] == 0
    assert by_step["crash"][0]["b"] == 2 and by_step["crash"][1]["status"] != 0
    assert by_step["hang"][0]["c"] == 3 and "stopped after 3 s" in by_step["hang"][1]["status"]
    cells = list(bench.table_of(found).columns[1].cells)
    assert sum(cell.startswith("[red]") for cell in cells) == 2
    assert bench.table_of([dict(step="x", ok=False)]).columns[1]._cells[0].startswith("[red]")


def test_kernels_are_compiled_in_a_step_and_the_checkout_is_enough(bench, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = []
    code = "import os, json, qcompile, gpu_model; print(json.dumps({'x': 'TRITON_INTERPRET' in os.environ}))"
    bench.run(python(bench, "s", code, 120.0), found.append)
    assert found[0]["x"] is False, found


def test_steps_have_limits_and_names_of_their_own(bench):
    steps = bench.steps()
    assert len({step.name for step in steps}) == len(steps) and all(0 < step.seconds <= 150 for step in steps)
    assert [step.name for step in bench.chosen_steps(["gemm", "rows"])][-1] == "rows"
    assert list(bench.chosen_steps(["nothing"])) == []


def test_every_measuring_step_is_there(bench):
    import first_contact_steps

    for step in bench.steps():
        if step.command[1].endswith("first_contact_steps.py"):
            assert step.command[2] in first_contact_steps.STEPS


def test_without_a_gpu_nothing_is_written(bench, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["first_contact.py"])
    with pytest.raises(SystemExit, match="no NVIDIA GPU here"):
        bench.main()
    assert not bench.RESULTS.exists()
    monkeypatch.setattr("sys.argv", ["first_contact.py", "--list", "model"])
    bench.main()
    assert capsys.readouterr().out.count("model:") == 5
    monkeypatch.setattr("sys.argv", ["first_contact.py", "nonsense"])
    with pytest.raises(SystemExit, match="no step begins with nonsense; there are machine"):
        bench.main()


def test_findings_are_lines_of_the_file_as_soon_as_they_are_known(bench, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    both = [python(bench, "a", "print('{\"v\": 1}')"), python(bench, "b", "1 / 0")]
    monkeypatch.setattr(bench, "steps", lambda: both)
    monkeypatch.setattr("sys.argv", ["first_contact.py"])
    bench.main()
    lines = [json.loads(line) for line in bench.RESULTS.read_text().splitlines()]
    assert [line["step"] for line in lines] == ["a", "a", "b"] and "ZeroDivisionError" in lines[2]["output"]


def test_a_step_without_a_gpu_says_so(bench, monkeypatch):
    import first_contact_steps

    monkeypatch.setattr("sys.argv", ["first_contact_steps.py", "machine"])
    monkeypatch.setattr(first_contact_steps.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU here"):
        first_contact_steps.main()
    monkeypatch.setattr("sys.argv", ["first_contact_steps.py", "other"])
    with pytest.raises(SystemExit, match="no step 'other'; there are machine"):
        first_contact_steps.main()


def test_all_together_end_in_time(bench, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "TOTAL", 3.0)
    both = [python(bench, "slow", "import time; time.sleep(60)", seconds=50.0), python(bench, "late", "print(1)")]
    monkeypatch.setattr(bench, "steps", lambda: both)
    monkeypatch.setattr("sys.argv", ["first_contact.py"])
    bench.main()
    slow, late = (json.loads(line) for line in bench.RESULTS.read_text().splitlines())
    assert "stopped after" in slow["status"] and slow["seconds"] < 30 and late["status"] == "out of time"
