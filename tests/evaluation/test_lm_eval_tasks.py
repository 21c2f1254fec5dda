"""Tasks of lm-eval, offline, on our own files: what the harness computes is what the model says."""

from __future__ import annotations

import builtins
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_text_models import one_layer_llama
from word_tokenizer import word_tokenizer

import qcompile
from qcompile.evaluation.lm_eval_tasks import TaskError, check_tasks, evaluate_tasks, table

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests/data/lm_eval"
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture
def in_checkout(monkeypatch):
    """Data files are named from the root of the checkout."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def by_name(result):
    return {(score.task, score.metric): score for score in result.scores}


@pytest.mark.slow
@needs_lm_eval
def test_scores_are_those_of_the_model(in_checkout, tmp_path):
    tokenizer = word_tokenizer(TASKS)
    model = one_layer_llama(len(tokenizer))
    qcompile.quantize(model, "w8a16", progress=False)
    result = evaluate_tasks(model, tokenizer, ["last_word", "pa*"], include_path=TASKS, limit=2, max_length=64)
    scores = by_name(result)
    losses = []
    for line in (TASKS / "last_word.jsonl").read_text().splitlines()[:2]:
        ids = torch.tensor([tokenizer.encode(json.loads(line)["sentence"])])
        with torch.no_grad():
            losses.append(float(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]))
    assert scores["last_word", "perplexity"].value == pytest.approx(math.exp(-sum(losses) / 2), rel=1e-4)
    assert scores["last_word", "perplexity"].higher_is_better is False
    assert scores["last_word", "acc"].samples == scores["pages", "word_perplexity"].samples == 2
    assert scores["last_word", "acc"].error is not None and scores["pages", "bits_per_byte"].value > 0
    shown = [column.header for column in table(result).columns]
    assert shown == ["task", "metric", "value", "+-", "samples", "better"] and table(result).row_count == len(scores)
    result.write(tmp_path / "r.json", model="tiny", recipe="w8a16")
    data = json.loads((tmp_path / "r.json").read_text())
    assert (data["model"], data["limit"], data["tasks"]["pages"]["version"]) == ("tiny", 2, 1)
    assert "lm-eval" in data["versions"] and len(data["scores"]) == len(scores)


@needs_lm_eval
def test_unknown_tasks_and_unreadable_data_are_named(in_checkout, monkeypatch, tmp_path):
    with pytest.raises(TaskError, match="there is no task 'no_such_task'. Fix: one of"):
        check_tasks(["capitals", "no_such_task"], TASKS)
    monkeypatch.chdir(tmp_path)
    tokenizer = word_tokenizer(TASKS)
    with pytest.raises(TaskError, match="capitals cannot be run .*Fix: data of a task"):
        evaluate_tasks(one_layer_llama(len(tokenizer)), tokenizer, ["capitals"], include_path=TASKS)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TaskError, match="tasks need the package lm-eval. Fix: pip install lm-eval"):
        check_tasks(["capitals"], TASKS)


def test_files_of_tasks_are_what_they_say():
    capitals = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()]
    assert len(capitals) == 24 and all(len(set(row["choices"])) == 4 for row in capitals)
    assert {row["gold"] for row in capitals} == {0, 1, 2, 3}
    for name in ("capitals", "last_word", "pages"):
        text = (TASKS / f"{name}.yaml").read_text()
        assert f"task: {name}\n" in text and f"test: tests/data/lm_eval/{name}.jsonl" in text
