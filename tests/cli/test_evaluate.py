"""`qcompile eval`, `compare`, `tune` and `sensitivity`, end to end on a tiny local model."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from qcompile.cli import app
from qcompile.cli.evaluate import parse_share
from qcompile.cli.output import print_table
from qcompile.evaluation import compare
from qcompile.evaluation.compare import Comparison, RecipeResult
from qcompile.evaluation.compare import table as recipe_table
from qcompile.evaluation.sensitivity import Damage, SiteFormats
from qcompile.evaluation.sensitivity import table as damage_table

FEW = ["--windows", 1, "--length", 32]


@pytest.mark.slow
def test_compare(folder, tmp_path, call):
    out = call("compare", folder, "--recipes", "int8, w4a16", *FEW, "--out", tmp_path / "c.json")
    assert "peak MB" in out and "w4a16" in out and (tmp_path / "c.png").is_file()


def test_compare_on_a_rotated_copy(folder, call, monkeypatch):
    monkeypatch.setattr(compare, "rotated_copy", lambda model: model)
    assert "(rotated copy) on the embedded text" in call(
        "compare", folder, "--recipes", "float", *FEW, "--rotated-copy"
    )


@pytest.mark.slow
def test_tune(folder, tmp_path, call):
    loose = call("tune", folder, "--max-loss", "500%", *FEW, "--out", tmp_path / "t.json")
    assert "w4a8 stays within 500.0%" in loose and (tmp_path / "t.png").is_file()


@pytest.mark.slow
def test_sensitivity_writes_a_recipe(folder, tmp_path, call):
    out = call("sensitivity", folder, "--tokens", 16, "--bits", 6, "--out", tmp_path / "m.json", "--recipe", "w4a16")
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
