"""Recipes as data: JSON, conflicts, rules."""

from __future__ import annotations

import json

import pytest

from qcompile.numerics.format import Format
from qcompile.passes import FoldNorm, Fuse, Quantize, Rotate, SmoothQuant, Untie
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.pipeline.presets import PRESETS
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError, Rule


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    recipe = PRESETS[name].with_rules([Rule("*.head.*", keep=True), Rule("*", weight=Format("int8"))])
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    recipe.check()


@pytest.mark.parametrize(
    "passes,words",
    [
        ((Untie(), FoldNorm(), SmoothQuant(), Rotate()), "SmoothQuant.norms=False."),
        ((Rotate(),), "needs FoldNorm"),
        ((Fuse(), Quantize()), "must come after Quantize"),
        ((Untie(), Untie()), "stands twice"),
    ],
)
def test_conflicts_name_the_fix(passes, words):
    with pytest.raises(RecipeError, match=words):
        Recipe("x", passes).check()


def test_all_conflicts_at_once():
    with pytest.raises(RecipeError) as caught:
        Recipe("x", (Fuse(), Rotate(), SmoothQuant())).check()
    assert str(caught.value).count("\n") >= 3


@pytest.mark.parametrize(
    "change,words",
    [
        ({"schema": 99}, "schema"),
        ({"color": 1}, "unknown recipe keys"),
        ({"passes": [{"pass": "Quantile"}]}, "unknown pass 'Quantile'; known"),
        ({"passes": [{"pass": "SmoothQuant", "alfa": 1}]}, "no field .*alfa.*known.*alpha"),
        ({"passes": [{"pass": "SmoothQuant", "alpha": 2}]}, "between 0 and 1"),
    ],
)
def test_bad_json(change, words):
    data = {**find_recipe("int8-smooth").to_json(), **change}
    with pytest.raises(RecipeError, match=words):
        Recipe.from_json(data)


def test_first_rule_wins_and_idle_rules_are_errors():
    recipe = Recipe("x", (), (Rule("a.*", keep=True), Rule("*", act=Format("int8"))))
    resolved = recipe.resolve(["a.up", "b.up"])
    assert resolved["a.up"].keep and not resolved["b.up"].keep
    with pytest.raises(RecipeError, match="nearest names: b.up"):
        recipe.resolve(["b.up"])


def test_aliases_are_other_names_of_a_site():
    recipe = Recipe("x", (), (Rule("head.*", keep=True),))
    assert recipe.resolve(["table.weight"], {"table.weight": ["head.weight"]})["table.weight"].keep
    assert recipe.with_rules([Rule("*", act=Format("int8"))]).rules[0].match == "*"


def test_configs_of_no_pass_are_refused():
    with pytest.raises(RecipeError, match="is not a registered pass config; known: AWQ"):
        Recipe("x", (3,))


def test_needs_are_those_of_the_configs():
    assert Recipe("x", (Untie(), SmoothQuant(), Quantize())).needs == {"SmoothQuant": ("absmax",)}
    assert Recipe("x", (Quantize(),)).needs == {}


def test_a_file_that_is_no_recipe(tmp_path):
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(RecipeError, match="r.json is not a recipe.*Fix: write one with Recipe.to_json"):
        Recipe.read(tmp_path / "r.json")
    recipe = find_recipe("int8-smooth")
    (tmp_path / "r.json").write_text(json.dumps(recipe.to_json()))
    assert Recipe.read(tmp_path / "r.json") == recipe == find_recipe(str(tmp_path / "r.json"))


def test_a_new_field_is_written_only_where_it_is_set():
    """So that earlier versions read recipes that do not use it."""
    plain, kept = (Recipe("r", (Quantize(keep_lm_head=keep),)) for keep in (False, True))
    assert "keep_lm_head" not in plain.to_json()["passes"][0] and kept.to_json()["passes"][0]["keep_lm_head"] is True
    assert Recipe.from_json(plain.to_json()) == plain and Recipe.from_json(kept.to_json()) == kept
