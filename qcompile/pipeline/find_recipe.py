"""A recipe in whatever way a caller gives it."""

from __future__ import annotations

from torch import nn

from qcompile.pipeline.advise import Device, advise, parameters
from qcompile.pipeline.presets import PRESETS
from qcompile.pipeline.training_presets import TRAINING_PRESETS
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError


def find_recipe(
    recipe: str | Recipe | dict[str, object], model: nn.Module | None = None, *, data: bool = False
) -> Recipe:
    """A recipe in whatever way it is given.

    Args:
        recipe: name of a preset, "auto" (advise.py chooses), path to a JSON file, plain data, or a Recipe.
        model: what "auto" chooses for.
        data: whether "auto" may choose a recipe that needs calibration.

    Raises:
        RecipeError: an unknown name; the text lists the known ones.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_json(recipe)
    known = {**PRESETS, **TRAINING_PRESETS}
    if recipe in known:
        return known[recipe]
    if recipe == "auto" and model is not None:
        return PRESETS[advise(parameters(model), Device.here(), data=data).recipe]
    if recipe.endswith(".json"):
        return Recipe.read(recipe)
    raise RecipeError(f"unknown recipe {recipe!r}; known: auto, {', '.join(known)}, or a path to a .json file")
