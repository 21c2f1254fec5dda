"""Comparisons: the float row, what is written, and going on after an interruption."""

from __future__ import annotations

import json

import pytest
import torch
from zoo import build, example

import qcompile.evaluation.compare as module
from qcompile.evaluation.compare import Comparison, compare, plot, rotated_copy, table


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
        Comparison(model, windows, give, out, "other")


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
