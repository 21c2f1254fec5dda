from __future__ import annotations

import json

import pytest

from qcompile.numerics.format import Format
from qcompile.passes import FoldNorm, Fuse, Quantize, Rotate, SmoothQuant, Untie
from qcompile.pipeline.presets import PRESETS, find_recipe
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
        ((Untie(), FoldNorm(), SmoothQuant(), Rotate()), "Smooth.norms=False."),
        ((Rotate(),), "needs FoldNorm"),
        ((Fuse(), Quantize()), "must come after Quantize"),
        ((Untie(), Untie()), "stands twice"),
    ],
)
def test_conflicts_name_the_mend(passes, words):
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
        ({"colour": 1}, "unknown recipe keys"),
        ({"passes": [{"pass": "Quantise"}]}, "unknown pass 'Quantise'; known"),
        ({"passes": [{"pass": "SmoothQuant", "alfa": 1}]}, "no field .*alfa.*known.*alpha"),
        ({"passes": [{"pass": "SmoothQuant", "alpha": 2}]}, "between 0 and 1"),
    ],
)
def test_bad_json(change, words):
    data = {**find_recipe("int8-smooth").to_json(), **change}
    with pytest.raises(RecipeError, match=words):
        Recipe.from_json(data)


def test_unknown_name_lists_the_known():
    with pytest.raises(RecipeError, match="float, int8"):
        find_recipe("int9")


def test_first_rule_wins_and_idle_rules_are_errors():
    recipe = Recipe("x", (), (Rule("a.*", keep=True), Rule("*", act=Format("int8"))))
    resolved = recipe.resolve(["a.up", "b.up"])
    assert resolved["a.up"].keep and not resolved["b.up"].keep
    with pytest.raises(RecipeError, match="nearest names: b.up"):
        recipe.resolve(["b.up"])
