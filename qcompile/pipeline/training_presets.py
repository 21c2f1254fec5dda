"""Recipes for `qcompile.train`, by name, each with its source; `qcompile recipes` lists them too."""

from __future__ import annotations

from qcompile.recipe.recipe import Recipe

_RECIPES: tuple[Recipe, ...] = ()

TRAINING_PRESETS: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
