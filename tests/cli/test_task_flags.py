"""Flags of tasks: what does not fit is refused before a model is loaded, and what reaches a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.cli.task_flags import check_task_output, print_tasks, task_names, task_run
from qcompile.evaluation import compare, lm_eval_tasks, tune
from qcompile.evaluation.compare import RecipeResult
from qcompile.evaluation.lm_eval_tasks import TaskError, TaskResult, TaskScore
from qcompile.evaluation.task_scores import TaskRun

FEW = ["--windows", 1, "--length", 32]
TASKS = Path(__file__).parents[1] / "data/lm_eval"


def test_flags_without_tasks_are_refused():
    with pytest.raises(ValueError, match="--limit is of tasks. Fix: give --tasks, or omit --limit"):
        task_names(None, 3, None)
    with pytest.raises(ValueError, match="--include-path is of tasks"):
        task_names(None, None, Path("."))
    assert task_names(None, None, None) is None and task_run(None, "t", None, None, 5) is None


def test_names_are_checked(monkeypatch):
    calls = []
    monkeypatch.setattr(lm_eval_tasks, "check_tasks", lambda names, path: calls.append((names, path)))
    assert task_names("a, b*", 4, Path("folder")) == ["a", "b*"] and calls == [(["a", "b*"], Path("folder"))]
    assert task_run(["a"], "t", None, 4, 5) == TaskRun("t", ("a",), None, 4, 5)


def test_a_file_is_of_tasks_and_in_a_folder(tmp_path):
    check_task_output(["a"], None, tmp_path / "x.json")
    check_task_output(None, Path("t"), None)
    with pytest.raises(ValueError, match="--out is of tasks. Fix: give --tasks"):
        check_task_output(None, None, tmp_path / "x.json")
    with pytest.raises(ValueError, match="one at a time. Fix: omit --text"):
        check_task_output(["a"], Path("t"), None)
    for place in (tmp_path, tmp_path / "no" / "x.json"):
        with pytest.raises(ValueError, match="is no file in a folder that exists"):
            check_task_output(["a"], None, place)


def test_scores_are_printed_and_written(tmp_path, monkeypatch, capsys):
    found = TaskResult((TaskScore("t", "acc", "none", 0.5, 0.1, 4, True),), {"t": {}}, 4, 64)
    monkeypatch.setattr(lm_eval_tasks, "evaluate_tasks", lambda *arguments, **options: found)
    monkeypatch.setattr(lm_eval_tasks, "_version", lambda: "0")
    print_tasks("model", TaskRun("t", ("t",)), tmp_path / "s.json", {"model": "m"})
    assert "0.5000" in capsys.readouterr().out and '"model": "m"' in (tmp_path / "s.json").read_text()


@pytest.fixture
def runs(monkeypatch):
    """What reaches a comparison and a search, neither of which measures anything."""
    found = []
    row = RecipeResult("float", 10.0, 0.0, 1.0, 0, 0.0, tasks=(TaskScore("t", "acc", "none", 0.5, None, 4, True),))

    def search(comparison, **options):
        found.append(comparison.tasks)
        return tune.Tuned(row, row, [row, row])

    monkeypatch.setattr(compare, "compare", lambda comparison, names: found.append(comparison.tasks) or [row])
    monkeypatch.setattr(tune, "tune", search)
    return found


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_comparisons_and_searches_run_tasks(command, folder, tmp_path, call, runs):
    out = tmp_path / "c.json"
    flags = ["--tasks", "capitals, last_word", "--limit", 2, "--include-path", TASKS, "--out", out]
    printed = call(command, folder, "--recipes", "int8", *FEW, *flags)
    (run,) = runs
    assert (run.names, run.include_path, run.limit, run.max_length) == (("capitals", "last_word"), TASKS, 2, 32)
    assert run.tokenizer is not None and "t acc" in printed and "0.5000" in printed
    call(command, folder, "--recipes", "int8", *FEW, "--out", out)
    assert runs[1] is None


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_unknown_tasks_are_refused_before_a_model_is_loaded(command, call):
    with pytest.raises(TaskError, match="there is no task 'no_such_task'"):
        call(command, "no such model", "--tasks", "no_such_task", "--include-path", TASKS)
    with pytest.raises(ValueError, match="--limit is of tasks"):
        call(command, "no such model", "--limit", 3)
