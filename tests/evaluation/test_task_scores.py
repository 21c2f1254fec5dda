"""Scores of tasks in comparisons: which counts of a task, what is lost, and rows that are continued."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_text_models import one_layer_llama
from word_tokenizer import word_tokenizer

from qcompile.evaluation import task_scores
from qcompile.evaluation.compare import Comparison, RecipeResult, compare, read_rows, table
from qcompile.evaluation.html_report import HTMLReport
from qcompile.evaluation.lm_eval_tasks import TaskError, TaskResult, TaskScore
from qcompile.evaluation.task_scores import TaskRun, first_scores, task_loss
from qcompile.evaluation.tune import recipe_loss, tune

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests/data/lm_eval"
ACC = TaskScore("capitals", "acc", "none", 0.5, 0.1, 4, True)


def score(value, task="t", higher=True):
    return TaskScore(task, "acc" if higher else "perplexity", "none", value, None, 4, higher)


def test_the_first_metric_with_a_direction_counts():
    scores = (
        TaskScore("a", "samples", "none", 4.0, None, 4, None), TaskScore("a", "acc", "none", 0.5, None, 4, True),
        TaskScore("a", "acc_norm", "none", 0.7, None, 4, True), TaskScore("b", "ppl", "none", 9.0, None, 4, False),
    )  # fmt: skip
    result = TaskResult(scores, {"a": {}, "b": {}, "group": {}}, None, 64)
    assert [(s.task, s.metric) for s in first_scores(result)] == [("a", "acc"), ("b", "ppl")]
    with pytest.raises(TaskError, match="task a has no metric that says what is better. Fix: name other tasks"):
        first_scores(TaskResult(scores[:1], {"a": {}}, None, 64))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.booleans()), min_size=1, max_size=5))
def test_a_loss_is_the_mean_share_in_the_direction_of_each_task(pairs):
    scores, base = [score(a, higher=h) for a, _, h in pairs], [score(b, higher=h) for _, b, h in pairs]
    expected = sum((b - a) / b if higher else (a - b) / b for a, b, higher in pairs) / len(pairs)
    assert task_loss(scores, base) == pytest.approx(expected)
    assert task_loss(base, base) == 0
    worse = [dataclasses.replace(s, value=s.value * (0.5 if s.higher_is_better else 2)) for s in scores]
    assert task_loss(worse, base) > task_loss(scores, base)


def test_a_score_of_zero_has_no_shares():
    with pytest.raises(TaskError, match="the float model's acc in t is 0. Fix: name tasks that it can do"):
        task_loss([score(0.0)], [score(0.0)])


def rows_of(monkeypatch, values):
    """Measuring is a look-up: name -> perplexity and score."""
    measured = []

    def measure(self, name, recipe):
        measured.append(name)
        ppl, value = values[name]
        return RecipeResult(name, ppl, 0.0, 1.0, 100 + len(measured), 1.0, tasks=(score(value),))

    monkeypatch.setattr(Comparison, "_measure", measure)
    return measured


def comparison(tmp_path, **run):
    windows = [torch.zeros(1, 4, dtype=torch.int64)]
    tmp_path.mkdir(exist_ok=True)
    tasks = TaskRun(None, ("t",), **run)
    return Comparison(torch.nn.Identity(), windows, list, tmp_path / "c.json", "l", tasks)


def test_a_search_goes_by_the_scores(tmp_path, monkeypatch):
    """The recipe with the better perplexity is not taken."""
    values = {"float": (10, 0.8), "w4a8": (10, 0.7), "w4a16": (99, 0.79), "int8": (10, 0.8)}
    measured, lines = rows_of(monkeypatch, values), []
    found = tune(comparison(tmp_path), max_loss=0.0125, recipes=["w4a8", "w4a16", "int8"], tell=lines.append)
    assert found.chosen.recipe == "w4a16" and measured == ["float", "w4a8", "w4a16"]
    assert lines[0] == "float: t acc 0.8000, goal a loss of 1.25% in the mean" and "w4a8: tasks (+12.50%)" in lines[1]
    strict = tune(comparison(tmp_path), max_loss=0.001, recipes=["w4a8", "w4a16"])
    assert strict.chosen is None and strict.nearest.recipe == "w4a16" and len(measured) == 3, "rows are remembered"
    assert recipe_loss(strict.rows[1], strict.rows[0]) == pytest.approx(0.125)
    values["float"] = (10, 0.0)
    with pytest.raises(TaskError, match="is 0"):
        tune(comparison(tmp_path / "other"), recipes=["int8"])
    assert measured[3:] == ["float"], "before recipes are tried"


def test_rows_are_of_their_tasks(tmp_path, monkeypatch):
    measured = rows_of(monkeypatch, {"float": (10, 0.8), "int8": (11, 0.7)})
    first = compare(comparison(tmp_path, limit=2), ["int8"], progress=False)
    assert compare(comparison(tmp_path, limit=2), ["int8"], progress=False) == first and len(measured) == 2
    headers = [str(column.header) for column in table(first).columns]
    assert headers[3:6] == ["same top-1", "t acc", "weights MB"]
    assert [list(column.cells) for column in table(first).columns][4] == ["0.8000", "0.7000"]
    assert "<th" in str(HTMLReport("t", rows=first)) and "0.7000" in str(HTMLReport("t", rows=first))
    for other in ({"limit": 3}, {"limit": 2, "max_length": 8}, {"limit": 2, "include_path": TASKS}):
        with pytest.raises(ValueError, match="is of another comparison"):
            comparison(tmp_path, **other)
    with pytest.raises(ValueError, match="is of another comparison"):
        Comparison(torch.nn.Identity(), [torch.zeros(1, 4, dtype=torch.int64)], list, tmp_path / "c.json")


def test_a_file_without_tasks_is_read_and_a_damaged_one_is_not(tmp_path, monkeypatch):
    rows_of(monkeypatch, {"float": (10, 0.8)})
    compare(comparison(tmp_path), [], progress=False)
    data = json.loads((tmp_path / "c.json").read_text())
    assert RecipeResult.from_json(data["rows"][0]).tasks == (score(0.8),)
    older = {**data["rows"][0]}
    del older["tasks"]
    (tmp_path / "c.json").write_text(json.dumps({**data, "rows": [older]}))
    assert RecipeResult.from_json(read_rows(tmp_path / "c.json")["rows"][0]).tasks == ()
    for bad in (5, [5], [{"task": "t"}]):
        (tmp_path / "c.json").write_text(json.dumps({**data, "rows": [{**older, "tasks": bad}]}))
        with pytest.raises(ValueError, match="is no file of a comparison"):
            read_rows(tmp_path / "c.json")


def test_the_content_of_files_of_tasks_counts(tmp_path):
    (tmp_path / "a.yaml").write_text("task: a")
    run = TaskRun(None, ("a",), tmp_path)
    before = run.identity
    (tmp_path / "a.yaml").write_text("task: a\nnum_fewshot: 2")
    assert run.identity != before and run.identity["names"] == ["a"] and TaskRun(None, ("a",)).identity["files"] == ""


def test_scores_come_from_the_run(monkeypatch):
    calls = []

    def evaluate(model, tokenizer, names, **options):
        calls.append((model, tokenizer, names, options))
        return TaskResult((ACC,), {"capitals": {}}, 3, 32)

    monkeypatch.setattr(task_scores, "evaluate_tasks", evaluate)
    assert TaskRun("tokenizer", ("capitals",), TASKS, 3, 32).scores("model") == (ACC,)
    assert calls == [
        ("model", "tokenizer", ("capitals",), {"include_path": TASKS, "limit": 3, "max_length": 32})
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_of_a_real_comparison(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tokenizer = word_tokenizer(TASKS)
    model = one_layer_llama(len(tokenizer))
    windows = [torch.arange(16)[None] % len(tokenizer)]
    run = TaskRun(tokenizer, ("capitals", "last_word"), TASKS, 2, 64)
    rows = compare(Comparison(model, windows, list, None, "l", run), ["int8"], progress=False)
    assert [[s.task for s in row.tasks] for row in rows] == [["capitals", "last_word"]] * 2
    assert all(0 <= row.tasks[0].value <= 1 for row in rows)
