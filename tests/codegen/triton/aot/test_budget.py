"""What kernels may cost: the budget is kept, a tenth over it is found, and an update hides nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qcompile.cli import app
from qcompile.codegen.triton.aot import budget
from qcompile.codegen.triton.aot.budget import CheckedKernel
from qcompile.codegen.triton.aot.compile_kernels import ARCHITECTURES, KernelCost
from qcompile.codegen.triton.aot.shipped_kernels import shipped

GOOD = KernelCost(100, 0, 50_000, 600, {"wgmma": 8}, from_registers=8, together=4, loop={"tensor": 8})


def without_interpreter():
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_all_kernels_compile_for_all_architectures_within_budget():
    command = [sys.executable, "-m", "qcompile.cli", "kernels", "check"]
    done = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    total = sum(len(list(shipped(arch))) for arch in ARCHITECTURES)
    assert f"{total} of {total} kernels pass" in done.stdout


def test_a_tenth_over_budget_is_found(tmp_path, monkeypatch):
    import triton

    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    budget.write([CheckedKernel("k", 90, GOOD, [])])
    assert budget.over_budget("k", 90, GOOD) == []
    assert budget.over_budget("k", 90, dataclasses.replace(GOOD, registers=109)) == []
    assert "111 registers for 100" in budget.over_budget("k", 90, dataclasses.replace(GOOD, registers=111))[0]
    assert "540 instructions" not in str(budget.over_budget("k", 90, dataclasses.replace(GOOD, instructions=540)))
    assert "500 instructions" in budget.over_budget("k", 90, dataclasses.replace(GOOD, instructions=500))[0]
    assert "by nothing for wgmma" in budget.over_budget("k", 90, dataclasses.replace(GOOD, mma={}))[0]
    assert "not in budget" in budget.over_budget("k", 80, GOOD)[0]
    budget.FILE.write_text(json.dumps({"triton": triton.__version__ + "x", "kernels": {}}))
    assert budget.over_budget("k", 80, GOOD) == []  # another compiler, other costs


def test_an_update_does_not_hide_what_must_not_be(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    dearer, spills = CheckedKernel("k", 90, GOOD, [], ["dearer"]), CheckedKernel("s", 90, GOOD, ["spilled"], [])
    for rows, update, code in (([dearer], [], 1), ([dearer], ["--update"], 0), ([dearer, spills], ["--update"], 1)):
        monkeypatch.setattr(budget, "check", lambda *_, rows=rows: iter(rows))
        result = CliRunner().invoke(app, ["kernels", "check", "--arch", "90", *update])
        assert result.exit_code == code and ("s: spilled" in result.output) == (spills in rows)
    assert list(budget.read()["kernels"]["90"]) == ["k"]


def test_kernels_that_are_no_longer_shipped_leave_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    budget.write([CheckedKernel("old", arch, GOOD, []) for arch in (80, 90)])
    budget.write([CheckedKernel("new", 90, GOOD, [])])  # a part of them: the rest stays
    assert set(budget.read()["kernels"]["90"]) == {"old", "new"}
    budget.write([CheckedKernel("new", 90, GOOD, [])], whole=True)
    assert {arch: set(names) for arch, names in budget.read()["kernels"].items()} == {"80": {"old"}, "90": {"new"}}
