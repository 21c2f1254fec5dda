"""`qcompile recipes`, `explain`, `verify` and `advise`."""

from __future__ import annotations

import json

import pytest

from qcompile.pipeline.presets import PRESETS


@pytest.mark.parametrize("terminal", [True, False])
def test_recipes_lose_no_text(terminal, call, screen):
    screen(80, terminal)
    out = call("recipes")
    assert "…" not in out and "..." not in out
    for name, recipe in PRESETS.items():
        assert name in out
        assert all(word in out for word in recipe.source.split()), name
        assert all(type(p).__name__ in out for p in recipe.passes)
    if terminal:
        assert max(map(len, out.splitlines())) <= 80


def test_one_recipe_is_json(call):
    assert json.loads(call("recipes", "w4a8"))["passes"][0]["weight"] == "int4/group128/zero/dual"


@pytest.mark.parametrize("terminal", [True, False])
def test_explain_loses_no_text(terminal, folder, call, screen):
    screen(80, terminal)
    out = call("explain", folder)
    assert "…" not in out and "Residual streams" in " ".join(out.split())
    whole = " ".join(out.replace("│", " ").split())
    for word in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight", "closed", "FoldNorm"):
        assert word in whole, out


def test_verify(folder, call):
    assert "holds" in call("verify", folder, "--length", 16)


def test_advise(folder, call, screen):
    screen(80, False)
    out = call("advise", folder, "--device", "h100", "--no-data")
    assert out.startswith("recipe:  fp8") and "because: small models" in out and "h100, 80 GB, sync" in out
