"""Comparisons: the float row, what is written, and going on after an interruption."""

from __future__ import annotations

import io
import json
import math
import os
import sys

import pytest
import torch
from rich.console import Console
from zoo import build, example

import qcompile.evaluation.compare as module
from qcompile.evaluation.compare import Comparison, RecipeResult, compare, plot, rotated_copy, table
from qcompile.pipeline.find_recipe import find_recipe


def pieces():
    return [torch.randint(0, 100, (1, 12)) for _ in range(2)]


@pytest.mark.slow
def test_rows_and_resumption(tmp_path, monkeypatch):
    model, windows, out = build("llama"), pieces(), tmp_path / "c.json"
    calls = []
    monkeypatch.setattr(module, "quantize", lambda *a, q=module.quantize, **k: (calls.append(a[1].name), q(*a, **k))[1])

    def give():
        return [example("llama")]

    rows = compare(Comparison(model, windows, give, out, "l"), ["int8", "w4a16-gptq"], progress=False)
    assert [r.recipe for r in rows] == ["float", "int8", "w4a16-gptq"] and calls == ["int8", "w4a16-gptq"]
    assert rows[0].kl == 0 and rows[0].agreement == 1 and rows[0].site_bytes == 0
    assert 0 < rows[1].kl < rows[2].kl and rows[2].site_bytes < rows[1].site_bytes
    again = compare(Comparison(model, windows, give, out, "l"), ["int8", "w4a16-gptq", "w8a16"], progress=False)
    assert again[:3] == rows and calls == ["int8", "w4a16-gptq", "w8a16"]
    assert len(json.loads(out.read_text())["rows"]) == 4 and not list(tmp_path.glob("*.partial"))
    assert table(again).row_count == 4
    plot(again, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="another comparison"):
        Comparison(model, windows[:1], give, out, "l")


def test_an_unknown_recipe_is_refused_before_work(monkeypatch):
    monkeypatch.setattr(module, "perplexity", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(ValueError, match="unknown recipe 'no'"):
        compare(Comparison(build("llama"), pieces(), list), ["int8", "no"], progress=False)


def test_the_rotated_copy_is_the_same_function_of_other_weights():
    model = build("llama")
    rotated = rotated_copy(model)
    with torch.no_grad():
        got, want = rotated(**example("llama"))[0], model(**example("llama"))[0]
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    mine, its = (dict(m.named_parameters())["model.layers.0.mlp.up_proj.weight"] for m in (model, rotated))
    assert not torch.allclose(mine, its, atol=1e-3)


@pytest.fixture
def counted(monkeypatch):
    """Measuring is a few lines; returns the names of what was measured."""
    measured = []

    def measure(self, name, recipe):
        measured.append(name)
        return RecipeResult(name, 10.0 + len(measured), 0.0, 1.0, 100, 1.0)

    monkeypatch.setattr(Comparison, "_measure", measure)
    return measured


def comparison(out, *, seed=0, label="l", shift=0.0, text="calibration"):
    torch.manual_seed(seed)
    windows, model = pieces(), torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4) + shift)
        model.bias.zero_()
    return Comparison(model, windows, lambda: [{"text": text}], out, label)


def test_rows_are_found_by_the_content_of_the_recipe(tmp_path, counted):
    """A file that bears the same name and holds another recipe is measured; another name of the same one is not."""
    out, mine, other = tmp_path / "c.json", tmp_path / "mine.json", tmp_path / "other.json"
    plain = find_recipe("int8").to_json()
    mine.write_text(json.dumps({**plain, "name": "[q4_k]"}))
    other.write_text(json.dumps({**plain, "name": "again"}))
    first = comparison(out).measure(str(mine))
    assert comparison(out).measure(str(mine)) == first and counted == ["[q4_k]"]
    assert comparison(out).measure(str(other)).perplexity == first.perplexity and counted == ["[q4_k]"]
    assert comparison(out).measure(str(other)).recipe == "again"
    mine.write_text(json.dumps({**find_recipe("w8a16").to_json(), "name": "[q4_k]"}))
    assert comparison(out).measure(str(mine)).perplexity != first.perplexity
    assert [row["recipe"] for row in json.loads(out.read_text())["rows"]] == ["[q4_k]"], "the old row of this name goes"


def test_rows_are_of_the_calibration_data_too(tmp_path, counted):
    out = tmp_path / "c.json"
    for text, times in [("a", 1), ("a", 1), ("b", 2)]:
        comparison(out, text=text).measure("w4a16-gptq")
        comparison(out, text=text).measure("int8")
        assert (counted.count("w4a16-gptq"), counted.count("int8")) == (times, 1), "int8 needs no data"


@pytest.mark.parametrize("other", [dict(seed=1), dict(shift=0.5)])
def test_a_file_of_another_model_or_text_is_refused_whatever_its_label(other, tmp_path, counted):
    out = tmp_path / "c.json"
    comparison(out).measure("int8")
    assert comparison(out, label="another name of the same").measure("int8").recipe == "int8" and len(counted) == 1
    with pytest.raises(ValueError, match="other weights or another text"):
        comparison(out, **other)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "\0", "[" * 9999, '{"of": 1, "rows": []}', '{"of": {}, "rows": [{"recipe": "int8"}]}',
     '{"of": {}, "rows": 3}', '{"of": {"label": "l", "windows": 2, "length": 12}, "rows": []}'],
)  # fmt: skip
def test_another_file_is_refused_and_unchanged(text, tmp_path):
    out = tmp_path / "c.json"
    out.write_text(text)
    with pytest.raises(ValueError, match="no file of a comparison|another comparison"):
        comparison(out)
    assert out.read_text() == text


@pytest.mark.parametrize("name", ["c.partial", "c", "c.png"])
def test_any_name_of_a_file_works(name, tmp_path, counted):
    comparison(tmp_path / name).measure("int8")
    assert comparison(tmp_path / name).measure("int8").recipe == "int8" and counted == ["int8"]
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of Unix")
def test_a_link_stays_and_a_pipe_is_refused(tmp_path, counted):
    link, target, pipe = tmp_path / "link.json", tmp_path / "target.json", tmp_path / "pipe"
    link.symlink_to(target)
    comparison(link).measure("int8")
    assert link.is_symlink() and len(json.loads(target.read_text())["rows"]) == 1
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="no regular file"):
        comparison(pipe)


def test_names_with_brackets_and_values_without_bounds_are_shown(tmp_path):
    rows = [RecipeResult(n, math.inf, math.nan, 0.0, 5, 1.0) for n in ("[q4_k]", "[red]", "[/tmp]")]
    console = Console(width=200, file=io.StringIO())
    console.print(table(rows))
    assert all(row.recipe in console.file.getvalue() for row in rows)
    plot(rows, tmp_path / "c.png")
