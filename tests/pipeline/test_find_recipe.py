"""A recipe in every way that a caller may give it."""

from __future__ import annotations

import json

import pytest
from zoo import build

from qcompile.pipeline.find_recipe import find_recipe
from qcompile.pipeline.presets import PRESETS
from qcompile.pipeline.training_presets import TRAINING_PRESETS
from qcompile.recipe.rule import RecipeError


def test_unknown_name_lists_the_known():
    with pytest.raises(RecipeError, match="float, int8"):
        find_recipe("int9")


def test_a_recipe_in_every_way_it_is_given(tmp_path):
    recipe = PRESETS["w4a8"]
    (tmp_path / "mine.json").write_text(json.dumps(recipe.to_json()))
    for given in (recipe, "w4a8", recipe.to_json(), str(tmp_path / "mine.json")):
        assert find_recipe(given) == recipe
    assert find_recipe(recipe) is recipe


@pytest.mark.parametrize("data", [False, True])
def test_auto_chooses_a_preset_for_a_model(data):
    found = find_recipe("auto", build("mlp"), data=data)
    assert found is PRESETS[found.name] and (data or not found.needs)
    with pytest.raises(RecipeError, match="unknown recipe 'auto'"):
        find_recipe("auto")


def test_recipes_that_train_have_names_of_their_own():
    assert not PRESETS.keys() & TRAINING_PRESETS.keys()
    for name, recipe in TRAINING_PRESETS.items():
        assert find_recipe(name) is recipe and recipe.name == name and recipe.trains
    assert not any(recipe.trains for recipe in PRESETS.values())
