"""Ctrl-C: one line that says what was kept, and the exit code of a shell."""

from __future__ import annotations

import json
import sys
import warnings

import pytest

from qcompile import cli
from qcompile.api import export_onnx, quantize_folder
from qcompile.checkpoint.finished_folder import FinishedFolder
from qcompile.cli import inspect_model
from qcompile.cli.interruption import rows_of
from qcompile.evaluation.compare import Comparison, RecipeResult


@pytest.fixture
def interrupt(monkeypatch, capsys):
    """Run a command that Ctrl-C ends; returns its line on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qcompile", *map(str, arguments)])
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 130
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return run


def stop(*_, **__):
    raise KeyboardInterrupt


def test_a_command_that_writes_nothing(interrupt, monkeypatch):
    monkeypatch.setattr(inspect_model, "load", stop)
    assert interrupt("explain", "embedded") == "error: interrupted; nothing was written"
    monkeypatch.setattr(cli, "app", stop)
    assert interrupt("explain", "embedded") == "error: interrupted; nothing was written"


@pytest.mark.parametrize("command,module", [("quantize", quantize_folder), ("export-onnx", export_onnx)])
def test_a_folder_is_whole_or_not_there(command, module, interrupt, monkeypatch, folder, tmp_path):
    monkeypatch.setattr(module, module.__name__.rpartition(".")[2], stop)
    place = tmp_path / "[red]"
    assert interrupt(command, folder, place, "-r", "int8") == f"error: interrupted; {place} was not written"
    assert not place.exists()


def test_a_folder_in_parts_says_what_is_finished_and_goes_on(interrupt, monkeypatch, folder, tmp_path, call, fail):
    place, real, solved = tmp_path / "q", FinishedFolder.add, []

    def add(self, sites, found):
        if len(solved) == 3:
            raise KeyboardInterrupt
        solved.append(sites)
        real(self, sites, found)

    with monkeypatch.context() as patch:
        patch.setattr(FinishedFolder, "add", add)
        said = interrupt("quantize", folder, place, "-r", "int8")
    assert said == (
        f"error: interrupted; {place} was not written; 3 finished groups of sites are in {place}.unfinished: "
        "--resume goes on from there"
    )
    assert "holds what an earlier run finished. Fix: resume it (--resume)" in fail(
        "quantize", folder, place, "-r", "int8"
    )
    error = fail("quantize", folder, place, "-r", "w4a16", "--resume")
    assert "is of another run: its recipe is" in error and "Fix: run it as before" in error
    assert "15 of 15 sites" in call("quantize", folder, place, "-r", "int8", "--resume")
    assert "15 of 15 sites" in call("quantize", folder, tmp_path / "whole", "-r", "int8")
    names = [file.name for file in (tmp_path / "whole").iterdir() if file.name != "quantize.jsonl"]
    assert all((place / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    log = [json.loads(line)["sites"] for line in (place / "quantize.jsonl").read_text().splitlines()]
    assert log[:3] == solved and len(log) == 15 and not place.with_name("q.unfinished").exists()


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_rows_are_kept_and_the_same_command_continues(command, interrupt, monkeypatch, folder, tmp_path, call):
    measured = []

    def measure(self, name, recipe):
        if name == "int8" and measured.count("int8") == 0:
            measured.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return RecipeResult(name, 10.0, 0.0, 1.0, 5 if name == "int8" else 0, 1.0)

    monkeypatch.setattr(Comparison, "_measure", measure)
    out = tmp_path / "c.json"
    arguments = [command, folder, "--recipes", "int8", "--windows", 1, "--length", 8, "--out", out]
    line = interrupt(*arguments)
    assert f"interrupted; the rows that were measured are in {out}, and the same command continues" in line
    assert [row["recipe"] for row in json.loads(out.read_text())["rows"]] == ["float"]
    call(*arguments)
    assert measured == ["float", "int8", "int8"]


def test_no_file_no_rows(tmp_path):
    assert rows_of(None)() == rows_of(tmp_path / "no.json")() == "no row was written"
