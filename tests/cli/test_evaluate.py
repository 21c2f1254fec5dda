"""`qcompile eval`, `compare`, `tune` and `sensitivity`, end to end on a tiny local model."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qcompile.cli import app
from qcompile.cli.evaluate import parse_share
from qcompile.cli.output import print_table
from qcompile.evaluation import compare, lm_eval_tasks
from qcompile.evaluation.compare import Comparison, RecipeResult
from qcompile.evaluation.compare import table as recipe_table
from qcompile.evaluation.lm_eval_tasks import TaskResult, TaskScore
from qcompile.evaluation.sensitivity import Damage, SiteFormats
from qcompile.evaluation.sensitivity import table as damage_table

FEW = ["--windows", 1, "--length", 32]


@pytest.mark.slow
def test_compare(folder, tmp_path, call):
    files = ["--out", tmp_path / "c.json", "--report", tmp_path / "c.html"]
    out = call("compare", folder, "--recipes", "int8, w4a16", *FEW, *files)
    assert "peak MB" in out and "w4a16" in out and (tmp_path / "c.png").is_file()
    report = (tmp_path / "c.html").read_text()
    assert report.count("<tr><td>") == 3 and report.count("<svg") == 1  # float, int8, w4a16; the trade-off


def test_compare_on_a_rotated_copy(folder, call, monkeypatch):
    monkeypatch.setattr(compare, "rotated_copy", lambda model: model)
    assert "(rotated copy) on the embedded text" in call(
        "compare", folder, "--recipes", "float", *FEW, "--rotated-copy"
    )


def test_compare_calibrates_on_a_data_set(folder, tmp_path, call, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the of a is in to and the a of the is"}\n' * 60)
    found = []
    monkeypatch.setattr(compare, "compare", lambda comparison, names: found.extend(comparison.calibration()) or [])
    call("compare", folder, "--recipes", "w4a16-gptq", *FEW, "--data", rows)
    assert len(found) == 780 // found[0]["input_ids"].shape[1] and found[0]["input_ids"][0, :3].tolist() == [3, 5, 4]


@pytest.mark.slow
def test_tune(folder, tmp_path, call):
    files = ["--out", tmp_path / "t.json", "--report", tmp_path / "t.html"]
    loose = call("tune", folder, "--max-loss", "500%", *FEW, *files)
    assert "goal is 500.0%" in (tmp_path / "t.html").read_text()
    assert "w4a8 stays within 500.0%" in loose and (tmp_path / "t.png").is_file()


@pytest.mark.slow
def test_sensitivity_writes_a_recipe(folder, tmp_path, call):
    files = ["--out", tmp_path / "m.json", "--report", tmp_path / "m.html"]
    out = call("sensitivity", folder, "--tokens", 16, "--bits", 6, *files, "--recipe", "w4a16")
    assert (tmp_path / "m.html").read_text().count("<tr><td>") == 15
    assert "15 sites, added up" in out and (tmp_path / "m.png").is_file()
    assert "15 of 15 sites" in call("quantize", folder, tmp_path / "mixed", "--recipe", tmp_path / "m.json")


def test_tune_without_a_good_recipe_is_code_one(folder, tmp_path, monkeypatch):
    def measure(self, name, recipe):
        return RecipeResult(name, 10.0 if name == "float" else 20.0, 0.0, 1.0, 5, 1.0)

    monkeypatch.setattr(Comparison, "_measure", measure)
    few = ["--windows", "1", "--length", "32", "--recipes", "w4a8", "--out", str(tmp_path / "t.json")]
    result = CliRunner().invoke(app, ["tune", folder, *few])
    assert result.exit_code == 1 and "nearest: w4a8" in result.output


@pytest.mark.parametrize("text,share", [("1%", 0.01), ("0.5%", 0.005), ("0.02", 0.02)])
def test_shares(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_lose_no_text(terminal, screen, capsys):
    screen(80, terminal)
    names = ["w4a16-rotated-gptq", "int8-smooth"]
    print_table(
        recipe_table([RecipeResult(n, 12345.67, 0.12345, 0.5, 123_456_789, 1234.5, 987_654_321) for n in names])
    )
    sites = [f"model.layers.{i}.self_attention.output_projection.weight" for i in range(3)]
    choices = [
        SiteFormats.parse(f) for f in ("int4/group128/zero", "int8:int8/row", "int4/group128/zero/dual:int8/row")
    ]
    print_table(damage_table([Damage(site, c, 1000, 0.12345) for site in sites for c in choices]))
    out = capsys.readouterr().out
    assert "…" not in out
    for word in [*names, *sites, "12345.67", "0.1235", "50.0%", "123", "1234.5", "988", "0.12345"]:
        assert word in out, word
    for word in " ".join(map(str, choices)).split():
        assert word in out, word


class TestTasks:
    """Flags of `eval --tasks`; what tasks compute is tested in tests/evaluation/test_lm_eval_tasks.py."""

    @pytest.mark.parametrize(
        "flags, words",
        [
            (["--limit", "3"], "--limit is of tasks. Fix: give --tasks"),
            (["--include-path", "."], "--include-path is of tasks"),
            (["--out", "x.json"], "--out is of tasks"),
            (["--tasks", "a", "--out", "no/such/folder/x.json"], "is no file in a folder that exists"),
            (["--tasks", "a", "--text", __file__], "one at a time. Fix: omit --text, or --tasks"),
        ],
    )
    def test_flags_that_do_not_fit_are_refused_before_a_model_is_loaded(self, flags, words):
        with pytest.raises(ValueError, match=words):
            CliRunner().invoke(app, ["eval", "no such model", *flags], catch_exceptions=False, standalone_mode=False)

    def test_scores_are_printed_and_written(self, folder, tmp_path, call, monkeypatch):
        found = TaskResult((TaskScore("t", "acc", "none", 0.5, 0.1, 4, True),), {"t": {"version": 1}}, 4, 64)
        calls = []

        def evaluate(model, tokenizer, names, **options):
            calls.append((type(model).__name__, names, options))
            return found

        monkeypatch.setattr(lm_eval_tasks, "check_tasks", lambda names, path: None)
        monkeypatch.setattr(lm_eval_tasks, "evaluate_tasks", evaluate)
        monkeypatch.setattr(lm_eval_tasks, "_version", lambda: "0")
        out = tmp_path / "scores.json"
        printed = call("eval", folder, "--tasks", "a, b*", "--limit", 4, "-r", "w8a16", "--out", out)
        assert calls == [("LlamaForCausalLM", ["a", "b*"], {
            "include_path": None, "limit": 4, "max_length": 64, "batch": 8,
        })]  # fmt: skip
        assert "0.5000" in printed and "0.1000" in printed and "perplexity" not in printed
        data = json.loads(out.read_text())
        assert (data["model"], data["recipe"], data["scores"][0]["value"]) == (folder, "w8a16", 0.5)
